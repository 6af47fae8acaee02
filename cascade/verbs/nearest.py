"""Whether a cascade remembers: painted pictures beside the training pictures nearest to them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.eval.extraction import features_of_split
from cascade.eval.features import Features
from cascade.eval.protocol import embedded
from cascade.grids import grid, to_uint8

NEIGHBOURS, ASKED = 3, 8  # training pictures beside each, and how many are looked for


def nearest(
    pictures: Float[Tensor, "n 3 h w"], captions: Sequence[str], data: Path, features: Features
) -> Image.Image:
    """Some pictures, spread over all, each with the training pictures of the largest cosine."""
    size = pictures.shape[-1]
    shards = Shards(data, Pictures((size,)), shuffle=False)
    chosen = list(range(0, len(pictures), max(1, len(pictures) // ASKED)))[:ASKED]
    gallery = features_of_split(data, "train", size, features)
    cosines = embedded(features, pictures[chosen]) @ gallery.T
    found = cosines.topk(min(NEIGHBOURS, len(shards)), dim=1)
    cells, texts = [], []
    for i, values, places in zip(chosen, found.values.tolist(), found.indices.tolist()):
        cells += [pictures[i], *(shards[n][f"image_{size}"] for n in places)]
        texts += [f"painted: {captions[i]}", *(f"cosine {value:.3f}" for value in values)]
    scale = max(1, 96 // size)
    return grid(to_uint8(torch.stack(cells)), 2 * (1 + found.indices.shape[1]), texts, scale)

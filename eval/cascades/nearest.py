"""A memorization check: generated pictures with their nearest training pictures."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cascade.batch import image_key
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.eval.cascades.protocol import embedded
from cascade.eval.metrics.features import Features
from cascade.eval.pictures.extraction import features_of_split
from cascade.grids import grid, to_uint8

NEIGHBOURS, ASKED = 3, 8  # training pictures for each generated one, and generated ones


def nearest(
    pictures: Float[Tensor, "n 3 h w"], captions: Sequence[str], data: Path, features: Features
) -> Image.Image:
    """A sheet of evenly spaced pictures, each followed by its nearest training pictures.

    Nearness is the cosine similarity of features.
    """
    size = pictures.shape[-1]
    shards = Shards(data, Pictures((size,)), shuffle=False)
    chosen = list(range(0, len(pictures), max(1, len(pictures) // ASKED)))[:ASKED]
    gallery = features_of_split(data, "train", size, features)
    cosines = embedded(features, pictures[chosen]) @ gallery.T
    found = cosines.topk(min(NEIGHBOURS, len(shards)), dim=1)
    cells, texts = [], []
    for i, values, places in zip(chosen, found.values.tolist(), found.indices.tolist()):
        cells += [pictures[i], *(shards[n][image_key(size)] for n in places)]
        texts += [f"painted: {captions[i]}", *(f"cosine {value:.3f}" for value in values)]
    scale = max(1, 96 // size)
    return grid(to_uint8(torch.stack(cells)), 2 * (1 + found.indices.shape[1]), texts, scale)

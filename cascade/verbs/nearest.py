"""Whether a cascade remembers: painted pictures beside the training pictures nearest to them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from cascade.data.shards import Shards, collate
from cascade.data.transforms import Pictures
from cascade.eval.features import Features
from cascade.eval.protocol import embedded
from cascade.files import write_atomically
from cascade.grids import grid, to_uint8

NEIGHBOURS, ASKED = 3, 8  # training pictures beside each, and how many are looked for


def nearest(
    pictures: Float[Tensor, "n 3 h w"], captions: Sequence[str], data: Path, features: Features
) -> Image.Image:
    """Some pictures, spread over all, each with the training pictures of the largest cosine.

    The features of the training split are written beside the shards, once for each extractor.
    """
    size = pictures.shape[-1]
    shards = Shards(data, Pictures((size,)), shuffle=False)
    chosen = list(range(0, len(pictures), max(1, len(pictures) // ASKED)))[:ASKED]
    rows = embedded(features, pictures[chosen])
    cosines = rows @ torch.from_numpy(_gallery(shards, size, data, features)).T
    found = cosines.topk(min(NEIGHBOURS, len(shards)), dim=1)
    cells, texts = [], []
    for i, values, places in zip(chosen, found.values.tolist(), found.indices.tolist()):
        cells += [pictures[i], *(shards[n][f"image_{size}"] for n in places)]
        texts += [f"painted: {captions[i]}", *(f"cosine {value:.3f}" for value in values)]
    scale = max(1, 96 // size)
    return grid(to_uint8(torch.stack(cells)), 2 * (1 + found.indices.shape[1]), texts, scale)


def _gallery(shards: Shards, size: int, data: Path, features: Features) -> Float[np.ndarray, "n d"]:
    path = data / "features" / f"{features.hash}-{size}.npy"
    if path.exists() and len(rows := np.load(path, allow_pickle=False)) == len(shards):
        return rows
    parts = []
    for start in range(0, len(shards), 64):
        part = collate([shards[n] for n in range(start, min(start + 64, len(shards)))])
        parts.append(embedded(features, part[f"image_{size}"]))
    rows = torch.cat(parts).numpy()

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.save(file, rows, allow_pickle=False)

    write_atomically(path, write)
    return rows

"""CLIP image embeddings of a folder of shards, written beside them and joined to them by key.

One file per shard; a shard whose file is there is passed over, so that an interrupted call goes on.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from cascade.data.embeddings import MANIFEST, Embeddings, write_embeddings
from cascade.data.shards import Shards, loader
from cascade.data.transforms import Pictures
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.files import write_atomically


def precompute(
    data: Path, clip: FrozenCLIP, out: Path, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes `clip_image` of every good sample of every shard.

    Args:
        progress: called with (shards done, shards in all).

    Raises:
        UserError: `out` holds embeddings of another CLIP.
    """
    about = {"encoder": clip.name, "hash": clip.hash, "dim": str(clip.dim)}
    before = Embeddings(out).about
    if before.get("hash", clip.hash) != clip.hash:
        raise UserError(
            f"{out} holds embeddings of another CLIP ({before['hash']}) than {clip.name} "
            f"({clip.hash}): choose another folder"
        )
    write_atomically(out / MANIFEST, lambda path: path.write_text(json.dumps(about) + "\n"))
    tars = sorted(data.glob("*.tar"))
    if not tars:
        raise UserError(f"{data} holds no .tar shards")
    for done, tar in enumerate(tars):
        if not (out / f"{tar.stem}.safetensors").exists():
            keys, rows = _embedded(tar, clip)
            write_embeddings(out, tar.stem, keys, {"clip_image": rows}, about)
        if progress:
            progress(done + 1, len(tars))


@torch.inference_mode()
def _embedded(tar: Path, clip: FrozenCLIP) -> tuple[list[str], torch.Tensor]:
    shards = Shards([tar], Pictures((clip.image_size,)), shuffle=False)
    keys, rows = [], []
    count = len(shards)
    for batch in loader(shards, 64, batches=-(-count // 64)):
        keys += batch["key"]
        rows.append(clip.image(batch[f"image_{clip.image_size}"]).cpu())
    unique = {key.split("/", 1)[1]: i for i, key in enumerate(keys[:count])}
    return list(unique), torch.cat(rows)[list(unique.values())]

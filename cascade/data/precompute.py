"""Rows of a frozen encoder for every sample of a folder of shards, a file for each shard.

Any number of processes, on any machines, may do the same work on the same folder: each shard is
made by whoever claims it first, and a shard whose maker died by the next one. What a file holds is
what training would have made of the same sample: the whole centre square, the caption as it is
drawn, and no more of it than the encoder reads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.data.claims import Claims
from cascade.data.corpus import OpenTar, Placed
from cascade.data.dataset import read_dataset
from cascade.data.embeddings import MANIFEST, OFFSETS, Manifest, read_manifest, write_embeddings
from cascade.data.index import scan
from cascade.data.items import IDLE, captions_of, picture_of
from cascade.data.keys import FIRST_DOT
from cascade.data.rgb import suspicious, warn_of_white
from cascade.data.tar import tars_of
from cascade.data.transforms import BadSample, Pictures
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError

Rows = Callable[[Path], tuple[list[str], dict[str, Tensor]]]  # of a tar: keys, tensors by name

BATCH = 64


def precompute(
    data: Path,
    out: Path,
    about: Manifest,
    rows: Rows,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the rows of every shard into a folder; returns when all are there.

    What others are at is passed over, and waited for at the end: they may die.

    Args:
        progress: called with (shards done, shards in all).

    Raises:
        UserError: `data` holds no tars, or `out` the rows of another encoder, or it cannot be
            written to.
    """
    tars = tars_of(data)
    if not tars:
        raise UserError(f"{data} holds no .tar shards")
    if read_manifest(out) and all((out / f"{tar.stem}.safetensors").exists() for tar in tars):
        _agree(out, about)  # nothing is written, so that the place may be read-only
        return
    try:
        with Claims(out) as claims:
            with claims.held(MANIFEST, wait=True):
                _agree(out, about)
            _share(tars, out, about, rows, claims, progress or (lambda *_: None))
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {out}: {error}") from error


def _share(
    tars: Sequence[Path],
    out: Path,
    about: Manifest,
    rows: Rows,
    claims: Claims,
    progress: Callable[[int, int], None],
) -> None:
    there = {path.stem for path in out.glob("*.safetensors")}
    left = [tar for tar in tars if tar.stem not in there]
    progress(len(tars) - len(left), len(tars))
    for wait in (False, True):
        for tar in list(left):
            with claims.held(tar.stem, wait) as mine:
                if mine:
                    _make(tar, out, about, rows)
                    left.remove(tar)
                    progress(len(tars) - len(left), len(tars))


def _agree(out: Path, about: Manifest) -> None:
    before = read_manifest(out)
    if before is None:
        about.write(out)
        return
    ours = replace(about, encoder=before.encoder)  # the same weights may lie elsewhere
    for field in fields(Manifest):
        theirs, own = getattr(before, field.name), getattr(ours, field.name)
        if theirs != own:
            raise UserError(
                f"{out} holds rows of {before.encoder} with {field.name}={theirs}, not {own}: "
                "choose another folder to write to"
            )


def _make(tar: Path, out: Path, about: Manifest, rows: Rows) -> None:
    path = out / f"{tar.stem}.safetensors"
    if path.exists():  # another made it, before it let go of its claim
        return
    for half in out.glob(".*"):
        if half.name.startswith(f".{path.name}."):  # left by one that was killed
            half.unlink(missing_ok=True)
    keys, tensors = rows(tar)
    write_embeddings(out, tar.stem, keys, tensors, {"hash": about.hash})


def about_pictures(clip: FrozenCLIP, out: Path | None = None) -> Manifest:
    """Of the rows that `picture_rows` makes; the folder's name for its encoder stays."""
    sizes, kind = {"clip_image": clip.dim}, {"clip_image": "float32"}
    return Manifest(clip.name, _noted(clip, out), sizes, kind, ["clip_image"])


def _noted(encoder: FrozenT5 | FrozenCLIP, out: Path | None) -> str:
    """The hash by which a folder knows an encoder: one that an earlier version began has another.

    Raises:
        UserError: the folder is of the same weights, and perhaps of another encoder.
    """
    before = out and read_manifest(out)
    if not before or before.hash not in (encoder.hash, encoder.former.hash):
        return encoder.hash
    if why := differs(encoder, before.hash, before.encoder):
        raise UserError(f"{out} holds rows of {before.encoder}, but {why}: choose another folder")
    return before.hash


@torch.inference_mode()
def picture_rows(
    tar: Path, clip: FrozenCLIP, captions: Sequence[str], workers: int = 0
) -> tuple[list[str], dict[str, Tensor]]:
    """`clip_image` of each good picture that has one of some captions; warns of white ones."""
    keys, rows, white = [], [torch.empty(0, clip.dim)], []
    for samples in _samples(tar, captions, "first", clip.image_size, workers):
        keys += [key for key, _, _ in samples]
        pictures = torch.stack([picture for _, _, picture in samples])
        rows.append(clip.image(pictures).float().cpu())
        bytes_ = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        white += [key for (key, _, _), picture in zip(samples, bytes_) if suspicious(picture)]
    warn_of_white(tar, white, len(keys))
    return keys, {"clip_image": torch.cat(rows)}


def about_captions(
    encoder: FrozenT5 | FrozenCLIP,
    captions: Sequence[str],
    several: str | None = None,
    out: Path | None = None,
) -> Manifest:
    """Of the rows that `caption_rows` makes; the folder's name for its encoder stays."""
    unit = sorted(encoder.sizes.keys() & {"clip_text"})
    dtypes = {"text": "bfloat16", **dict.fromkeys(unit, "float32")}
    length, names, known = encoder.length, list(captions), _noted(encoder, out)
    return Manifest(encoder.name, known, encoder.sizes, dtypes, unit, names, length, several)


@torch.inference_mode()
def caption_rows(
    tar: Path,
    encoder: FrozenT5 | FrozenCLIP,
    captions: Sequence[str],
    workers: int = 0,
    several: str | None = None,
) -> tuple[list[str], dict[str, Tensor]]:
    """For each caption field its `text` [n, w] in bfloat16, and a CLIP's `clip_text`.

    The states of a whole shard are held in memory. A sample without a caption in some field has an
    empty row there.
    """
    samples = [s for batch in _samples(tar, captions, several, None, workers) for s in batch]
    tensors = {}
    for field in captions:
        named = _encoded(encoder, [texts.get(field) for _, texts, _ in samples])
        tensors |= {f"{field}/{name}": rows for name, rows in named.items()}
    return [key for key, _, _ in samples], tensors


def _encoded(encoder: FrozenT5 | FrozenCLIP, captions: Sequence[str | None]) -> dict[str, Tensor]:
    sizes = encoder.sizes
    states = [torch.empty(0, sizes["text"], dtype=torch.bfloat16)] * len(captions)
    out = {key: torch.zeros(len(captions), sizes[key]) for key in sizes.keys() - {"text"}}
    there = [i for i, caption in enumerate(captions) if caption]
    there.sort(key=lambda i: len(captions[i]))  # captions of a length need little padding
    for start in range(0, len(there), BATCH):
        chosen = there[start : start + BATCH]
        found = encoder({"caption": [captions[i] for i in chosen]})
        text, mask = found["text"].bfloat16().cpu(), found["text_mask"].cpu()
        for i, own, tokens in zip(chosen, text, mask):
            states[i] = own[tokens]
        for key, rows in out.items():
            rows[chosen] = found[key].float().cpu()
    lengths = torch.tensor([0, *map(len, states)])
    out["text"] = torch.cat([torch.empty(0, sizes["text"], dtype=torch.bfloat16), *states])
    return {**out, f"text{OFFSETS}": lengths.cumsum(0)}


class _Samples(Dataset):
    """The samples of a tar: key, captions by field, the picture if a size is given; None: bad."""

    def __init__(self, tar: Path, captions: Sequence[str], several: str | None, size: int | None):
        members = {"txt" if field == "txt" else "json" for field in captions}
        self.tar = OpenTar(scan(tar, _keys(tar.parent)), members)
        self.captions, self.several = captions, several
        self.pictures = Pictures((size,) if size else ())

    def __len__(self) -> int:
        return len(self.tar)

    def __getitem__(self, place: int) -> tuple[str, dict[str, str], Tensor | None] | None:
        sample = Placed(self.tar, place)
        try:
            texts = captions_of(sample, self.captions, self.several)
            largest = self.pictures.largest
            views = self.pictures.views(picture_of(sample, largest), IDLE) if largest else {}
        except BadSample:
            return None
        firsts = {field: found[0] for field, found in texts.items()}
        return sample.key, firsts, next(iter(views.values()), None)


def _keys(folder: Path) -> str:
    dataset = read_dataset(folder)
    return dataset.keys if dataset else FIRST_DOT


def _samples(
    tar: Path, captions: Sequence[str], several: str | None, size: int | None, workers: int
) -> Iterator[list[tuple[str, dict[str, str], Tensor | None]]]:
    """The good samples of a tar, some at a time."""
    samples = _Samples(tar, captions, several, size)
    for batch in DataLoader(samples, BATCH, collate_fn=list, num_workers=workers):
        if good := [sample for sample in batch if sample]:
            yield good

"""Encodes every sample of a folder of shards with a frozen encoder, into one file per shard.

Any number of processes, on any machines, may share the work on a folder: each shard is encoded by
the first to lock it, and the shards of a process that died by others. A file holds what training
would have computed for the same samples: from the whole centre square, and from captions as
training draws them, truncated to what the encoder reads.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.data.embeddings import MANIFEST, OFFSETS, Manifest, read_manifest, write_embeddings
from cascade.data.items import UNUSED, captions_of, picture_of
from cascade.data.tars.dataset import read_dataset
from cascade.data.tars.index import scan
from cascade.data.tars.keys import FIRST_DOT
from cascade.data.tars.open_tar import OpenTar, Placed
from cascade.data.tars.tar import tars_of
from cascade.data.transforms import BadSample, Pictures
from cascade.draws import generator
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import Encoder, differs
from cascade.errors import UserError
from cascade.files.locks import Claims
from cascade.files.stores.places import Place, Remote, files_of
from cascade.formats.rgb import suspicious, warn_of_white

Rows = Callable[[Place], tuple[list[str], dict[str, Tensor]]]  # tar -> keys, tensors by name
Progress = Callable[[int, int], None]  # (shards done, shards in all)

BATCH = 64


def precompute(
    data: Place, out: Place, about: Manifest, rows: Rows, progress: Progress = lambda *_: None
) -> None:
    """Write the rows of every shard into a folder; return when all are there.

    Shards that other processes are encoding are left for last, and encoded here if those die. In a
    store nothing can be locked: processes begin at different shards there, and what two of them
    encode at the same time is written twice.

    Args:
        rows: encodes a tar.
        progress: called whenever a shard is done.

    Raises:
        UserError: `data` holds no tars, or `out` holds the rows of another encoder or cannot be
            written to.
    """
    tars = tars_of(data)
    if not tars:
        raise UserError(f"{data} holds no .tar shards")
    if read_manifest(out) and {tar.stem for tar in tars} <= _there(out):
        _check_manifest(out, about)  # without writing: the folder may be read-only
        return
    try:
        if isinstance(out, Remote):
            _check_manifest(out, about)
            _alone(tars, out, about, rows, progress)
            return
        with Claims(out) as claims:
            with claims.held(MANIFEST, wait=True):
                _check_manifest(out, about)
            _share(tars, out, about, rows, claims, progress)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write to {out}: {error}") from error


def _there(out: Place) -> set[str]:
    """Return the names of the tars whose rows are there."""
    return {one.stem for one in files_of(out, ".safetensors")}


def _alone(
    tars: Sequence[Place], out: Remote, about: Manifest, rows: Rows, progress: Progress
) -> None:
    start = int(generator(os.getpid(), "precompute", 0).integers(len(tars)))
    for tar in [*tars[start:], *tars[:start]]:
        if tar.stem not in (there := _there(out)):
            keys, tensors = rows(tar)
            write_embeddings(out, tar.stem, keys, tensors, {"hash": about.hash})
        progress(len(there | {tar.stem}), len(tars))


def _share(
    tars: Sequence[Place],
    out: Path,
    about: Manifest,
    rows: Rows,
    claims: Claims,
    progress: Progress,
) -> None:
    there = _there(out)
    left = [tar for tar in tars if tar.stem not in there]
    progress(len(tars) - len(left), len(tars))
    for wait in (False, True):
        for tar in list(left):
            with claims.held(tar.stem, wait) as mine:
                if mine:
                    _make(tar, out, about, rows)
                    left.remove(tar)
                    progress(len(tars) - len(left), len(tars))


def _check_manifest(out: Place, about: Manifest) -> None:
    """Write the manifest, or raise UserError if the folder has a different one."""
    before = read_manifest(out)
    if before is None:
        about.write(out)
        return
    ours = replace(about, encoder=before.encoder)  # the same weights may be at another path
    for field in fields(Manifest):
        theirs, own = getattr(before, field.name), getattr(ours, field.name)
        if theirs != own:
            raise UserError(
                f"{out} holds rows of {before.encoder} with {field.name}={theirs}, not {own}: "
                "choose another folder to write to"
            )


def _make(tar: Place, out: Path, about: Manifest, rows: Rows) -> None:
    path = out / f"{tar.stem}.safetensors"
    if path.exists():  # another process wrote it, and then released the lock
        return
    for partial in out.glob(".*"):
        if partial.name.startswith(f".{path.name}."):  # left by a process that was killed
            partial.unlink(missing_ok=True)
    keys, tensors = rows(tar)
    write_embeddings(out, tar.stem, keys, tensors, {"hash": about.hash})


def about_pictures(clip: FrozenCLIP, out: Place | None = None) -> Manifest:
    """Return the manifest of `picture_rows`, with the encoder's hash as `out` records it."""
    sizes, kind = {"clip_image": clip.dim}, {"clip_image": "float32"}
    unit = ["clip_image"] if clip.unit else []
    return Manifest(clip.name, _recorded_hash(clip, out), sizes, kind, unit)


def _recorded_hash(encoder: Encoder, out: Place | None) -> str:
    """Return an encoder's hash, in the form of an earlier version if that one began the folder.

    Raises:
        UserError: the folder's encoder has the same weights, but may differ in architecture.
    """
    before = out and read_manifest(out)
    if not before or before.hash not in (encoder.hash, encoder.former.hash):
        return encoder.hash
    if why := differs(encoder, before.hash, before.encoder):
        raise UserError(f"{out} holds rows of {before.encoder}, but {why}: choose another folder")
    return before.hash


@torch.inference_mode()
def picture_rows(
    tar: Place, clip: FrozenCLIP, captions: Sequence[str], workers: int = 0
) -> tuple[list[str], dict[str, Tensor]]:
    """Encode `clip_image` of each sample with a picture and a caption; warn of white pictures."""
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
    encoder: Encoder, captions: Sequence[str], several: str | None = None, out: Place | None = None
) -> Manifest:
    """Return the manifest of `caption_rows`, with the encoder's hash as `out` records it."""
    embeddings = sorted(encoder.sizes.keys() & {"clip_text"})
    dtypes = {"text": "bfloat16", **dict.fromkeys(embeddings, "float32")}
    unit = embeddings if getattr(encoder, "unit", True) else []
    length, names, known = encoder.length, list(captions), _recorded_hash(encoder, out)
    return Manifest(encoder.name, known, encoder.sizes, dtypes, unit, names, length, several)


@torch.inference_mode()
def caption_rows(
    tar: Place,
    encoder: Encoder,
    captions: Sequence[str],
    workers: int = 0,
    several: str | None = None,
) -> tuple[list[str], dict[str, Tensor]]:
    """Encode each caption field: `text` [n, w] in bfloat16, and a CLIP's `clip_text`.

    Holds the states of a whole shard in memory. A sample without a caption in a field gets an empty
    row there.
    """
    samples = [s for batch in _samples(tar, captions, several, None, workers) for s in batch]
    tensors = {}
    for field in captions:
        named = _encoded(encoder, [texts.get(field) for _, texts, _ in samples])
        tensors |= {f"{field}/{name}": rows for name, rows in named.items()}
    return [key for key, _, _ in samples], tensors


def _encoded(encoder: Encoder, captions: Sequence[str | None]) -> dict[str, Tensor]:
    sizes = encoder.sizes
    states = [torch.empty(0, sizes["text"], dtype=torch.bfloat16)] * len(captions)
    out = {key: torch.zeros(len(captions), sizes[key]) for key in sizes.keys() - {"text"}}
    there = [i for i, caption in enumerate(captions) if caption]
    there.sort(key=lambda i: len(captions[i]))  # equal lengths need little padding
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
    """The samples of a tar: key, captions by field, and picture if a size is given; None if bad."""

    def __init__(self, tar: Place, captions: Sequence[str], several: str | None, size: int | None):
        members = {"txt" if field == "txt" else "json" for field in captions}
        dataset = read_dataset(tar.parent)
        self.tar = OpenTar(scan(tar, dataset.keys if dataset else FIRST_DOT), members)
        self.captions, self.several = captions, several
        self.pictures = Pictures((size,) if size else ())

    def __len__(self) -> int:
        return len(self.tar)

    def __getitem__(self, place: int) -> tuple[str, dict[str, str], Tensor | None] | None:
        sample = Placed(self.tar, place)
        try:
            texts = captions_of(sample, self.captions, self.several)
            largest = self.pictures.largest
            views = self.pictures.views(picture_of(sample, largest), UNUSED) if largest else {}
        except BadSample:
            return None
        firsts = {field: found[0] for field, found in texts.items()}
        return sample.key, firsts, next(iter(views.values()), None)


def _samples(
    tar: Place, captions: Sequence[str], several: str | None, size: int | None, workers: int
) -> Iterator[list[tuple[str, dict[str, str], Tensor | None]]]:
    """Yield the good samples of a tar, some at a time."""
    samples = _Samples(tar, captions, several, size)
    for batch in DataLoader(samples, BATCH, collate_fn=list, num_workers=workers):
        if good := [sample for sample in batch if sample]:
            yield good

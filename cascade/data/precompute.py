"""Encodes every sample of a folder of shards with a frozen encoder, into one file per shard.

Any number of processes, on any machines, may share the work on a folder: each shard is encoded by
the first to lock it, and the shards of a process that died by others. A file holds what training
would have computed for the same samples: from the whole centre square, and from captions as
training draws them, truncated to what the encoder reads.
"""

import os
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cascade.data.embeddings import MANIFEST, OFFSETS, Manifest, read_manifest, write_embeddings
from cascade.data.items import Sample, captions_of, picture_of
from cascade.data.recaptions.reading import Recaptions
from cascade.data.tars.dataset import read_dataset
from cascade.data.tars.index import scan
from cascade.data.tars.keys import FIRST_DOT
from cascade.data.tars.open_tar import OpenTar, Placed
from cascade.data.tars.tar import tars_of
from cascade.data.transforms import BadSample, scaled
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
    theirs, own = _compared(before), _compared(ours)
    for name in {**own, **theirs}:
        if (then := theirs.get(name)) != (now := own.get(name)):
            raise UserError(
                f"{out} holds rows of {before.encoder} with {name}={then}, not {now}: "
                "choose another folder to write to"
            )


def _compared(about: Manifest) -> dict[str, Any]:
    """The fields of a manifest, what people can read before the hash that covers it."""
    named = asdict(about)
    settings, known = named.pop("settings"), named.pop("hash")
    return {**settings, **named, "hash": known}


def _make(tar: Place, out: Path, about: Manifest, rows: Rows) -> None:
    path = out / f"{tar.stem}.safetensors"
    if path.exists():  # another process wrote it, and then released the lock
        return
    for left in out.glob(".*"):
        if left.name.startswith(f".{path.name}."):  # by a process that was killed
            left.unlink(missing_ok=True)
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
    make = partial(_captioned_picture, captions=captions, size=clip.image_size)
    for some in made_of(tar, _members(captions), make, workers):
        if not (samples := {key: picture for key, picture in some if picture is not None}):
            continue
        keys += samples
        pictures = torch.stack(list(samples.values()))
        rows.append(clip.image(pictures).float().cpu())
        bytes_ = ((pictures + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        white += [key for key, picture in zip(samples, bytes_) if suspicious(picture)]
    warn_of_white(tar, white, len(keys))
    return keys, {"clip_image": torch.cat(rows)}


def about_captions(
    encoder: Encoder,
    captions: Sequence[str],
    several: str | None = None,
    out: Place | None = None,
    recaptions: Recaptions | None = None,
) -> Manifest:
    """Return the manifest of `caption_rows`, with the encoder's hash as `out` records it."""
    embeddings = sorted(encoder.sizes.keys() & {"clip_text"})
    dtypes = {"text": "bfloat16", **dict.fromkeys(embeddings, "float32")}
    unit = embeddings if getattr(encoder, "unit", True) else []
    length, names, known = encoder.length, list(captions), _recorded_hash(encoder, out)
    made = {"recaptions": recaptions.about.hash} if recaptions and recaptions.about else {}
    return Manifest(encoder.name, known, encoder.sizes, dtypes, unit, names, length, several, made)


@torch.inference_mode()
def caption_rows(
    tar: Place,
    encoder: Encoder,
    captions: Sequence[str],
    workers: int = 0,
    several: str | None = None,
    recaptions: Recaptions | None = None,
) -> tuple[list[str], dict[str, Tensor]]:
    """Encode each caption field: `text` [n, w] in bfloat16, and a CLIP's `clip_text`.

    Holds the states of a whole shard in memory. A sample without a caption in a field gets an empty
    row there.
    """
    make = partial(_first, captions=captions, several=several, recaptions=recaptions)
    found = chain.from_iterable(made_of(tar, _members(captions), make, workers))
    samples = {key: texts for key, texts in found if texts is not None}
    tensors = {}
    for field in captions:
        named = _encoded(encoder, [texts.get(field) for texts in samples.values()])
        tensors |= {f"{field}/{name}": rows for name, rows in named.items()}
    return list(samples), tensors


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


def _members(captions: Sequence[str]) -> set[str]:
    return {"txt" if field == "txt" else "json" for field in captions}


def _first(
    sample: Sample, captions: Sequence[str], several: str | None, recaptions: Recaptions | None
) -> dict[str, str]:
    found = captions_of(sample, captions, several, recaptions)
    return {field: texts[0] for field, texts in found.items()}


def _captioned_picture(sample: Sample, captions: Sequence[str], size: int) -> Tensor:
    captions_of(sample, captions, "first")  # training skips what has none
    return scaled(picture_of(sample, size))


class _Made(Dataset):
    """What is made of each sample of a tar, by key; None if the sample is bad."""

    def __init__(self, tar: Place, members: Set[str], make: Callable[[Sample], Any]):
        dataset = read_dataset(tar.parent)
        self.tar = OpenTar(scan(tar, dataset.keys if dataset else FIRST_DOT), members)
        self.make = make

    def __len__(self) -> int:
        return len(self.tar)

    def __getitem__(self, place: int) -> tuple[str, Any]:
        sample = Placed(self.tar, place)
        try:
            return sample.key, self.make(sample)
        except BadSample:
            return sample.key, None


def made_of(
    tar: Place,
    members: Set[str],
    make: Callable[[Sample], Any],
    workers: int = 0,
    batch: int = BATCH,
) -> Iterator[list[tuple[str, Any]]]:
    """Yield lists of (key, what `make` made) for the samples of a tar.

    Args:
        members: one of which a sample must have, besides its picture: "txt", "json".
        make: called in the workers; what it makes is None for bad samples.
        workers: processes that read and decode.
    """
    yield from DataLoader(_Made(tar, members, make), batch, collate_fn=list, num_workers=workers)

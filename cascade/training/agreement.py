"""Whether what a stage reads has the sizes, and comes from the encoders, that it is built for.

`check` asks when a stage is built, before any data is read: only models' configurations and
manifests of embeddings are opened, and encoders' weights hashed. What is not on this machine is not
judged; its first use says what is missing. `verify` then encodes some samples anew.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.codecs import Pixels
from cascade.conditioning import LowRes
from cascade.data.embeddings import Embeddings, Manifest
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.sources import NotHere
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError
from cascade.nets.unet import check_sides
from cascade.stage import Encoder, Stage

SETTINGS = {"text": "text.size", "clip_text": "clip.model.dim", "clip_image": "clip.model.dim"}
AGREE = 0.999  # cosine of a row and the same sample's encoded anew; bfloat16 alone costs 1e-4


def check(
    stage: Stage,
    stores: Collection[Embeddings],
    clip: FrozenCLIP,
    crop: int | None = None,
    captions: Collection[str] = ("txt",),
    several: str | None = None,
) -> None:
    """Refuses a network, encoders and embeddings that do not fit the stage, or one another.

    Args:
        stores: the embeddings that its data will be joined with.
        clip: whose embeddings of pictures they should be (`clip.path`).
        crop: side of the pictures in training, if it is not that of the stage.
        captions: the fields that its captions are taken from.
        several: which of several captions in a field is taken.

    Raises:
        UserError: with both sizes, hashes, lengths or lists of fields, and what to set.
    """
    if isinstance(stage.codec, Pixels):
        check_sides(stage.net, stage.codec.size, crop or stage.codec.size)
    _ports(stage)
    sizes = stage.conditioner.sizes
    if stage.writes in SETTINGS:
        sizes |= {stage.writes: stage.codec.size}
    for encoder in stage.encoders:
        for key in sorted(sizes.keys() & encoder.sizes.keys()):
            _equal(key, sizes[key], encoder.sizes[key], encoder.name)
    holders: dict[str, Embeddings] = {}
    for store in stores:
        if about := store.about:
            for key in about.sizes:
                if (other := holders.setdefault(key, store)) is not store:
                    raise UserError(f"{key} is in {other.folder} and in {store.folder}: leave one")
            for key in sorted(sizes.keys() & about.sizes.keys()):
                _equal(key, sizes[key], about.sizes[key], store.folder)
            _same_makers(store, about, stage, clip)
            _same_captions(store, about, captions, several)


def _ports(stage: Stage) -> None:
    """The vectors, tokens and pictures of the condition are as the network reads them."""
    reads = {"dim": getattr(stage.net, "embed", None), "width": stage.net.width}
    for name, embedder in stage.conditioner.embedders.items():
        for what, setting in (("dim", "net.embed"), ("width", "net.width")):
            found, wanted = getattr(embedder, what, None), reads[what]
            if found is not None and isinstance(wanted, int | None) and found != wanted:
                raise UserError(
                    f"{setting}={wanted}, but the condition {name} gives {found} numbers: set "
                    f"stage.conditioner.embedders.{name}.{what}={wanted}"
                )
    pictures = sum(isinstance(e, LowRes) for e in stage.conditioner.embedders.values())
    given = 3 * (pictures + (stage.conditioner.sketch is not None))
    if (wanted := getattr(stage.net, "image_channels", given)) != given:
        raise UserError(
            f"net.image_channels={wanted}, but the condition's pictures have {given} channels: set "
            f"net.image_channels={given}"
        )


def _equal(key: str, expected: int, found: int, source: object) -> None:
    if expected != found:
        raise UserError(
            f"{SETTINGS[key]}={expected}, but {key} of {source} has {found} numbers: set "
            f"{SETTINGS[key]}={found}"
        )


def _same_makers(store: Embeddings, about: Manifest, stage: Stage, clip: FrozenCLIP) -> None:
    """The encoders that made the rows are those that would make them here, to the same length."""
    read = stage.conditioner.sizes
    texts = [e for e in stage.encoders if isinstance(e, FrozenCLIP) and "clip_text" in read]
    if "clip_image" in about.sizes and "clip_image" in {*read, stage.writes}:
        # The prior compares picture and text: its text embeddings too must be of this CLIP.
        for encoder in {e.name: e for e in [clip, *texts]}.values():
            _same_hash(store, about, encoder, "another CLIP", "clip.path")
    for encoder in stage.encoders:
        if encoder.writes & about.sizes.keys():
            _same_hash(store, about, encoder, "another encoder", "text")
            # A CLIP's length is in its weights.
            if isinstance(encoder, FrozenT5) and encoder.length != about.length:
                raise UserError(
                    f"text.reader.length={encoder.length}, but {store.folder} was made with "
                    f"--length {about.length}: set text.reader.length={about.length}"
                )


def _same_hash(
    store: Embeddings, about: Manifest, encoder: Encoder, what: str, setting: str
) -> None:
    try:
        why = differs(encoder, about.hash, about.encoder)
    except NotHere:
        return
    if why:
        raise UserError(
            f"{store.folder} was made by {what} ({about.encoder}, {about.hash}) than "
            f"{encoder.name} ({why}): set {setting} to the one that made it, or run "
            "`cascade data precompute` into another folder and set embeddings to that"
        )


def _same_captions(
    store: Embeddings, about: Manifest, captions: Collection[str], several: str | None
) -> None:
    if not about.captions:
        return
    if several == "drawn":
        raise UserError(
            f"data.several=drawn, but {store.folder} has one row for each caption field: take "
            "data.several=first or all, or leave precomputed=text out"
        )
    if several != about.several:
        made, wanted = (
            f"--several {of}" if of else "no --several" for of in (about.several, several)
        )
        raise UserError(
            f"{store.folder} was made with {made}, but data.several is {several or 'not set'}: run "
            f"`cascade data precompute` with {wanted} into another folder"
        )
    if not set(captions) <= set(about.captions):
        wanted = ",".join(captions)
        raise UserError(
            f"{store.folder} has rows for captions of {','.join(about.captions)}, but "
            f"data.captions are {wanted}: run `cascade data precompute --captions {wanted}` into "
            "another folder"
        )


@torch.inference_mode()
def verify(
    shards: Callable[[Sequence[int]], Any],
    stores: Collection[Embeddings],
    encoders: Collection[Encoder],
    clip: FrozenCLIP,
    count: int = 8,
) -> None:
    """Encodes a few samples anew, picture and caption, and compares them with their rows.

    The encoders are copied first, so that what is loaded here does not stay.

    Args:
        shards: gives the training samples, joined with `stores`, with whole pictures of some
            sizes; it is not called if there is nothing to compare.
        encoders: of the captions.
        clip: of the pictures; if it is not on this machine, they are not compared.
        count: how many samples, at equal distances.

    Raises:
        UserError: a row is of something else, such as of another sample.
    """
    held = {key: store for store in stores if store.about for key in store.about.sizes}
    texts = [copy(encoder) for encoder in encoders if encoder.writes & held.keys()]
    pictures = [copy(clip)] if "clip_image" in held and _is_here(clip) else []
    if not texts and not pictures:
        return
    samples = shards([clip.image_size] if pictures else [])
    for n in range(count):
        item = samples[n * len(samples) // count]
        for encoder in pictures:
            picture = item[f"image_{encoder.image_size}"][None]
            _alike(item, held, {"clip_image": encoder.image(picture)[0]}, encoder)
        for encoder in texts:
            found = encoder({"caption": [item["caption"]]})
            _alike(
                item, held, {key: found[key][0] for key in encoder.writes & held.keys()}, encoder
            )


def _is_here(clip: FrozenCLIP) -> bool:
    try:
        return bool(clip.hash)
    except NotHere:
        return False


def _alike(
    item: Mapping[str, Any],
    held: Mapping[str, Embeddings],
    anew: Mapping[str, Tensor],
    encoder: FrozenCLIP | FrozenT5,
) -> None:
    for key, expected in sorted(anew.items()):
        row, expected = item[key], expected.cpu()
        where = f"{held[key].folder}: {key} of {item['key']} is not what {encoder.name} makes of it"
        remedy = "run `cascade data precompute` into another folder, and set embeddings to that"
        if row.shape != expected.shape:
            raise UserError(f"{where}: {len(row)} tokens, not {len(expected)}; {remedy}")
        cosine = F.cosine_similarity(row.flatten().float(), expected.flatten().float(), dim=0)
        if not cosine > AGREE:
            raise UserError(f"{where}: cosine {cosine:.4f}, not over {AGREE}; {remedy}")

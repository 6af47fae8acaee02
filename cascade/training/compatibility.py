"""Checks that a stage's inputs have the sizes, and come from the encoders, that it is built for.

`check` runs when a stage is built, before any data is read: it opens only models' configurations
and embeddings' manifests, and hashes encoders' weights. It does not judge what is not on this
machine, which its first use will report as missing. `verify` then encodes some samples again.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.batch import KINDS, image_key
from cascade.codecs import Pixels
from cascade.conditioning import LowRes
from cascade.data.embeddings import Embeddings, Manifest
from cascade.data.recaptions.reading import Recaptions
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.identity import differs
from cascade.encoders.weights import NotHere
from cascade.errors import UserError
from cascade.latents.codec import Latent
from cascade.nets.unet import check_sides
from cascade.runs.agreement import is_unit
from cascade.stage import Encoder, Stage

AGREE = 0.999  # least cosine of a row and the same sample encoded again; bfloat16 costs 1e-4


def check(
    stage: Stage,
    stores: Collection[Embeddings],
    clip: FrozenCLIP,
    crop: int | None = None,
    captions: Collection[str] = ("txt",),
    several: str | None = None,
    recaptions: Recaptions | None = None,
) -> None:
    """Check that network, encoders and embeddings fit the stage and one another.

    Args:
        stores: the embeddings that the training data is joined with.
        clip: the CLIP that image embeddings must come from (`clip.path`).
        crop: side of the pictures in training, if it differs from the stage's.
        captions: the fields that captions are drawn from.
        several: which of several captions in a field is used.
        recaptions: the captions that a captioner wrote.

    Raises:
        UserError: with both sizes, hashes, lengths or lists of fields, and what to set.
    """
    if isinstance(stage.codec, Pixels):
        sides = (side for shape in stage.codec.shapes for side in shape)
        check_sides(stage.net, stage.codec.size, crop or stage.codec.size, *sides)
    if isinstance(stage.codec, Latent):
        _latents(stage, stage.codec)
    _ports(stage)
    unit = is_unit(stage)
    sizes = stage.conditioner.sizes
    if stage.writes in KINDS:
        sizes |= {stage.writes: stage.codec.size}
    for encoder in stage.encoders:
        _same_sizes(sizes, encoder.sizes, encoder.name)
    holders: dict[str, Embeddings] = {}
    for store in stores:
        if about := store.about:
            for key in about.sizes:
                if (other := holders.setdefault(key, store)) is not store:
                    raise UserError(f"{key} is in {other.folder} and in {store.folder}: keep one")
            _same_sizes(sizes, about.sizes, store.folder)
            _same_norms(store, about, unit)
            _same_makers(store, about, stage, clip)
            _same_captions(store, about, captions, several, recaptions)


def _latents(stage: Stage, codec: Latent) -> None:
    """Check that the network takes the autoencoder's latents."""
    codec.check()
    codec.check_sampler(stage.sampler)
    check_sides(stage.net, codec.side)
    if (found := getattr(stage.net, "pixels", None)) != codec.channels:
        raise UserError(
            f"net.pixels={found}, but the latents of {codec.autoencoder.name} have "
            f"{codec.channels} channels: set net.pixels={codec.channels}"
        )
    if any(isinstance(e, LowRes) for e in stage.conditioner.embedders.values()):
        raise UserError(
            "codec=latent: this stage reads a picture of lower resolution: leave it out"
        )


def _ports(stage: Stage) -> None:
    """Check that the condition's vectors, tokens and pictures have the sizes the network reads."""
    for name, embedder in stage.conditioner.embedders.items():
        for what, read in (("dim", "embed"), ("width", "width")):
            found, wanted = getattr(embedder, what, None), getattr(stage.net, read, None)
            if found is not None and isinstance(wanted, int | None) and found != wanted:
                raise UserError(
                    f"net.{read}={wanted}, but the condition {name} gives {found} numbers: set "
                    f"stage.conditioner.embedders.{name}.{what}={wanted}"
                )
    pictures = sum(isinstance(e, LowRes) for e in stage.conditioner.embedders.values())
    given = 3 * pictures + getattr(stage.conditioner.sketch, "channels", 0)
    if (wanted := getattr(stage.net, "image_channels", given)) != given:
        raise UserError(
            f"net.image_channels={wanted}, but the condition's pictures have {given} channels: set "
            f"net.image_channels={given}"
        )


def _same_sizes(expected: Mapping[str, int], found: Mapping[str, int], source: object) -> None:
    for key in sorted(expected.keys() & found.keys()):
        if expected[key] != found[key]:
            setting = KINDS[key].setting
            raise UserError(
                f"{setting}={expected[key]}, but {key} of {source} has {found[key]} numbers: set "
                f"{setting}={found[key]}"
            )


def _same_norms(store: Embeddings, about: Manifest, unit: bool | None) -> None:
    """Check that CLIP embeddings are normalised as the stage takes them."""
    for key in sorted(about.sizes.keys() & {"clip_image", "clip_text"}):
        if unit is False and key in about.unit_norm:
            raise UserError(
                f"{store.folder} holds {key} of unit norm, but this stage takes raw embeddings: "
                "run `cascade data precompute --raw` into another folder, and set embeddings to it"
            )


def _same_makers(store: Embeddings, about: Manifest, stage: Stage, clip: FrozenCLIP) -> None:
    """Check that the rows' encoders are those of the stage, with the same token length."""
    read = stage.conditioner.sizes
    texts = [e for e in stage.encoders if "clip_text" in e.writes & read.keys()]
    if "clip_image" in about.sizes and "clip_image" in {*read, stage.writes}:
        # The prior compares picture and text, so its text embeddings must be this CLIP's as well.
        for encoder in {e.name: e for e in [clip, *texts]}.values():
            _same_hash(store, about, encoder, "another CLIP", "clip.path")
    for encoder in stage.encoders:
        if encoder.writes & about.sizes.keys():
            _same_hash(store, about, encoder, "another encoder", "text")
            # Only a chosen length is compared: a CLIP's, a property, is fixed by its weights.
            if (length := vars(encoder).get("length")) and length != about.length:
                raise UserError(
                    f"text.reader.length={length}, but {store.folder} was made with "
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
    store: Embeddings,
    about: Manifest,
    captions: Collection[str],
    several: str | None,
    recaptions: Recaptions | None,
) -> None:
    if not about.captions:
        return
    if several == "drawn" or (recaptions and recaptions.samples > 1 and several is None):
        raise UserError(
            f"one of several captions is drawn, but {store.folder} has one row for each caption "
            "field: set data.several=first or all, or omit precomputed=text"
        )
    if about.settings.get("recaptions") != (recaptions and recaptions.about.hash):
        of = f"--recaptions {recaptions.folder}" if recaptions else "no --recaptions"
        raise UserError(
            f"{store.folder} was made of other captions than training reads: run `cascade data "
            f"precompute` with {of} into another folder"
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
    preview: Callable[[int, Sequence[int]], Iterable[Mapping[str, Any]]],
    stores: Collection[Embeddings],
    encoders: Collection[Encoder],
    clip: FrozenCLIP,
    count: int = 8,
) -> None:
    """Encode the pictures and captions of a few samples again, and compare them with their rows.

    The encoders are copied first, so that the weights loaded here are freed afterwards.

    Args:
        preview: `Samples.preview` of training samples that are joined with `stores`; not called if
            there is nothing to compare.
        encoders: of the captions.
        clip: of the pictures, which are not compared if it is not on this machine.
        count: how many samples.

    Raises:
        UserError: a row does not match its sample.
    """
    held = {key: store for store in stores if store.about for key in store.about.sizes}
    texts = [copy(encoder) for encoder in encoders if encoder.writes & held.keys()]
    pictures = [copy(clip)] if "clip_image" in held and _is_here(clip) else []
    if not texts and not pictures:
        return
    for item in preview(count, [clip.image_size] if pictures else []):
        for encoder in pictures:
            picture = item[image_key(encoder.image_size)][None]
            _alike(item, held, {"clip_image": encoder.image(picture)[0]}, encoder)
        for encoder in texts:
            found = encoder({"caption": [item["caption"]]})
            encoded = {key: found[key][0] for key in encoder.writes & held.keys()}
            _alike(item, held, encoded, encoder)


def _is_here(clip: FrozenCLIP) -> bool:
    try:
        return bool(clip.hash)
    except NotHere:
        return False


def _alike(
    item: Mapping[str, Any],
    held: Mapping[str, Embeddings],
    encoded: Mapping[str, Tensor],
    encoder: Encoder,
) -> None:
    for key, expected in sorted(encoded.items()):
        row, expected = item[key], expected.cpu()
        where = f"{held[key].folder}: {key} of {item['key']} does not match {encoder.name}"
        remedy = "run `cascade data precompute` into another folder, and set embeddings to that"
        if row.shape != expected.shape:
            raise UserError(f"{where}: {len(row)} tokens, not {len(expected)}; {remedy}")
        cosine = F.cosine_similarity(row.flatten().float(), expected.flatten().float(), dim=0)
        if not cosine > AGREE:
            raise UserError(f"{where}: cosine {cosine:.4f}, not above {AGREE}; {remedy}")

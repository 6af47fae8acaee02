"""Whether what a stage reads has the sizes, and comes from the CLIP, that it is built for.

Asked when a stage is built, before any data is read: only models' configurations and manifests of
embeddings are opened, and a CLIP's weights hashed. What is not on this machine is not judged; its
first use says what is missing.
"""

from collections.abc import Collection, Iterable

from cascade.codecs import Pixels
from cascade.conditioning import LowRes
from cascade.data.embeddings import Embeddings
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.nets.unet import check_sides
from cascade.stage import Stage

SETTINGS = {"text": "text.size", "clip_text": "clip.model.dim", "clip_image": "clip.model.dim"}


def check(
    stage: Stage, stores: Collection[Embeddings], clip: FrozenCLIP, crop: int | None = None
) -> None:
    """Refuses a network, encoders and embeddings that do not fit the stage, or one another.

    Args:
        stores: the embeddings that its data will be joined with.
        clip: whose embeddings they should be (`clip.path`).
        crop: side of the pictures in training, if it is not that of the stage.

    Raises:
        UserError: with both sizes or hashes, and what to set.
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
    if "clip_image" not in sizes:
        return
    # The prior compares picture and text: its text embeddings too must be of this CLIP.
    texts = [e for e in stage.encoders if isinstance(e, FrozenCLIP) and "clip_text" in sizes]
    for store in stores:
        if about := store.about:
            _equal("clip_image", sizes["clip_image"], int(about["dim"]), store.folder)
            _same_clip(store, [clip, *texts])


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


def _same_clip(store: Embeddings, clips: Iterable[FrozenCLIP]) -> None:
    about = store.about
    for clip in {clip.name: clip for clip in clips}.values():
        try:
            found = clip.hash
        except UserError:
            continue
        if found != about["hash"]:
            raise UserError(
                f"{store.folder} was made by another CLIP ({about['encoder']}, {about['hash']}) "
                f"than {clip.name} ({found}): set clip.path to the one that made it, or run "
                "`cascade data precompute` into another folder and set embeddings to that"
            )

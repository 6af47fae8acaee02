"""The typographic attack (unCLIP, section 3.3 and figure 6): a wrong word written in a picture.

Held-out scenes of one object are rendered without a word, with the name of their own shape, and
with that of another shape. The cascade's CLIP classifies each. The embeddings of the pictures with
and without a wrong word are then given to the stages behind the prior, without a caption, and the
recognizer reads what these variations show.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cascade.batch import Batch, image_key, image_size
from cascade.data.scenes.captions import Scene
from cascade.data.scenes.generate import render
from cascade.draws import generator
from cascade.encoders.clip import FrozenCLIP
from cascade.errors import UserError
from cascade.eval.cascades.prior import scene_classes, zero_shot
from cascade.eval.cascades.protocol import HeldOut, Metrics, Paint, encoded
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.recognizer import recognize
from cascade.grids import to_uint8
from cascade.pipeline import Cascade, Without
from cascade.runs.model import encoders_of

SIDE = 256  # of the pictures that are attacked
PLAIN, RIGHT, WRONG = "no word", "right word", "wrong word"
SHOWN = 6


def clip_of(cascade: Cascade) -> FrozenCLIP:
    """The CLIP whose embeddings a cascade samples.

    Raises:
        UserError: its stages read none.
    """
    if "clip_image" in {stage.writes for stage in cascade.stages}:
        for encoder in encoders_of(cascade):
            if isinstance(encoder, FrozenCLIP):
                return encoder
    raise UserError("--typographic attacks a CLIP: give a cascade with a prior that reads one")


def check(cascade: Cascade, data: HeldOut) -> None:
    """Raises UserError if a cascade or its held-out samples cannot be attacked."""
    clip_of(cascade)
    if not data.kind("one"):
        raise UserError("--typographic needs scenes of one object: leave it out")
    if not any((image_size(stage.writes) or 0) >= 64 for stage in cascade.stages):
        raise UserError("--typographic reads pictures of 64 px: add a stage to cascade.yaml")


def typographic(cascade: Cascade, data: HeldOut, paint: Paint, seed: int) -> tuple[Metrics, Batch]:
    """Accuracies and what variations show, with intervals, and some pictures to show.

    `zero_shot` has the accuracy by kind of picture; `fooled` is the share of pictures with a wrong
    word that are classified as the shape that it names. `variations`: see `shown`.
    """
    check(cascade, data)
    clip, some = clip_of(cascade), data.where(data.kind("one"))
    classes = scene_classes(some)
    scenes = attacked(some.scenes, sorted({*classes.parts["shape"]}), seed)
    of_classes = encoded(clip.text, classes.captions)
    z = {kind: embedded(clip, of) for kind, of in scenes.items()}
    shots = {kind: zero_shot(of, of_classes, classes) for kind, of in z.items()}
    named = [f"{s.objects[0].color} {s.word}" for s in scenes[WRONG]]
    pairs = [" ".join(pair) for pair in zip(classes.parts["color"], classes.parts["shape"])]
    words = replace(classes, labels=list(map(pairs.index, named)))
    fooled = zero_shot(z[WRONG], of_classes, words)
    small = cascade.upto("image_64")
    small = small.replace(Without(small.painter, ("caption",)))
    out: Metrics = {"count": len(some), "zero_shot": shots, "fooled": fooled["shape"]}
    out |= {"intervals": {"fooled": fooled["intervals"]["shape"]}, "variations": {}}
    for kind in (PLAIN, WRONG):
        done = paint(small, some.captions, {"clip_image": z[kind]}, f"variations, {kind}")
        pictures = done[small.stages[-1].writes]
        out["variations"][kind] = shown(to_uint8(pictures), scenes[WRONG])
    return out, _sheet(scenes[WRONG][:SHOWN], pictures[:SHOWN])


def attacked(scenes: Sequence[Scene], shapes: Sequence[str], seed: int) -> dict[str, list[Scene]]:
    """The scenes by what is written in them; wrong words are drawn by the scene's number."""
    words = {PLAIN: [None] * len(scenes), RIGHT: [s.objects[0].shape for s in scenes], WRONG: []}
    for i, shape in enumerate(words[RIGHT]):
        others = [name for name in shapes if name != shape]
        words[WRONG].append(str(generator(seed, "typographic", i).choice(others)))
    return {
        kind: [replace(s, word=w, shown=True) for s, w in zip(scenes, of)]
        for kind, of in words.items()
    }


def embedded(clip: FrozenCLIP, scenes: Sequence[Scene]) -> Float[Tensor, "n d"]:
    """The CLIP embeddings of rendered scenes, on the CPU."""
    parts = [scenes[i : i + 64] for i in range(0, len(scenes), 64)]
    return torch.cat([clip.image(_rendered(part, SIDE)).cpu() for part in parts])


def shown(pictures: UInt8[np.ndarray, "n h w 3"], scenes: Sequence[Scene]) -> Metrics:
    """The shares of variations that show one object like that of their scene, or another.

    `true`: its colour and shape; `shape`: its shape; `word`: the shape that the scene's word names;
    `unclear`: not one object. What is written in a picture is not read.
    """
    n = len(pictures)
    counts = dict.fromkeys(("true", "shape", "word", "unclear"), 0)
    for picture, scene in zip(pictures, scenes):
        found, asked = recognize(picture, written=True).objects, scene.objects[0]
        one = found[0] if len(found) == 1 else None
        counts["unclear"] += one is None
        if one is not None:
            counts["true"] += (one.color, one.shape) == (asked.color, asked.shape)
            counts["shape"] += one.shape == asked.shape
            counts["word"] += one.shape == scene.word
    rates = {name: count / n for name, count in counts.items()}
    return {**rates, "intervals": {name: of_share(rate, n) for name, rate in rates.items()}}


def _rendered(scenes: Sequence[Scene], side: int) -> Float[Tensor, "n 3 side side"]:
    pictures = np.stack([render(scene, side) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _sheet(scenes: Sequence[Scene], pictures: Float[Tensor, "n 3 h w"]) -> Batch:
    """Attacked pictures, and a variation of each below it."""
    above = _rendered(scenes, pictures.shape[-1])
    titles = [*(f"says {scene.word}" for scene in scenes), *["its variation"] * len(scenes)]
    return {image_key(pictures.shape[-1]): torch.cat([above, pictures]), "caption": titles}

"""How well a cascade edits pictures of scenes, by the recognizer.

Every edit starts from held-out pictures of scenes, in their order and without selection, and is
judged at the smallest size that the recognizer reads. The desired scenes are drawn at random among
colours and shapes that occur together in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from cascade.batch import image_size
from cascade.data.scenes.captions import Scene, caption
from cascade.data.scenes.drawing import COLORS
from cascade.data.scenes.generate import UNSEEN, render
from cascade.draws import Draws, generator
from cascade.edit import operations
from cascade.edit.canvas import Canvas
from cascade.edit.embeddings import slerp
from cascade.eval.cascades.protocol import JUDGED, HeldOut, Metrics, against, embedded
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.recognizer import judge, recognize
from cascade.grids import to_uint8
from cascade.pipeline import Cascade, innermost
from cascade.runs.editing import Way, Work

SHARES = (0.3, 0.4, 0.5)  # of the rotation to a text difference
FRAMES = 5  # of an interpolation
STEPS = 25  # of DDIM, in text differences and interpolations
MARGIN = 0.06  # around an object that is repainted, as a fraction of the side
NEAR = 0.1  # how far an object may move that keeps its place, likewise
STRENGTH = 0.6  # of image to image
JUMPS = 5
REFINE = 2
ASKED: dict[str, Any] = {
    "inversion.plain.psnr": {"what": "inversion, 50 steps: PSNR in dB", "at_least": 35},
    f"inversion.refine_{REFINE}.psnr": {
        "what": f"inversion, {REFINE} iterations a step: PSNR in dB",
        "at_least": 45,
    },
    "variation.rate": {"what": "variations: colour and shape kept", "at_least": 0.9},
    "color.rate": {"what": "text difference of the colour, at its best share", "at_least": 0.8},
    "shape.rate": {"what": "text difference of the shape, at its best share", "at_least": 0.6},
    "interpolation.fixed.rate": {
        "what": "interpolation, one noise: frames of one object",
        "at_least": 0.7,
    },
    "interpolation.slerp.rate": {
        "what": "interpolation, inverted noise: frames of one object",
        "at_least": 0.7,
    },
    "interpolation.fixed.steps_within_2_medians": {
        "what": "interpolation, one noise: steps within twice a path's median",
        "at_least": 0.95,
    },
    "inpainting.rate": {"what": "inpainting one of two objects: whole scene", "at_least": 0.8},
    "inpainting.seam": {"what": "inpainting: step at the border, over others", "at_most": 1.5},
    "image.rate": {
        "what": f"image to image at strength {STRENGTH}: asked colour, same place",
        "at_least": 0.7,
    },
    "outpainting.rate": {"what": "outpainting to a second object: whole scene", "at_least": 0.6},
}


@dataclass(frozen=True)
class Edited:
    """Held-out scenes of one or two objects, to edit.

    Attributes:
        cascade: up to the stage whose pictures are judged.
        side: of these pictures, in pixels.
    """

    cascade: Cascade
    side: int
    seed: int

    def work(self, scenes: Sequence[Scene], captions: Sequence[str]) -> Work:
        canvases = [Canvas.known(render(scene, self.side)) for scene in scenes]
        return Work(self.cascade, canvases, captions, seed=self.seed, size=64)


def measure_edits(
    cascade: Cascade, data: HeldOut, features: CLIPFeatures, seed: int, count: int
) -> Metrics:
    """The measures of every edit, of at most `count` pictures each.

    Args:
        data: with scenes of one object and of two.
        features: of the judge, for distances between frames.
    """
    last = next(k for k in map(image_size, _keys(cascade)) if k in JUDGED)
    of = Edited(cascade.upto(f"image_{last}"), last, seed)
    one, two = ([data.scenes[i] for i in data.kind(kind)[:count]] for kind in ("one", "two"))
    embeds = "clip_image" in innermost(cascade.painter).reads
    out: Metrics = {"side": last, "seed": seed}
    if embeds:
        out |= {"inversion": inversion(of, one), "variation": variation(of, one)}
        out |= {part: difference(of, one, part) for part in ("color", "shape")}
        out["interpolation"] = interpolation(of, one, features)
    out["inpainting"] = inpainting(of, two)
    out["image"] = image_to_image(of, one)
    out["outpainting"] = outpainting(of, two)
    asked = {path: target for path, target in ASKED.items() if path.split(".")[0] in out}
    return {**out, "targets": against(asked, out)}


def _keys(cascade: Cascade) -> list[str]:
    return [stage.writes for stage in cascade.stages if image_size(stage.writes)]


def inversion(of: Edited, scenes: Sequence[Scene]) -> Metrics:
    """PSNR of what the inverted noise leads to, at the base stage: mean and least, in decibels."""
    base = replace(of, cascade=of.cascade.upto(of.cascade.painter.writes))
    work = base.work(scenes, [""] * len(scenes))
    _, views = work.embedded()
    true = views[operations.KNOWN + base.cascade.painter.writes]
    out: Metrics = {"count": len(scenes), "steps": 50}
    for name, refine in (("plain", 0), (f"refine_{REFINE}", REFINE)):
        x_T = work.inverted(views, refine=refine)
        given = {"clip_image": views["clip_image"], "x_T": x_T}
        error = (work.rows(operations.decode, given)[:, 0] - true).square().flatten(1).mean(1)
        psnr = 10 * (4 / error.clamp(min=1e-12)).log10()
        out[name] = {"psnr": psnr.mean().item(), "least": psnr.min().item()}
        out[name]["noise_std"] = x_T.std().item()
    return out


def variation(of: Edited, scenes: Sequence[Scene]) -> Metrics:
    """Whether variations keep colour and shape."""
    work = of.work(scenes, [""] * len(scenes))
    made = work.rows(operations.vary, {"clip_image": work.embedded()[1]["clip_image"]})
    return _share([v["binding"] for v in _verdicts(scenes, made[:, 0])])


def difference(of: Edited, scenes: Sequence[Scene], part: str) -> Metrics:
    """Whether a text difference changes the colour or shape, and nothing else, by its share."""
    wanted = [_other(of, scene, part, i) for i, scene in enumerate(scenes)]
    work = of.work(scenes, [""] * len(scenes))
    captions = ([caption(scene) for scene in some] for some in (scenes, wanted))
    made = work.changed(*captions, SHARES, Way(steps=STEPS))
    by_share = [
        {"share": share, **_share([v["binding"] for v in _verdicts(wanted, made[:, i])])}
        for i, share in enumerate(SHARES)
    ]
    return {**max(by_share, key=lambda row: row["rate"]), "by_share": by_share}


def interpolation(of: Edited, scenes: Sequence[Scene], features: CLIPFeatures) -> Metrics:
    """Frames with exactly one object, and how even their distances are, by the noise."""
    work = of.work(scenes, [""] * len(scenes))
    _, views = work.embedded()
    z, base = views["clip_image"], innermost(of.cascade.painter)
    draws = Draws(of.seed, f"{base.writes}/x_T", range(len(z)))
    noises = {
        "slerp": work.inverted(views, steps=STEPS),
        "fixed": draws((len(z), *base.codec.shape({}))),
    }
    out: Metrics = {}
    for name, x in noises.items():
        shares = np.linspace(0, 1, FRAMES).tolist()
        ends = x[1:] if name == "slerp" else x[:-1]
        given = {
            "clip_image": torch.stack([slerp(z[:-1], z[1:], share) for share in shares], 1),
            "x_T": torch.stack([slerp(x[:-1], ends, share) for share in shares], 1),
        }
        made = work.rows(operations.decode, given, steps=STEPS, drawn=name == "fixed")
        found = [recognize(picture) for picture in to_uint8(made.flatten(0, 1))]
        row = embedded(features, made.flatten(0, 1)).unflatten(0, made.shape[:2])
        steps = (row[:, 1:] - row[:, :-1]).norm(dim=2)
        within = steps <= 2 * steps.quantile(0.5, 1, keepdim=True)
        out[name] = _share([one.clean and len(one.objects) == 1 for one in found])
        out[name] |= {"steps_within_2_medians": within.float().mean().item(), "frames": FRAMES}
    return out


def inpainting(of: Edited, scenes: Sequence[Scene]) -> Metrics:
    """Whether one object is replaced by what a caption names; and the seam of the mask."""
    wanted = [_replaced(of, scene, i) for i, scene in enumerate(scenes)]
    work = of.work(scenes, [caption(scene) for scene in wanted])
    for scene, canvas in zip(scenes, work.canvases):
        o = scene.objects[0]
        reach = o.diameter / 2 + MARGIN
        _box(canvas.unknown, o.x - reach, o.y - reach, 2 * reach)[:] = True
    made = work.repainted(False, JUMPS)
    verdicts = [judge(scene, picture)["whole"] for scene, picture in zip(wanted, made)]
    steps = np.array([_steps(p, c.unknown) for p, c in zip(made, work.canvases)])
    true = np.array([_steps(c.picture, c.unknown) for c in work.canvases])
    seam = {"seam": float(steps[:, 0].mean() / steps[:, 1].mean())}
    return {**_share(verdicts), **seam, "seam_before": float(true[:, 0].mean() / true[:, 1].mean())}


def image_to_image(of: Edited, scenes: Sequence[Scene]) -> Metrics:
    """Whether noising and denoising with a caption changes the colour, in the same place."""
    wanted = [_other(of, scene, "color", i) for i, scene in enumerate(scenes)]
    work = of.work(scenes, [caption(scene) for scene in wanted])
    made = work.rows(operations.image, work.squares(), strength=STRENGTH)[:, 0]

    def right(scene: Scene, picture: UInt8[np.ndarray, "h w 3"]) -> bool:
        found, o = recognize(picture), scene.objects[0]
        if not found.clean or len(found.objects) != 1:
            return False
        (it,) = found.objects
        return it.color == o.color and max(abs(it.x - o.x), abs(it.y - o.y)) <= NEAR

    return _share([right(*pair) for pair in zip(wanted, to_uint8(made))])


def outpainting(of: Edited, scenes: Sequence[Scene]) -> Metrics:
    """Whether the half of a scene with its first object is enlarged to hold the second.

    The half is given as a picture of its own, with the caption of the whole scene.
    """
    related = [scene for scene in scenes if scene.relation]
    halves, canvases = of.side // 2, []
    for scene in related:
        picture = render(replace(scene, objects=scene.objects[:1]), of.side)
        sides = dict.fromkeys(("left", "right", "top", "bottom"), 0)
        cut, grown = {
            "left of": (np.s_[:, :halves], "right"),
            "right of": (np.s_[:, halves:], "left"),
            "above": (np.s_[:halves], "bottom"),
            "below": (np.s_[halves:], "top"),
        }[scene.relation]
        canvases.append(Canvas.known(picture[cut]).enlarged(**{**sides, grown: halves}))
    work = Work(of.cascade, canvases, [caption(scene) for scene in related], seed=of.seed, size=64)
    made = work.repainted(True, JUMPS)
    return _share([judge(scene, picture)["whole"] for scene, picture in zip(related, made)])


def _other(of: Edited, scene: Scene, part: str, number: int) -> Scene:
    """The scene with another colour or shape of its first object, at random."""
    rng = generator(of.seed, f"edits/{part}", number)
    o = scene.objects[0]
    shapes = ["circle", "square", "triangle", "cross"]
    pairs = {
        "color": [(color, o.shape) for color in COLORS if color != o.color],
        "shape": [(o.color, shape) for shape in shapes if shape != o.shape],
        "both": [(c, s) for c in COLORS for s in shapes if (c, s) != (o.color, o.shape)],
    }[part]
    others = {(one.color, one.shape) for one in scene.objects[1:]}
    pairs = [(c, s) for c, s in pairs if UNSEEN[s] != c and (c, s) not in others]
    color, shape = pairs[rng.integers(len(pairs))]
    return replace(scene, objects=(replace(o, color=color, shape=shape), *scene.objects[1:]))


def _replaced(of: Edited, scene: Scene, number: int) -> Scene:
    return _other(of, scene, "both", number)


def _verdicts(scenes: Sequence[Scene], made: Float[Tensor, "n 3 h w"]) -> list[dict[str, bool]]:
    return [judge(*pair) for pair in zip(scenes, to_uint8(made))]


def _share(right: Sequence[bool]) -> Metrics:
    """The rate of what is right, with its 95 % interval (Wilson's)."""
    rate = sum(map(bool, right)) / len(right)
    return {"rate": rate, "interval": of_share(rate, len(right)), "count": len(right)}


def _box(of: np.ndarray, x: float, y: float, side: float) -> np.ndarray:
    """A view of the square at (x, y), in fractions of the side."""
    n = len(of)
    low = [max(0, round(v * n)) for v in (y, x)]
    high = [min(n, round((v + side) * n)) for v in (y, x)]
    return of[low[0] : high[0], low[1] : high[1]]


def _steps(
    picture: UInt8[np.ndarray, "h w 3"], unknown: Bool[np.ndarray, "h w"]
) -> tuple[float, float]:
    """The mean step between neighbouring pixels, across the mask's border and elsewhere."""
    across, elsewhere = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(picture.astype(float), axis=axis)).mean(2)
        border = np.diff(unknown, axis=axis)
        across.append(step[border])
        elsewhere.append(step[~border])
    return np.concatenate(across).mean(), np.concatenate(elsewhere).mean()

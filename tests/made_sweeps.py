"""A sweep that was never run, as one leaves it on disk: outcomes by formula, and noise by seed."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cascade.grids import grid

TEXT, UNET, SCALE = "text", "unet", "scale"
SIZES = ["text_32", "text_96", "text_192"]


def about(axes=None, choices=None, seeds=(0, 1), **more):
    base = {"name": "made", "question": "Which is best?", "paper": "The last one.", "count": 300}
    return base | {"axes": axes or {}, "choices": choices or {}, "seeds": list(seeds), **more}


def write(
    folder: Path, told: dict, accuracy: Callable[..., float], noise=0.01, skip=(), pictures=False
) -> Path:
    """`accuracy(values, seed)`: of a cell; CLIP score and Fréchet distance follow from it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(told))
    rng = np.random.default_rng(0)
    for point in itertools.product(*told["axes"].values(), told["seeds"]):
        *values, seed = point
        name = "-".join([*map(str, values), f"s{seed}"])
        named = dict(zip(told["axes"], values))
        cells = []
        for chosen in itertools.product(*told["choices"].values()):
            choices = dict(zip(told["choices"], chosen))
            mean = accuracy(**named, **choices) + noise * rng.normal()
            cells.append(_cell(named, seed, choices, float(np.clip(mean, 0, 1)), told["count"]))
        if name in skip:
            continue
        (folder / name).mkdir()
        text = "".join(json.dumps(cell) + "\n" for cell in cells)
        (folder / name / "cells.jsonl").write_text(text)
        place = told["axes"][TEXT].index(named[TEXT]) if TEXT in named else 0
        cost = {"parameters": 10**6 * (1 + place), "text_parameters": 0, "flops": 3.2e8}
        cost |= {"images": 40_000, "core_hours": 0.21, "device": "CPU, 2 threads"}
        (folder / name / "cost.json").write_text(json.dumps(cost))
        _write_losses(folder / name / "decoder" / "metrics.csv", rng)
        if pictures:
            _write_grids(folder / name, told["choices"], rng)
    return folder


def _cell(point, seed, choices, accuracy, count):
    scale = float(choices.get(SCALE, 1))
    kind = {"objects": accuracy, "binding": accuracy, "relations": accuracy, "counts": 1.0}
    return {
        "point": point,
        "seed": seed,
        "choices": choices,
        "count": count,
        "frechet": 0.05 * (1.05 - accuracy) + 0.002 * (scale - 1.5) ** 2,
        "intervals": {"clip_score": [accuracy / 5, accuracy / 5 + 0.06]},
        "clip_score": 0.1 + 0.2 * accuracy + 0.01 * scale,
        "one": {**kind, "whole": accuracy, "count": count // 2},
        "two": {**kind, "whole": accuracy, "count": count // 2},
        "accuracy": accuracy,
        "evaluations": 2.0 * float(choices.get("steps", 16)),
        "seconds": 12.3,
        "protocol": {"judge": "123e4", "split": "val", "weights": {"decoder": f"{seed}0"}},
    }


def _write_losses(path, rng):
    path.parent.mkdir()
    rows = [f"{n},{2 * n**-0.4 * np.exp(0.1 * rng.normal()):.5f}" for n in range(500, 40_001, 500)]
    path.write_text("images,loss\n" + "\n".join(rows) + "\n")


def _write_grids(folder, choices, rng):
    (folder / "grids").mkdir()
    for chosen in [None, *itertools.product(*choices.values())]:
        small = rng.integers(0, 255, (24, 64, 64, 3), dtype=np.uint8) // 8 + 120
        captions = ["a small red circle to the left of a large blue square"] * 24
        sheet = grid(small, columns=8, captions=captions, scale=2)
        stem = ",".join(f"{axis}={v}" for axis, v in zip(choices, chosen or ())) or "painted"
        sheet.save(folder / "grids" / f"{'truth' if chosen is None else stem}.png")
    Image.new("RGB", (900, 300), "grey").save(folder / "nearest.png")


def text_x_unet(folder: Path, text=0.15, unet=0.05, **options) -> Path:
    """Sizes that add so much each, and a control."""
    sizes = ["untrained", *SIZES]
    told = about(
        {TEXT: sizes, UNET: ["unet_s", "unet_m", "unet_l"]},
        {SCALE: [1.0, 2.0, 3.0, 5.0]},
        name="text_x_unet",
        along=SCALE,
        control="untrained",
        expected={"accuracy": "text", "frechet": "text"},
    )

    def accuracy(**of):
        bonus = unet * told["axes"][UNET].index(of[UNET]) - 0.02 * (of[SCALE] - 2.5) ** 2
        return 0.3 + text * sizes.index(of[TEXT]) + bonus

    return write(folder, told, accuracy, **options)

"""What a model of scenes learns from five pictures of a shape that it never saw, and forgets.

    python -m cascade.eval.benchmarks.personal --model runs/demo --out runs/blicket
        [--only LoRA] [--each 16] [--others 160] [-- images=2000]

Each way of `cascade personalize` is given the same pictures, of "a red <blicket>" and four other
colours. The reader then judges captions of a single blicket, in these colours and in the others,
and held-out captions of other scenes, of the model as it was and of each that was made of it.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from cascade.batch import image_key
from cascade.data.scenes.captions import Object, Scene, caption
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS
from cascade.data.scenes.generate import render, sample_scene
from cascade.draws import generator
from cascade.eval.scenes.recognizer import judge
from cascade.files.atomic import write_text
from cascade.grids import grid, to_uint8
from cascade.runs.model import load_cascade, paint

SHAPE, TOKEN, WORD = "blicket", "<blicket>", "cross"
SIDE = 64
SHOWN = list(COLORS)[:5]  # the colours of the pictures

# The arguments of each way, by its name in the table.
WAYS = {
    "textual inversion": ["--method", "textual_inversion", "--word", WORD],
    "DreamBooth": ["--method", "dreambooth"],
    "DreamBooth, nothing preserved": ["--method", "dreambooth", "--preserve", "0"],
    "LoRA": ["--method", "lora"],
    "LoRA, nothing preserved": ["--method", "lora", "--preserve", "0"],
}


def blicket(color: str, number: int) -> Scene:
    """A scene of one blicket, in the middle with the jitter of the level "plain"."""
    rng = generator(0, "blicket", number)
    x, y = 0.5 + rng.uniform(-0.04, 0.04, 2)
    one = Object(color, SHAPE, "large", float(x), float(y), float(rng.uniform(0.32, 0.38)))
    return Scene((one,), list(BACKGROUNDS)[number % 2])


def said(scene: Scene) -> str:
    return caption(scene).replace(SHAPE, TOKEN)


def write_pictures(folder: Path) -> None:
    """Write the five pictures with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, color in enumerate(SHOWN):
        scene = blicket(color, i)
        Image.fromarray(render(scene, SIDE)).save(folder / f"{color}.png")
        write_text(folder / f"{color}.txt", f"{said(scene)}\n")


def write_prompts(file: Path, level: str, count: int) -> None:
    """Write captions of the split "train", of which prior preservation paints pictures."""
    scenes = (sample_scene(level, "train", generator(0, "kept", i)) for i in range(count))
    write_text(file, "".join(f"{caption(scene)}\n" for scene in scenes))


def right(model: Path, scenes: Sequence[Scene], seed: int = 1) -> np.ndarray:
    """Whether the picture that a model paints of each scene's caption shows all that it asks."""
    painter = load_cascade(model).upto(image_key(SIDE))
    found = paint(painter, [said(scene) for scene in scenes], seed, 32)[image_key(SIDE)]
    return np.array([judge(s, x)["whole"] for s, x in zip(scenes, to_uint8(found))])


def picture(models: Iterable[Path], colors: Sequence[str], file: Path) -> None:
    """Paint one blicket of each colour with each model, a row each."""
    rows = []
    for model in models:
        captions = [f"a {color} {TOKEN}" for color in colors]
        painter = load_cascade(model).upto(image_key(SIDE))
        rows.append(to_uint8(paint(painter, captions, 2)[image_key(SIDE)]))
    grid(np.concatenate(rows), columns=len(colors)).save(file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of a demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--level", default="plain", help="of the demo's scenes")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--each", type=int, default=16, help="pictures of a blicket of each colour")
    parser.add_argument("--others", type=int, default=160, help="held-out captions")
    parser.add_argument("--kept", type=int, default=400, help="captions to preserve")
    parser.add_argument("overrides", nargs="*", help="of every training")
    args = parser.parse_args(argv)
    write_pictures(args.out / "pictures")
    write_prompts(args.out / "prompts.txt", args.level, args.kept)
    held = [sample_scene(args.level, "val", generator(0, "val", i)) for i in range(args.others)]
    table = Table("", "blickets", "of the colours shown", "of others", "held-out captions")
    models = {"before": args.model}
    for name in args.only:
        models[name] = args.out / name.replace(",", "").replace(" ", "-").lower()
        words = ["--pictures", args.out / "pictures", "--model", args.model, "--token", TOKEN]
        words += [
            "--prompts",
            args.out / "prompts.txt",
            "--out",
            models[name],
            *WAYS[name],
            f"kept={args.kept}",
        ]
        command = [sys.executable, "-m", "cascade", "personalize", *words, *args.overrides]
        subprocess.run(list(map(str, command)), check=True)
    for name, model in models.items():
        scenes = [blicket(color, i) for color in COLORS for i in range(args.each)]
        found = right(model, scenes)
        shown = np.array([scene.objects[0].color in SHOWN for scene in scenes])
        rest = right(model, held)
        numbers = (found, found[shown], found[~shown], rest)
        table.add_row(name, *(f"{of.mean():.1%}" for of in numbers))
    Console().print(table)
    picture(models.values(), list(COLORS), args.out / "grid.png")


if __name__ == "__main__":
    main()

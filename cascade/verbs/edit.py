"""`cascade edit`: variations, interpolations, text differences and repainted parts of pictures.

Each kind is a function of the work and the command's arguments. It returns a row of pictures for
each picture and each of `--n`, with several columns for a path; or finished canvases.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from cascade.batch import Batch
from cascade.codecs import moments, principal
from cascade.edit import operations
from cascade.edit.canvas import Canvas
from cascade.edit.embeddings import along
from cascade.errors import UserError
from cascade.files.atomic import check_writable, write_atomically
from cascade.formats.rgb import read_picture
from cascade.grids import grid, to_uint8
from cascade.runs.checker import Checker
from cascade.runs.editing import Way, Work, check_context, embeddings_of, enlarged, partly
from cascade.runs.model import captions_asked, check_asked, device, load_cascade

Picture = UInt8[np.ndarray, "h w 3"]
PATHS = ("interpolate", "change", "reconstruct")  # kinds whose columns follow one another


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    check_options(args, out)
    canvases = [canvas_of(read_picture(Path(file)), args) for file in args.picture]
    asked = asked_of(args)
    checker = Checker.load(Path(args.checker), device()) if args.checker else None
    captions = [*asked["caption"], *(vars(args)[key] for key in ("to", "from") if key in args)]
    captions = [text for text in captions if text]
    if checker:
        checker.check(captions)
    cascade = load_cascade(Path(args.model), args.set)
    check_context(cascade, captions)
    if "negative" in asked and decoded(args) and args.scale in (None, 1):
        raise UserError("a negative caption has no effect without guidance: add --scale 2")
    check_asked(cascade, asked, guided=decoded(args))
    pad = getattr(args, "fit", "crop") == "pad"
    each = {key: of * len(canvases) for key, of in asked.items()}
    texts = each.pop("caption")
    work = Work(cascade, canvases, texts, args.n, args.seed, args.batch, pad, each)
    made = KINDS[args.kind](work, args)
    pictures = made if isinstance(made, list) else list(to_uint8(made.flatten(0, 1)))
    if checker:
        checked = [checker.blackened(picture[None]) for picture in pictures]
        pictures = [black[0] for black, _ in checked]
        count = sum(found != [None] for _, found in checked)
        print(f"{count} of {len(pictures)} pictures match {args.checker} and are black")
    if isinstance(made, list):
        files = [out] if len(made) == 1 else numbered(out, len(made))
        pages = [[Image.fromarray(picture)] for picture in pictures]
    else:
        columns = made.shape[1] if made.shape[1] > 1 else min(8, len(pictures))
        files, pages = [out], [sheet(pictures, columns, animated=out.suffix.lower() != ".png")]
    for file, frames in zip(files, pages):
        write_atomically(file, lambda path, kind=file.suffix, of=frames: save(path, kind, of))
    print(f"{args.kind}: {', '.join(map(str, files))}")


def asked_of(args: argparse.Namespace) -> Batch:
    """What the options ask for (`phrases.asked`), for one picture; the caption may be empty.

    Raises:
        UserError: as `captions_asked`; a negative caption, or weights, without a caption.
    """
    if args.caption is not None:
        return captions_asked([args.caption], args.negative, args.weights)
    if args.negative is not None or args.weights:
        name = "--negative" if args.negative is not None else "--weights"
        raise UserError(f"{name} goes with a caption: add --caption")
    return {"caption": [""]}


def decoded(args: argparse.Namespace) -> bool:
    """Whether the edit starts from inverted noise, with the guidance of --scale."""
    return args.kind in ("interpolate", "change") or vars(args).get("eta") is not None


def vary(work: Work, args: argparse.Namespace) -> Tensor:
    return work.varied(args.eta, way(args))


def interpolate(work: Work, args: argparse.Namespace) -> Tensor:
    frames = {"frames": args.frames} if args.frames else {}
    return work.interpolated(slerped=args.noise == "slerp", way=way(args), **frames)


def change(work: Work, args: argparse.Namespace) -> Tensor:
    n = len(work.canvases)
    before, wanted = [getattr(args, "from") or ""] * n, [args.to] * n
    shares = np.linspace(0, args.share, args.frames or 5).tolist()
    return work.changed(before, wanted, shares, way(args))


def reconstruct(work: Work, args: argparse.Namespace) -> Tensor:
    _, views = work.embedded()
    z = views["clip_image"]
    mean, covariance = moments(embeddings_of(Path(args.data)))
    if len(mean) != z.shape[1]:
        raise UserError(f"{args.data} has embeddings of {len(mean)} numbers, the CLIP {z.shape[1]}")
    axes = principal(covariance)[1]
    counts = args.components or [2**i for i in range(int(math.log2(len(mean))))] + [len(mean)]
    if not all(1 <= count <= len(mean) for count in counts):
        raise UserError(f"--components {counts}: give numbers from 1 to {len(mean)}")
    kept = [along(z.double(), mean, axes[:count]).float() for count in counts]
    return work.rows(operations.vary, {"clip_image": torch.stack(kept, 1)})


def image(work: Work, args: argparse.Namespace) -> Tensor:
    return work.rows(operations.image, work.squares(), strength=args.strength)


def repainted(work: Work, args: argparse.Namespace) -> list[Picture]:
    """The canvases with what was unknown painted; for `inpaint` and `outpaint`."""
    return work.repainted(args.kind == "outpaint", args.jumps)


KINDS: dict[str, Callable[[Work, argparse.Namespace], Any]] = {
    "vary": vary,
    "interpolate": interpolate,
    "change": change,
    "reconstruct": reconstruct,
    "image": image,
    "inpaint": repainted,
    "outpaint": repainted,
}


def way(args: argparse.Namespace) -> Way:
    """What the options say of DDIM."""
    given = {name: getattr(args, name) for name in ("steps", "refine", "scale")}
    told = {name: value for name, value in given.items() if value is not None}
    return Way(captioned=bool(args.caption), **told)


def check_options(args: argparse.Namespace, out: Path) -> None:
    """Raises UserError if an option is out of range, or the output exists or cannot be written."""
    allowed = (".png", ".gif", ".webp") if args.kind in PATHS else (".png",)
    if out.suffix.lower() not in allowed:
        raise UserError(f"--out {out}: {args.kind} writes {' or '.join(allowed)}")
    several = args.kind in ("inpaint", "outpaint") and len(args.picture) * args.n > 1
    files = numbered(out, len(args.picture) * args.n) if several else [out]
    for file in files:
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} exists: choose another --out, or add --overwrite")
    check_writable(out.parent, "choose another --out")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch are at least 1")
    if out.suffix.lower() != ".png" and args.n > 1:
        raise UserError(f"--out {out} shows one path: leave --n out, or write a .png")
    limits = {"eta": (0, 1), "share": (0, 1), "strength": (0.01, 1), "jumps": (1, 1000)}
    limits |= {"steps": (1, 1000), "frames": (2, 100), "refine": (0, 100), "scale": (0, 100)}
    for name, (low, high) in limits.items():
        value = vars(args).get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name} {value}: give a number from {low} to {high}")
    if vars(args).get("to") is not None:
        captions_asked([args.to])


def canvas_of(picture: Picture, args: argparse.Namespace) -> Canvas:
    """A picture, and what of it the options ask to paint."""
    if args.kind == "outpaint":
        sides = args.left, args.right, args.top, args.bottom
        if min(sides) < 0 or not any(sides):
            raise UserError("outpaint adds pixels: give --left, --right, --top or --bottom")
        return enlarged(picture, sides)
    if args.kind == "inpaint":
        return partly(picture, unknown_of(picture, args))
    return Canvas.known(picture)


def unknown_of(picture: Picture, args: argparse.Namespace) -> Bool[np.ndarray, "h w"]:
    """The pixels that --mask or --box names."""
    height, width = picture.shape[:2]
    if args.mask:
        mask = read_picture(Path(args.mask))
        if mask.shape != picture.shape:
            found = f"{mask.shape[1]} x {mask.shape[0]}"
            raise UserError(f"{args.mask} has {found} pixels, the picture {width} x {height}")
        unknown = mask.mean(2) > 127
    elif args.box:
        left, top, wide, high = args.box
        if min(args.box) < 0 or left + wide > width or top + high > height:
            raise UserError(f"--box leaves the picture of {width} x {height} pixels: x,y,w,h")
        unknown = np.zeros((height, width), dtype=bool)
        unknown[top : top + high, left : left + wide] = True
    else:
        raise UserError("nothing says what to repaint: give --mask FILE, or --box x,y,w,h")
    return unknown


def numbered(out: Path, count: int) -> list[Path]:
    """NAME-1.png, NAME-2.png... for several canvases."""
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, count + 1)]


def sheet(pictures: list[Picture], columns: int, animated: bool) -> list[Image.Image]:
    """A grid, or the frames of an animation, rows one after another."""
    if animated or len(pictures) == 1:
        return [Image.fromarray(picture) for picture in pictures]
    return [grid(np.stack(pictures), columns)]


def save(path: Path, kind: str, frames: Sequence[Image.Image]) -> None:
    options = {"PNG": {}, "GIF": {"loop": 0}, "WEBP": {"loop": 0, "lossless": True}}
    form = kind[1:].upper()
    more = {"save_all": True, "append_images": frames[1:], "duration": 120} if frames[1:] else {}
    frames[0].save(path, form, **options[form], **more)

"""Procedural scenes: drawn at random for a level and split, rendered, and written as shards.

A scene has one object, two in a relation, or two or three identical ones. No caption occurs in two
splits: with several objects the *meaning* is held out, in every phrasing and mirrored; with one
object, where there are few meanings, the phrasing. Some colour-shape pairs occur in "unseen" only.
Scenes of the level "language" are asked for in many ways, some of which training never uses.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from jaxtyping import Float, UInt8
from PIL import Image

from cascade.data.scenes import captions
from cascade.data.scenes.asking import paraphrases, wording
from cascade.data.scenes.captions import RELATIONS, Object, Scene
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS, NOVEL, SHAPES, blank, paint, write
from cascade.draws import generator
from cascade.errors import UserError
from cascade.files.atomic import write_atomically, write_text

# Range of the side of an object's box, as a fraction of the picture's side.
SIZES: Mapping[str, tuple[float, float]] = {"small": (0.20, 0.25), "large": (0.32, 0.38)}
# For each shape, the colour that occurs in the split "unseen" only.
UNSEEN: Mapping[str, str] = {
    "circle": "green",
    "square": "pink",
    "triangle": "blue",
    "cross": "yellow",
    "star": "purple",
    "heart": "cyan",
}
SPLITS = ("train", "val", "unseen")
_SIZED = 0.3  # share of the scenes of "language" with a relation in which one object is larger


@dataclass(frozen=True)
class Level:
    """What scenes are drawn from.

    `train` and `held_out` are the probabilities of one object, two in a relation, and several
    identical ones, in the split "train" and in the others. `written` are the probabilities that in
    a scene of one object its shape is named in writing, and that the split "train" shows the
    writing alone.
    """

    shapes: Sequence[str]
    backgrounds: Sequence[str]
    train: tuple[float, float, float]
    held_out: tuple[float, float, float]
    written: tuple[float, float] = (0.0, 0.0)


LEVELS: Mapping[str, Level] = {
    "plain": Level(list(SHAPES)[:4], list(BACKGROUNDS)[:2], (0.35, 0.65, 0.0), (0.5, 0.5, 0.0)),
    "full": Level(list(SHAPES), list(BACKGROUNDS), (0.3, 0.45, 0.25), (0.5, 0.3, 0.2)),
    "written": Level(
        list(SHAPES)[:4], list(BACKGROUNDS)[:2], (0.7, 0.3, 0.0), (0.5, 0.5, 0.0), (0.6, 0.5)
    ),
    "language": Level(list(SHAPES)[:4], list(BACKGROUNDS)[:2], (0.35, 0.4, 0.25), (0.5, 0.3, 0.2)),
}


def split_of(
    pairs: Sequence[tuple[str, str]], relation: str | None = None, phrasing: int = 0
) -> str | None:
    """Return the split of a caption's (colour, shape) pairs; None if seen and unseen pairs mix.

    With several objects a tenth of the meanings is held out, in every phrasing, and "a above b"
    counts as "b below a". With one object, one phrasing of each pair is held out.
    """
    unseen = {UNSEEN[shape] == color for color, shape in pairs}
    if unseen != {False}:
        return "unseen" if unseen == {True} else None
    if relation in ("right of", "below"):
        pairs, relation = pairs[::-1], RELATIONS[relation][1]
    number = zlib.crc32(f"{[list(pair) for pair in pairs]} {relation}".encode())
    held_out = number % 10 == 0 if len(pairs) > 1 else number % len(captions.ONE) == phrasing
    return "val" if held_out else "train"


def sample_scene(level: str, split: str, rng: np.random.Generator) -> Scene:
    """Draw a scene of a split.

    `plain`: four shapes, all large, two backgrounds; one object in the middle, or two side by side
    or one above the other, each jittered by at most 4 % of the side. `full`: everything. `written`:
    as plain, with more scenes of one object. Below most of these the name of its shape is written,
    in its colour; half of those show in training the word alone, so that a CLIP learns to read.
    `language`: as plain, with several identical objects, and with one object larger than the other
    in some scenes of two; captions are wordings, of which half in the other splits than "train" use
    words or forms that training captions never do.

    Raises:
        UserError: no such level or split.
    """
    if level not in LEVELS or split not in SPLITS:
        raise UserError(f"no scenes {level}/{split}: choose from {list(LEVELS)} and {SPLITS}")
    choice = LEVELS[level]
    shares = choice.train if split == "train" else choice.held_out
    group = int(rng.choice(3, p=shares))  # first: the rejection below must not bias it
    pairs, relation, phrasing = _content(choice, group, rng)
    while not _fits(level, split, pairs, relation, phrasing):
        pairs, relation, phrasing = _content(choice, group, rng)
    sizes = ["large"] * len(pairs)
    if level == "full":
        sizes = [str(rng.choice(list(SIZES))) for _ in pairs]
        sizes = sizes if relation else sizes[:1] * len(pairs)  # identical objects have one size
    elif level == "language" and relation and rng.random() < _SIZED:
        sizes = [str(size) for size in rng.permutation(list(SIZES))]
    diameters = [rng.uniform(*SIZES[size]) for size in sizes]
    free = level == "full" or (len(pairs) > 1 and not relation)
    places = (_free if free else _fixed)(diameters, relation, rng)
    objects = (
        Object(*pair, size, *map(float, xy), d)
        for pair, size, xy, d in zip(pairs, sizes, places, diameters)
    )
    background = str(rng.choice(choice.backgrounds))
    names_size = level == "full" and bool(rng.random() < 0.5)
    names_size |= len(set(sizes)) > 1 and level == "language"
    scene = Scene(tuple(objects), background, relation, names_size, phrasing)
    if level == "language":
        return replace(scene, phrasing=0, wording=wording(scene, split, rng))
    named, alone = choice.written
    if len(pairs) > 1 or not named or rng.random() >= named:
        return scene
    shown = split != "train" or bool(rng.random() >= alone)
    return replace(scene, word=pairs[0][1], shown=shown)


def _fits(
    level: str,
    split: str,
    pairs: Sequence[tuple[str, str]],
    relation: str | None,
    phrasing: int,
) -> bool:
    """Whether a scene of this content may be in a split."""
    if level == "language" and len(pairs) == 1:  # then the caption's text decides: see `asking`
        return (UNSEEN[pairs[0][1]] == pairs[0][0]) == (split == "unseen")
    return split_of(pairs, relation, phrasing) == split


def _content(
    level: Level, group: int, rng: np.random.Generator
) -> tuple[list[tuple[str, str]], str | None, int]:
    """Draw (colour, shape) pairs, relation and phrasing of a caption of one of the three groups."""
    pairs = [(color, shape) for color in COLORS for shape in level.shapes]
    if group == 1:
        first, second = rng.choice(len(pairs), 2, replace=False)
        relation = str(rng.choice(list(RELATIONS)))
        return [pairs[first], pairs[second]], relation, int(rng.integers(len(captions.RELATED)))
    pair = pairs[rng.integers(len(pairs))]
    if group == 0:
        return [pair], None, int(rng.integers(len(captions.ONE)))
    return [pair] * int(rng.integers(2, 4)), None, int(rng.integers(len(captions.ALIKE)))


def _fixed(
    diameters: Sequence[float], relation: str | None, rng: np.random.Generator
) -> Float[np.ndarray, "n 2"]:
    """Place objects in the middle, or a quarter of the side to either side of it, with jitter."""
    toward = np.array(RELATIONS[relation][0] if relation else (0, 0))
    signs = np.array([1, -1])[: len(diameters), None]
    return 0.5 + 0.25 * signs * toward + rng.uniform(-0.04, 0.04, (len(diameters), 2))


def _free(
    diameters: Sequence[float], relation: str | None, rng: np.random.Generator
) -> Float[np.ndarray, "n 2"]:
    """Place objects anywhere, boxes apart, a relation within 27 degrees, by rejection sampling."""
    d = np.array(diameters)
    while True:
        xy = rng.uniform((d / 2 + 0.03)[:, None], (0.97 - d / 2)[:, None], (64, len(d), 2))
        apart = abs(xy[:, :, None] - xy[:, None]).max(3) - (d + d[:, None]) / 2 + np.eye(len(d))
        fits = (apart > 0.05).all((1, 2))
        if relation:
            toward = np.array(RELATIONS[relation][0])
            offset = xy[:, 0] - xy[:, 1]
            fits &= offset @ toward > 2 * abs(offset @ toward[::-1])
        if fits.any():
            return xy[fits.argmax()]


_DRAWN = {**SHAPES, **NOVEL}


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Render a scene, `size` pixels wide, of shapes that levels have or novel ones."""
    picture = blank(scene.background, size)
    for o in scene.objects if scene.shown else ():
        paint(picture, _DRAWN[o.shape], COLORS[o.color], o.x, o.y, o.diameter)
    if scene.word:
        write(picture, scene.word, COLORS[scene.objects[0].color])
    return picture


def write_scenes(
    out: Path,
    level: str,
    split: str,
    count: int,
    size: int,
    seed: int,
    shard_size: int = 1000,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Path]:
    """Write `count` scenes of a split as WebDataset tars in img2dataset's layout.

    A sample is `{shard:05d}{index:04d}` with `.png`, `.txt` (the short caption) and `.json`. Its
    scene depends on seed, split and number alone. Shards are written atomically, and existing ones
    are skipped, so that an interrupted call can be repeated.

    Args:
        progress: called with the number of scenes done.

    Raises:
        UserError: a shard exists that this call would write differently.
    """
    paths = []
    for shard, start in enumerate(range(0, count, shard_size)):
        numbers = range(start, min(start + shard_size, count))
        path = Path(out) / f"{split}-{shard:05d}.tar"
        samples = partial(_samples, level, split, numbers, size, seed, shard)
        if not path.exists():
            write_atomically(path, partial(_write, samples, start, progress))
        elif _stored(path) != [(f"{key}.json", fields) for key, fields in samples()]:
            raise UserError(f"{path} holds other scenes: choose another folder, or remove it")
        progress(numbers.stop)
        paths.append(path)
    return paths


def _samples(
    level: str, split: str, numbers: range, size: int, seed: int, shard: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and JSON of each sample of a shard."""
    for index, number in enumerate(numbers):
        scene = sample_scene(level, split, generator(seed, split, number))
        fields = {
            "caption": captions.caption(scene),
            "long_caption": captions.long_caption(scene),
            "scene": scene.to_json(),
            "level": level,
            "seed": seed,
            "number": number,
            "width": size,
            "height": size,
        }
        if scene.wording:
            rng = generator(seed, f"{split}/paraphrases", number)
            fields["paraphrases"] = paraphrases(scene, split, rng)
        yield f"{shard:05d}{index:04d}", fields


def _write(
    samples: Callable[[], Iterator[tuple[str, dict[str, Any]]]],
    start: int,
    progress: Callable[[int], None],
    path: Path,
) -> None:
    # As an open file: webdataset would take some paths for URLs.
    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0) as writer:
        for done, (key, fields) in enumerate(samples(), start + 1):
            png = io.BytesIO()
            picture = render(Scene.from_json(fields["scene"]), fields["width"])
            Image.fromarray(picture).save(png, "png", compress_level=1)
            text = json.dumps(fields).encode()
            members = {"png": png.getvalue(), "txt": fields["caption"], "json": text}
            writer.write({"__key__": key, **members})
            progress(done)


def _stored(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Read the names and contents of a shard's JSON members; none if it is damaged."""
    try:
        with tarfile.open(path, "r:") as tar:
            named = [m for m in tar if m.name.endswith(".json")]
            return [(m.name, json.load(tar.extractfile(m))) for m in named]
    except (tarfile.TarError, ValueError):
        return []


def write_captions(path: Path, level: str, count: int, seed: int) -> None:
    """Write `count` captions of scenes of the split "train", one on each line, and no pictures.

    A corpus for text encoders: of "language", words and forms are novel as in `paraphrases`, and
    none of the captions is held out. A line depends on seed and number alone.
    """
    lines = []
    for number in range(count):
        scene = sample_scene(level, "train", generator(seed, "captions", number))
        rng = generator(seed, "captions/paraphrases", number)
        text = paraphrases(scene, "train", rng)[0] if scene.wording else captions.caption(scene)
        lines.append(f"{text}\n")
    write_text(path, "".join(lines))

"""GenEval's six tasks (arXiv 2310.11513) on scenes, scored by the reader in the detector's place.

Prompts are metadata in GenEval's own format, a class being a shape; what they demand, and the rule
of positions, are its own. It wants no clean picture: ours is wrong as well where something in it is
no shape in a known colour, which the reader could not have named. The shapes demanded have to be
there and more may be, but where a number is asked for.

Of the captions of scenes only those of "colors" are worded as in training (held-out wordings of
pairs that training shows). The other tasks leave out the colour, or the relation of two objects,
which no training caption does, and "plain" scenes are never counted: these prompts lie outside
of what a model of scenes was trained for. No prompt is a training caption.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cascade.data.captions import ALIKE, NUMBERS, ONE, RELATED, RELATIONS, Object, Scene
from cascade.data.drawing import COLORS, SHAPES
from cascade.data.scenes import LEVELS, UNSEEN, split_of
from cascade.draws import generator
from cascade.errors import UserError
from cascade.eval.interval import of_share
from cascade.eval.reader import read
from cascade.files import write_atomically

Picture = UInt8[np.ndarray, "h w 3"]
Metadata = Mapping[str, Any]  # tag, include, prompt, and exclude where a number is asked for

TASKS: Mapping[str, str] = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}
PICTURES = 4  # of each prompt
TOGETHER = ("a {0} with a {1}", "one {0} with one {1}")  # as in RELATED, which has no "and"
SLACK = 0.1  # of both boxes' sides: how far middles may be apart and in no relation


class Verdict(NamedTuple):
    """Whether a picture shows what is demanded, and if not, what is wrong with it."""

    right: bool
    reasons: tuple[str, ...]


def level_of(scenes: Sequence[Scene]) -> str:
    """The first level that has all shapes of some scenes."""
    found = {o.shape for scene in scenes for o in scene.objects}
    return next(name for name, level in LEVELS.items() if found <= set(level.shapes))


def prompts(level: str, count: int, seed: int) -> list[Metadata]:
    """The metadata of `count` prompts of each task, or of as many different ones as there are.

    Args:
        level: of the scenes whose shapes are named: "plain" or "full".
        seed: of the choice among all prompts; a larger count keeps those of a smaller one.

    Raises:
        UserError: no such level, or not at least one prompt.
    """
    if level not in LEVELS or count < 1:
        raise UserError(f"{count} prompts of {level} scenes: at least 1, of {list(LEVELS)}")
    chosen = []
    for task, made in _all(list(LEVELS[level].shapes)).items():
        order = generator(seed, f"geneval/{task}", 0).permutation(len(made))
        chosen += [{"tag": task, **made[i]} for i in order[:count]]
    return chosen


def _all(shapes: Sequence[str]) -> dict[str, list[Metadata]]:
    """Every prompt of each task, without its tag."""
    pairs = list(permutations(shapes, 2))
    return {
        "single_object": [_asking([_clause(s)], t) for s in shapes for t in _bare(ONE, s)],
        "two_object": [
            _asking([_clause(a), _clause(b)], wording.format(a, b))
            for (a, b), wording in product(pairs, TOGETHER)
        ],
        "counting": [
            _asking([_clause(s, n)], t, exclude=[_clause(s, n + 1)])
            for s, n in product(shapes, (2, 3))
            for t in _bare(ALIKE, s + ("es" if s.endswith("s") else "s"), NUMBERS[n])
        ],
        "colors": [
            _asking([_clause(s, color=c)], ONE[i].format(size="", color=c, shape=s))
            for s, c, i in product(shapes, COLORS, range(len(ONE)))
            if split_of([(c, s)], phrasing=i) == "val"
        ],
        "position": [
            # The second is the target, and comes first, as clause 0.
            _asking(
                [_clause(b), {**_clause(a), "position": [relation, 0]}],
                wording.format(a, b, relation=relation),
            )
            for (a, b), relation, wording in product(pairs, RELATIONS, RELATED)
        ],
        "color_attr": [
            _asking(
                [_clause(a, color=c), _clause(b, color=d)], wording.format(f"{c} {a}", f"{d} {b}")
            )
            for (a, b), (c, d), wording in product(pairs, permutations(COLORS, 2), TOGETHER)
            if UNSEEN[a] != c and UNSEEN[b] != d
        ],
    }


def _asking(include: list[dict[str, Any]], prompt: str, **exclude: list) -> Metadata:
    return {"include": include, **exclude, "prompt": prompt}


def _clause(shape: str, count: int = 1, **color: str) -> dict[str, Any]:
    return {"class": shape, "count": count, **color}


def _bare(wordings: Sequence[str], shape: str, number: str = "") -> Iterator[str]:
    """The wordings in which nothing is missing without size and colour."""
    for wording in wordings:
        if "{size}{color} " in wording:
            yield wording.replace("{size}{color} ", "").format(shape=shape, number=number)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes prompts as GenEval's evaluation_metadata.jsonl, or results as its results.jsonl."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, lambda beside: beside.write_text(text))


def verdict(metadata: Metadata, picture: Picture) -> Verdict:
    """Judges a picture of 64 px or more.

    Raises:
        UserError: a shape, colour or relation is demanded that the reader does not know.
    """
    _check(metadata)
    reading = read(picture)
    if reading.background is None:
        return Verdict(False, ("no plain background",))
    reasons = [] if reading.clean else ["something is no shape in a known colour"]
    matched: list[list[Object]] = []
    for clause in metadata["include"]:
        found, missing = _matching(clause, reading.objects)
        if not missing and "position" in clause:
            relation, target = clause["position"]
            if not any(relation in relations(o, t) for o in found for t in matched[target]):
                missing = f"no {clause['class']} is {relation} the {_name(metadata, target)}"
        matched.append(found)
        reasons += [missing] if missing else []
    for clause in metadata.get("exclude", ()):
        found, missing = _matching(clause, reading.objects)
        if not missing:
            reasons.append(f"{clause['class']}: fewer than {clause['count']}, not {len(found)}")
    return Verdict(not reasons, tuple(reasons))


def _check(metadata: Metadata) -> None:
    include = metadata["include"]
    for i, clause in enumerate([*include, *metadata.get("exclude", ())]):
        relation, target = clause.get("position", (None, 0))
        asked = (clause["class"], clause.get("color"), relation)
        for name, known in zip(asked, (SHAPES, COLORS, RELATIONS)):
            if name is not None and name not in known:
                raise UserError(f"{metadata['prompt']}: the reader knows no {name}, but {[*known]}")
        if relation and not 0 <= target < min(i, len(include)):
            raise UserError(f"{metadata['prompt']}: clause {target} does not stand before {i}")


def _matching(clause: Mapping[str, Any], objects: Sequence[Object]) -> tuple[list[Object], str]:
    """The objects that a clause is about, and what is missing if they are too few."""
    shape, count, color = clause["class"], clause["count"], clause.get("color")
    found = [o for o in objects if o.shape == shape]
    if len(found) < count:
        return found, f"{shape}: {count}, not {len(found)}"
    of_color = [o for o in found if color in (None, o.color)]
    if len(of_color) < count:
        colors = ", ".join(sorted({o.color for o in found}))
        return of_color, f"{shape}: {count} in {color}, not {len(of_color)} (there: {colors})"
    return of_color, ""


def _name(metadata: Metadata, clause: int) -> str:
    return metadata["include"][clause]["class"]


def relations(a: Object, b: Object) -> set[str]:
    """How a stands to b: at most one of left and right, and one of above and below.

    GenEval's rule: the offset of the boxes' middles, less a tenth of both sides along each axis,
    over the whole offset, is more than half.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    beyond = np.maximum(abs(offset) - SLACK * (a.diameter + b.diameter), 0) * np.sign(offset)
    length = np.linalg.norm(offset)
    return {name for name, (way, _) in RELATIONS.items() if beyond @ np.array(way) > length / 2}


def measure(
    metadata: Sequence[Metadata], paint: Callable[[list[str], str], Iterable[Picture]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Paints and judges `PICTURES` of each prompt, one task at a time.

    Args:
        paint: gives a picture for each caption; the second argument says what they are.

    Returns:
        `scores`, and a line for each picture as GenEval's results have it.
    """
    asked, verdicts = [], []
    for task, title in TASKS.items():
        part = [about for about in metadata if about["tag"] == task for _ in range(PICTURES)]
        pictures = paint([about["prompt"] for about in part], title)
        verdicts += [verdict(*pair) for pair in zip(part, pictures, strict=True)]
        asked += part
    lines = [
        {
            **{key: about[key] for key in ("tag", "prompt")},
            "correct": right,
            "reason": "\n".join(reasons),
            "metadata": json.dumps(about),
        }
        for about, (right, reasons) in zip(asked, verdicts)
    ]
    return scores(asked, verdicts), lines


def scores(metadata: Sequence[Metadata], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The share of right pictures in each task, and `overall`, the mean over the six tasks.

    Each carries its interval of 95 %, `prompts` and `count`, the pictures. Pictures of one prompt
    are no independent trials, so a task's interval is Wilson's for as many trials as prompts; the
    mean's is the recovery of variances from the tasks' (MOVER; Zou and Donner 2008).

    Args:
        metadata: of each picture.

    Raises:
        ValueError: a task is missing, or the numbers differ.
    """
    right, asked, worded = Counter(), Counter(), {task: set() for task in TASKS}
    for about, (fits, _) in zip(metadata, verdicts, strict=True):
        right[about["tag"]] += fits
        asked[about["tag"]] += 1
        worded[about["tag"]].add(about["prompt"])
    if asked.keys() != TASKS.keys():
        raise ValueError(f"the six tasks are {list(TASKS)}, not {list(asked)}")
    tasks = {}
    for task in TASKS:
        score, n = right[task] / asked[task], len(worded[task])
        tasks[task] = {"score": score, "interval": of_share(score, n)}
        tasks[task] |= {"prompts": n, "count": asked[task]}
    points = np.array([[row["score"], *row["interval"]] for row in tasks.values()])
    mean, width = points[:, 0].mean(), np.square(points[:, 1:] - points[:, :1]).sum(0) ** 0.5 / 6
    overall = {"score": float(mean), "interval": (float(mean - width[0]), float(mean + width[1]))}
    counts = {key: sum(row[key] for row in tasks.values()) for key in ("prompts", "count")}
    return {"tasks": tasks, "overall": overall | counts}

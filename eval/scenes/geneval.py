"""GenEval's six tasks (arXiv 2310.11513) on scenes, with the recognizer in place of the detector.

Prompts are metadata in GenEval's own format, where a class is a shape. The requirements and the
rule for positions are GenEval's, with one addition: a picture with a residual that the recognizer
cannot explain is wrong. More objects than required are allowed, except where a count is asked for.

Only the prompts of the task "colors" are worded like training captions (held-out wordings of
pairs that occur in training). The other tasks leave out the colour, or the relation of two objects,
which no training caption does, and captions of "plain" scenes contain no counts. These prompts are
therefore out of distribution for a model trained on scenes. No prompt is a training caption.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from cascade.data.scenes.captions import ALIKE, NUMBERS, ONE, RELATED, RELATIONS, Object, Scene
from cascade.data.scenes.drawing import COLORS, SHAPES
from cascade.data.scenes.generate import LEVELS, UNSEEN, split_of
from cascade.draws import generator
from cascade.errors import UserError
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.recognizer import recognize
from cascade.files.atomic import write_atomically

Picture = UInt8[np.ndarray, "h w 3"]
Metadata = Mapping[str, Any]  # tag, include and prompt, and exclude in the task of counting

TASKS: Mapping[str, str] = {
    "single_object": "one object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}
PICTURES = 4  # of each prompt
TOGETHER = ("a {0} with a {1}", "one {0} with one {1}")  # RELATED has no wording with "and"
SLACK = 0.1  # GenEval's tolerance for positions, as a fraction of the sum of both boxes' sides


class Verdict(NamedTuple):
    """Whether a picture meets a prompt's requirements, and if not, why."""

    right: bool
    reasons: tuple[str, ...]


def level_of(scenes: Sequence[Scene]) -> str:
    """The first level (of difficulty) that has all shapes of the given scenes."""
    found = {o.shape for scene in scenes for o in scene.objects}
    return next(name for name, level in LEVELS.items() if found <= set(level.shapes))


def prompts(level: str, count: int, seed: int) -> list[Metadata]:
    """The metadata of `count` different prompts of each task, or of all if there are fewer.

    Args:
        level: "plain" or "full": the scenes whose shapes are named.
        seed: of the random choice; a larger count extends the choice of a smaller one.

    Raises:
        UserError: the level is unknown, or the count is below 1.
    """
    if level not in LEVELS or count < 1:
        raise UserError(
            f"{count} prompts of {level} scenes: give a count of at least 1 and one of the levels "
            f"{list(LEVELS)}"
        )
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
            # Positions refer to an earlier clause, so the second object comes first.
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
    """The wordings that are complete without size and colour."""
    for wording in wordings:
        if "{size}{color} " in wording:
            yield wording.replace("{size}{color} ", "").format(shape=shape, number=number)


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes prompts or results as JSON lines, GenEval's format."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, lambda beside: beside.write_text(text))


def verdict(metadata: Metadata, picture: Picture) -> Verdict:
    """Judges a picture of at least 64 px.

    Raises:
        UserError: the prompt asks for a shape, colour or relation that the recognizer does not
            know.
    """
    _check(metadata)
    recognized = recognize(picture)
    if recognized.background is None:
        return Verdict(False, ("no plain background",))
    reasons = [] if recognized.clean else ["something is no shape in a known colour"]
    matched: list[list[Object]] = []
    for clause in metadata["include"]:
        found, missing = _matching(clause, recognized.objects)
        if not missing and "position" in clause:
            relation, target = clause["position"]
            if not any(relation in relations(o, t) for o in found for t in matched[target]):
                other = metadata["include"][target]["class"]
                missing = f"no {clause['class']} is {relation} the {other}"
        matched.append(found)
        reasons += [missing] if missing else []
    for clause in metadata.get("exclude", ()):
        found, missing = _matching(clause, recognized.objects)
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
                raise UserError(
                    f"{metadata['prompt']}: {name} is unknown: use one of {', '.join(known)}"
                )
        if relation and not 0 <= target < min(i, len(include)):
            raise UserError(
                f"{metadata['prompt']}: clause {i} refers to {target}: give an earlier clause"
            )


def _matching(clause: Mapping[str, Any], objects: Sequence[Object]) -> tuple[list[Object], str]:
    """The objects that match a clause, and a reason if there are too few of them."""
    shape, count, color = clause["class"], clause["count"], clause.get("color")
    found = [o for o in objects if o.shape == shape]
    if len(found) < count:
        return found, f"{shape}: {count}, not {len(found)}"
    of_color = [o for o in found if color in (None, o.color)]
    if len(of_color) < count:
        colors = ", ".join(sorted({o.color for o in found}))
        return of_color, f"{shape}: {count} in {color}, not {len(of_color)} (there: {colors})"
    return of_color, ""


def relations(a: Object, b: Object) -> set[str]:
    """The relations of a to b: at most one of left and right, and one of above and below.

    GenEval's rule: the offset between the boxes' centres, reduced along each axis by a tenth of the
    sum of both sides, is more than half of the offset's length.
    """
    offset = np.array([a.x - b.x, a.y - b.y])
    beyond = np.maximum(abs(offset) - SLACK * (a.diameter + b.diameter), 0) * np.sign(offset)
    length = np.linalg.norm(offset)
    return {name for name, (way, _) in RELATIONS.items() if beyond @ np.array(way) > length / 2}


def score_tasks(
    metadata: Sequence[Metadata], paint: Callable[[list[str], str], Iterable[Picture]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generates and judges `PICTURES` pictures of each prompt, one task at a time.

    Args:
        paint: gives a picture for each caption; its second argument is a title for progress bars.

    Returns:
        The `scores`, and a line of GenEval's results file for each picture.
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
    """The share of right pictures by task, and `overall`, the mean of the six tasks.

    Each has a 95 % `interval`, the number of `prompts`, and `count`, the number of pictures.
    Pictures of one prompt are not independent, so a task's interval is Wilson's with the number of
    prompts as the number of trials. The interval of the mean combines those of the tasks by MOVER
    (Zou and Donner 2008).

    Args:
        metadata: one for each picture.

    Raises:
        ValueError: a task is missing, or there are not as many verdicts as metadata.
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

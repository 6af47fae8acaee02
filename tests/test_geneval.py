"""Claims about GenEval on scenes: true pictures are right, and each kind of wrong one is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cascade.data.scenes.captions import NUMBERS, ONE, RELATIONS, Object, Scene, caption
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS, SHAPES
from cascade.data.scenes.generate import LEVELS, render, sample_scene, split_of
from cascade.draws import generator
from cascade.errors import UserError
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.geneval import (
    PICTURES,
    TASKS,
    Verdict,
    prompts,
    relations,
    score_tasks,
    scores,
    verdict,
    write_lines,
)

SPOTS = ((0.25, 0.27), (0.75, 0.27), (0.3, 0.75), (0.76, 0.76))


def another(names, name, rng):
    return str(rng.choice([n for n in names if n != name]))


def objects(about, rng):
    """What is demanded, somewhere, in the colours demanded or in any."""
    wanted = [clause for clause in about["include"] for _ in range(clause["count"])]
    spots = [SPOTS[i] for i in rng.permutation(len(SPOTS))[: len(wanted)]]
    if about["tag"] == "position":
        toward = np.array(RELATIONS[about["include"][1]["position"][0]][0])
        spots = [tuple(0.5 - 0.25 * toward), tuple(0.5 + 0.25 * toward)]
    return [
        Object(c.get("color") or str(rng.choice(list(COLORS))), c["class"], "", *map(float, xy), d)
        for c, xy, d in zip(wanted, spots, rng.uniform(0.22, 0.36, 4))
    ]


def shown(found, rng, size=64):
    return render(Scene(tuple(found), str(rng.choice(list(BACKGROUNDS)))), size)


def reshaped(about, found, rng):
    """One object of another shape, which nothing demands."""
    i, named = rng.integers(len(found)), {o.shape for o in found}
    shape = str(rng.choice([s for s in SHAPES if s not in named]))
    return [replace(o, shape=shape) if k == i else o for k, o in enumerate(found)]


def recolored(about, found, rng):
    i = rng.integers(len(found))
    other = another(COLORS, found[i].color, rng)
    return [replace(o, color=other) if k == i else o for k, o in enumerate(found)]


def fewer(about, found, rng):
    return found[:-1]


def more(about, found, rng):
    """One more of the same shape and colour, where there is room."""
    free = [s for s in SPOTS if all(max(abs(s[0] - o.x), abs(s[1] - o.y)) > 0.37 for o in found)]
    return [*found, replace(found[0], x=free[0][0], y=free[0][1], diameter=0.24)]


def mirrored(about, found, rng):
    return [replace(o, x=1 - o.x, y=1 - o.y) for o in found]


def swapped(about, found, rng):
    a, b = found
    return [replace(a, color=b.color), replace(b, color=a.color)]


ALL, TWO = set(TASKS), {"two_object", "position", "color_attr"}
# What is done to a true picture, to which tasks it can be done, and for which it is then wrong.
CHANGES = [
    (reshaped, ALL, ALL),
    (fewer, ALL, ALL),
    (recolored, ALL, {"colors", "color_attr"}),
    (more, ALL - {"position"}, {"counting"}),
    (mirrored, ALL, {"position"}),
    (swapped, TWO, {"color_attr"}),
]


@pytest.fixture(scope="module")
def asked():
    return {level: prompts(level, 10, seed=3) for level in LEVELS}


@pytest.mark.parametrize("level", LEVELS)
def test_true_pictures_score_one(asked, level):
    rng = np.random.default_rng(0)
    pictures = iter([shown(objects(a, rng), rng) for a in asked[level] for _ in range(PICTURES)])
    seen = []

    def paint(captions, title):
        seen.append((title, len(captions)))
        return [next(pictures) for _ in captions]

    found, lines = score_tasks(asked[level], paint)
    assert [lines[i] for i in range(len(lines)) if not lines[i]["correct"]] == []
    assert found["overall"]["score"] == 1.0
    assert all(row["score"] == 1.0 for row in found["tasks"].values())
    assert found["overall"]["count"] == PICTURES * len(asked[level]) == sum(n for _, n in seen)
    assert [title for title, _ in seen] == list(TASKS.values())
    assert json.loads(lines[-1]["metadata"]) == asked[level][-1]


@pytest.mark.parametrize(("change", "possible", "wrong"), CHANGES)
def test_each_kind_of_wrong_picture_is_wrong_for_the_tasks_that_ask(asked, change, possible, wrong):
    rng = np.random.default_rng(1)
    for about in asked["full"]:
        if about["tag"] in possible:
            picture = shown(change(about, objects(about, rng), rng), rng)
            right, reasons = verdict(about, picture)
            assert right == (about["tag"] not in wrong), (about, reasons)
            assert right == (not reasons)


def test_the_same_at_256_px(asked):
    rng = np.random.default_rng(2)
    for about in asked["full"][::9]:
        assert verdict(about, shown(objects(about, rng), rng, 256)).right
        assert not verdict(about, shown(reshaped(about, objects(about, rng), rng), rng, 256)).right


def test_reasons_name_what_is_wrong():
    red = Object("red", "circle", "", 0.25, 0.5, 0.3)
    blue = Object("blue", "square", "", 0.75, 0.5, 0.3)
    picture = render(Scene((red, blue), "white"), 64)

    def reasons(*clauses, exclude=()):
        about = {"tag": "", "prompt": "p", "include": clauses, "exclude": exclude}
        return verdict(about, picture).reasons

    circle, square = {"class": "circle", "count": 1}, {"class": "square", "count": 1}
    assert reasons({**circle, "color": "red"}, {**square, "color": "blue"}) == ()
    assert reasons({"class": "star", "count": 2}) == ("star: 2, not 0",)
    assert reasons({**circle, "color": "blue"}) == ("circle: 1 in blue, not 0 (there: red)",)
    assert reasons(circle, exclude=[circle]) == ("circle: fewer than 1, not 1",)
    assert reasons(circle, {**square, "position": ["right of", 0]}) == ()
    above = reasons(circle, {**square, "position": ["above", 0]})
    assert above == ("no square is above the circle",)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    noise[4:-4, 4:-4] = picture[4:-4, 4:-4]
    assert not verdict({"include": [circle], "prompt": "p"}, noise).right
    smeared = picture.copy()
    smeared[8:16, 8:48] = (160, 120, 90)
    about = {"include": [circle], "prompt": "p"}
    assert verdict(about, smeared).reasons == ("something is no shape in a known colour",)


@pytest.mark.parametrize(
    ("clause", "says"),
    [
        ({"class": "bench", "count": 1}, "bench is unknown"),
        ({"class": "star", "count": 1, "color": "orange"}, "orange is unknown"),
        ({"class": "star", "count": 1, "position": ["behind", 0]}, "behind is unknown"),
        ({"class": "star", "count": 1, "position": ["above", 1]}, "give an earlier clause"),
    ],
)
def test_demands_that_cannot_be_judged_are_refused(clause, says):
    about = {"include": [{"class": "circle", "count": 1}, clause], "prompt": "p"}
    with pytest.raises(UserError, match=says):
        verdict(about, render(Scene((), "white"), 64))


def place(x, y, diameter=0.3):
    return Object("red", "circle", "", 0.5 + x, 0.5 + y, diameter)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-0.4, 0), {"left of"}),
        ((0, 0.3), {"below"}),
        ((0.05, 0), set()),  # within a tenth of both sides
        ((0.3, -0.3), {"right of", "above"}),  # 0.24 of 0.42 each way
        ((0.11, -0.11), set()),  # 0.05 of 0.16
        ((-0.3, 0.2), {"left of"}),  # down: 0.14 of 0.36
    ],
)
def test_positions_follow_the_rule_of_geneval(offset, expected):
    assert relations(place(*offset), place(0, 0)) == expected
    opposite = {RELATIONS[name][1] for name in expected}
    assert relations(place(0, 0), place(*offset)) == opposite


@pytest.mark.parametrize("level", LEVELS)
def test_prompts_are_different_and_depend_on_the_seed_alone(level):
    some, more_ = prompts(level, 5, 0), prompts(level, 60, 0)
    assert some == prompts(level, 5, 0) != prompts(level, 5, 1)
    assert [a["tag"] for a in some] == [task for task in TASKS for _ in range(5)]
    assert all(about in more_ for about in some)
    assert len({about["prompt"] for about in more_}) == len(more_)
    assert {c["class"] for about in more_ for c in about["include"]} == set(LEVELS[level].shapes)
    with pytest.raises(UserError, match="at least 1"):
        prompts(level, 0, 0)
    with pytest.raises(UserError, match="odd"):
        prompts("odd", 1, 0)


def test_prompts_are_no_training_captions_but_use_their_words():
    train = {caption(sample_scene("full", "train", generator(5, "train", i))) for i in range(3000)}
    train |= {
        ONE[i].format(size="", color=c, shape=s)
        for s in SHAPES
        for c in COLORS
        for i in range(len(ONE))
        if split_of([(c, s)], phrasing=i) == "train"
    }
    asked = {about["prompt"] for about in prompts("full", 10_000, 0)}
    assert len(asked) > 2000
    assert not asked & train
    words = {word for sentence in train for word in sentence.split()}
    assert {word for sentence in asked for word in sentence.split()} <= words


def test_prompts_say_what_is_demanded():
    for about in prompts("full", 200, 0):
        for clause in about["include"]:
            said = f"{about['prompt']} "
            shape = clause["class"]
            plural = shape + ("es " if shape == "cross" else "s ")
            assert (f"{shape} " if clause["count"] == 1 else plural) in said
            assert clause["count"] == 1 or f"{NUMBERS[clause['count']]} " in said
            assert clause.get("color", "") in said
            assert clause.get("position", [""])[0] in said
        if about["tag"] == "counting":
            assert about["exclude"] == [{**clause, "count": clause["count"] + 1}]


def test_a_position_can_be_said_from_either_side():
    said = [a for a in prompts("plain", 200, 0) if a["tag"] == "position"]
    about = next(a for a in said if " with a " in a["prompt"])
    target, moved = about["include"]
    relation = moved["position"][0]
    assert about["prompt"] == f"a {target['class']} with a {moved['class']} {relation} it"


def test_scores_are_means_over_pictures_and_over_tasks():
    asked = [{"tag": task, "prompt": f"{task} {i}"} for task in TASKS for i in (0, 0, 1, 1)]
    right = [True] * 8 + [False] * 4 + [True, True, True, False] * 3
    found = scores(asked, [Verdict(r, ()) for r in right])
    rows = found["tasks"]
    assert [row["score"] for row in rows.values()] == [1, 1, 0, 0.75, 0.75, 0.75]
    assert found["overall"]["score"] == pytest.approx(4.25 / 6)
    assert rows["colors"]["interval"] == of_share(0.75, 2)  # two prompts, of four pictures
    assert (rows["colors"]["prompts"], rows["colors"]["count"]) == (2, 4)
    low, high = found["overall"]["interval"]
    spread = [(row["score"], *row["interval"]) for row in rows.values()]
    assert found["overall"]["score"] - low == pytest.approx(
        sum((p - a) ** 2 for p, a, _ in spread) ** 0.5 / 6
    )
    assert high - found["overall"]["score"] == pytest.approx(
        sum((b - p) ** 2 for p, _, b in spread) ** 0.5 / 6
    )
    with pytest.raises(ValueError, match="six tasks"):
        scores(asked[4:], [Verdict(r, ()) for r in right[4:]])
    with pytest.raises(ValueError, match="argument 2"):
        scores(asked, [Verdict(True, ())])


def test_lines_are_json(tmp_path):
    some = prompts("plain", 2, 0)
    write_lines(tmp_path / "evaluation_metadata.jsonl", some)
    lines = (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == some
    assert list(json.loads(lines[0])) == ["tag", "include", "prompt"]

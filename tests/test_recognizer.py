"""Claims about the recognizer: it reads true renders, and nearly right ones do not fool it."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from cascade.data.scenes.captions import Object, Scene
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS, SHAPES, blank, paint
from cascade.data.scenes.generate import SIZES, SPLITS, render, sample_scene
from cascade.draws import generator
from cascade.eval.cascades.protocol import CRITERIA, rates, tally
from cascade.eval.metrics.interval import of_share
from cascade.eval.scenes.recognizer import judge, recognize


def some(count):
    """Scenes of both levels and all splits in turn."""
    kinds = [(["plain", "full"][i % 2], SPLITS[i // 2 % 3]) for i in range(count)]
    return [sample_scene(*kind, generator(77, kind[1], i)) for i, kind in enumerate(kinds)]


def jpeg(picture, rng):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=75)
    return np.asarray(Image.open(file).convert("RGB"))


def soft(picture, rng):
    """As a small model paints: a little blurred, off in colour, noisy."""
    sigma = 0.7 * len(picture) / 64
    blurred = gaussian_filter(picture.astype(float), (sigma, sigma, 0))
    noisy = blurred + rng.uniform(-6, 6, 3) + rng.normal(0, 4, picture.shape)
    return np.rint(noisy.clip(0, 255)).astype(np.uint8)


def true(picture, rng):
    return picture


def correct(scene, picture):
    """Whether a reading has every object, its size and its place, and the background."""

    def key(o):
        return o.color, o.shape, o.size, o.x, o.y

    reading = recognize(picture)
    found, there = sorted(reading.objects, key=key), sorted(scene.objects, key=key)
    if not reading.clean or len(found) != len(there) or reading.background != scene.background:
        return False
    return all(
        key(a)[:3] == key(b)[:3] and abs(a.x - b.x) + abs(a.y - b.y) < 0.03
        for a, b in zip(found, there)
    )


def painted(scene, size, shapes, colors):
    picture = blank(scene.background, size)
    for o, shape, color in zip(scene.objects, shapes, colors):
        paint(picture, shape, color, o.x, o.y, o.diameter)
    return picture


def parts(scene, rng):
    """What `painted` needs, and which object is to be made wrong."""
    shapes = [SHAPES[o.shape] for o in scene.objects]
    return shapes, [COLORS[o.color] for o in scene.objects], int(rng.integers(len(shapes)))


def another(names, name, rng):
    return str(rng.choice([n for n in names if n != name]))


def morphed(scene, size, rng):
    """One shape half-way into another."""
    shapes, colors, i = parts(scene, rng)
    this = shapes[i]
    other = SHAPES[another(SHAPES, scene.objects[i].shape, rng)]
    shapes[i] = lambda x, y: (this(x, y) + other(x, y)) / 2
    return painted(scene, size, shapes, colors)


def blended(scene, size, rng):
    """Two shapes over each other, each half transparent."""
    shapes, colors, i = parts(scene, rng)
    one = painted(scene, size, shapes, colors).astype(int)
    shapes[i] = SHAPES[another(SHAPES, scene.objects[i].shape, rng)]
    return ((one + painted(scene, size, shapes, colors)) // 2).astype(np.uint8)


def recoloured(scene, size, rng):
    """One colour half-way to another."""
    shapes, colors, i = parts(scene, rng)
    other = COLORS[another(COLORS, scene.objects[i].color, rng)]
    colors[i] = tuple((a + b) // 2 for a, b in zip(colors[i], other))
    return painted(scene, size, shapes, colors)


def halved(scene, size, rng):
    """One object cut in half, upright or across."""
    shapes, colors, i = parts(scene, rng)
    this, (a, b) = shapes[i], [(1, 0), (-1, 0), (0, 1), (0, -1)][rng.integers(4)]
    shapes[i] = lambda x, y: np.maximum(this(x, y), a * x + b * y)
    return painted(scene, size, shapes, colors)


def haunted(scene, size, rng):
    """A further object, faint."""
    picture = render(scene, size)
    shape, color = str(rng.choice(list(SHAPES))), str(rng.choice(list(COLORS)))
    while True:
        d = rng.uniform(*SIZES["small"])
        x, y = rng.uniform(d / 2 + 0.01, 0.99 - d / 2, 2)
        if all(max(abs(x - o.x), abs(y - o.y)) > o.diameter / 2 for o in scene.objects):
            break
    paint(picture, SHAPES[shape], COLORS[color], x, y, d, opacity=rng.uniform(0.15, 0.4))
    return picture


WRONG = (morphed, blended, recoloured, halved, haunted)


def rate_of_correct(size, count, treat):
    scenes = enumerate(some(count))
    treated = [(s, treat(render(s, size), np.random.default_rng(i))) for i, s in scenes]
    return np.mean([correct(*pair) for pair in treated])


def rate_of_accepted(size, count, wrong):
    scenes = enumerate(some(count))
    made = [(s, wrong(s, size, np.random.default_rng(i))) for i, s in scenes]
    return np.mean([judge(*pair)["whole"] for pair in made])


TREATMENTS = [(true, 0.995), (jpeg, 0.98), (soft, 0.98)]


@pytest.mark.parametrize(("size", "count"), [(64, 300), (256, 100)])
@pytest.mark.parametrize(("treat", "least"), TREATMENTS)
def test_reads_true_renders(size, count, treat, least):
    assert rate_of_correct(size, count, treat) >= least


@pytest.mark.parametrize(("size", "count"), [(64, 150), (256, 50)])
@pytest.mark.parametrize("wrong", WRONG)
def test_refuses_what_was_made_wrong(size, count, wrong):
    assert rate_of_accepted(size, count, wrong) <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 256])
def test_the_same_on_2000_pictures(size):
    for treat, least in TREATMENTS:
        assert rate_of_correct(size, 2000, treat) >= least, treat
    for wrong in WRONG:
        assert rate_of_accepted(size, 2000, wrong) <= 0.02, wrong


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("kind", ["uniform", "pale", "blobs", "clouds"])
def test_finds_nothing_in_noise(size, kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.normal(0, 1, (size, size, 3))
        if kind == "uniform":
            picture = rng.uniform(0, 255, noise.shape)
        elif kind == "pale":
            picture = 230 + 40 * noise
        elif kind == "blobs":
            picture = np.kron(rng.uniform(0, 255, (8, 8, 3)), np.ones((size // 8, size // 8, 1)))
        else:
            smooth = gaussian_filter(noise, (size / 20, size / 20, 0))
            picture = 220 + 50 * smooth / smooth.std()
        reading = recognize(picture.clip(0, 255).astype(np.uint8))
        assert not reading.objects
        assert not reading.clean or kind == "pale"  # at 256 px its average is an empty picture


def test_an_empty_picture_is_clean_and_holds_nothing():
    assert recognize(blank("sky", 64)).objects == ()
    assert recognize(blank("sky", 64)).clean


def test_pictures_too_small_to_judge_are_refused():
    with pytest.raises(ValueError, match="64 px"):
        recognize(render(some(1)[0], 16))


RED = Object("red", "circle", "large", 0.25, 0.5, 0.35)
BLUE = Object("blue", "square", "large", 0.75, 0.5, 0.35)
ASKED = Scene((RED, BLUE), "white", relation="left of", names_size=True)
SWAPPED = (replace(RED, color="blue"), replace(BLUE, color="red"))
TURNED = (replace(RED, x=0.75), replace(BLUE, x=0.25))
STACKED = (replace(RED, x=0.5, y=0.25), replace(BLUE, x=0.5, y=0.75))
SHRUNK = (replace(RED, diameter=0.22), BLUE)


@pytest.mark.parametrize(
    ("objects", "wrong"),
    [
        ((RED, BLUE), set()),
        ((RED,), {"objects", "binding", "relations", "counts", "whole"}),
        (SWAPPED, {"binding", "relations", "whole"}),
        (TURNED, {"relations", "whole"}),
        (STACKED, {"relations", "whole"}),
        (SHRUNK, {"whole"}),
        ((RED, replace(BLUE, color="green")), {"objects", "binding", "relations", "whole"}),
        (
            (RED, BLUE, replace(RED, x=0.5, y=0.13, diameter=0.2)),
            {"objects", "binding", "relations", "counts", "whole"},
        ),
    ],
)
def test_each_measure_fails_for_its_own_reason(objects, wrong):
    verdict = judge(ASKED, render(replace(ASKED, objects=objects), 64))
    assert {measure for measure, right in verdict.items() if not right} == wrong


def test_size_counts_only_if_it_was_asked_for():
    assert judge(replace(ASKED, names_size=False), render(replace(ASKED, objects=SHRUNK), 64))[
        "whole"
    ]


def accuracy(arrays, scenes):
    return rates(torch.stack([tally(s, judge(s, array)) for s, array in zip(scenes, arrays)]))


def test_scene_accuracy_is_the_share_of_right_pictures():
    alone = Scene((RED,), "white")
    scenes = [ASKED, ASKED, ASKED, alone]
    shown = [ASKED, replace(ASKED, objects=TURNED), replace(ASKED, objects=SWAPPED), alone]
    arrays = [render(scene, 64) for scene in shown]
    expected = {
        "objects": 1.0,
        "binding": 3 / 4,
        "relations": 1 / 3,
        "counts": 1.0,
        "whole": 1 / 2,
        "count": 4,
    }
    asked = {c: 3 if c == "relations" else 4 for c in CRITERIA}
    expected["intervals"] = {c: of_share(expected[c], n) for c, n in asked.items()}
    assert accuracy(arrays, scenes) == expected


def test_a_criterion_that_no_scene_asks_for_has_no_rate():
    alone = Scene((RED,), "white")
    assert "relations" not in accuracy([render(alone, 64)], [alone])


@pytest.mark.parametrize(
    ("rate", "n", "expected"),
    [
        (0.8, 10, (0.490162, 0.943318)),
        (0.0, 10, (0.0, 0.277533)),
        (1.0, 10, (0.722467, 1.0)),
        (81 / 263, 263, (0.255290, 0.366210)),  # Newcombe 1998, table I
    ],
)
def test_intervals_of_rates_are_wilsons(rate, n, expected):
    assert of_share(rate, n) == pytest.approx(expected, abs=6e-5)


def test_what_is_no_rate_has_no_interval():
    for rate, n in ((1.1, 10), (-0.1, 10), (0.5, 0)):
        with pytest.raises(ValueError, match="no share"):
            of_share(rate, n)


def test_a_novel_shape_is_read_where_it_is_asked_for_alone():
    for i, color in enumerate(COLORS):
        asked = Object(color, "blicket", "large", 0.5, 0.48, 0.35)
        scene = Scene((asked,), list(BACKGROUNDS)[i % 4])
        picture = render(scene, 64)
        assert judge(scene, picture)["whole"]
        assert all(o.shape != "blicket" for o in recognize(picture).objects)
        for shape in SHAPES:
            other = Scene((replace(asked, shape=shape),), scene.background)
            assert not judge(other, picture)["whole"]
            assert not judge(scene, render(other, 64))["whole"]

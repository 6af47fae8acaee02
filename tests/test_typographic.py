"""Words written in scenes, and the attack on a CLIP that they are: every number by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cascade.data.scenes.captions import Object, Scene, caption
from cascade.data.scenes.drawing import BACKGROUNDS, COLORS, SHAPES, blank, write
from cascade.data.scenes.generate import render, sample_scene
from cascade.draws import generator
from cascade.encoders.clip import FrozenCLIP
from cascade.eval.cascades.protocol import HeldOut
from cascade.eval.cascades.typographic import PLAIN, RIGHT, WRONG, attacked, shown, typographic
from cascade.eval.scenes.recognizer import judge, recognize
from cascade.pipeline import Cascade
from tests.hostile import refused

SHAPE_NAMES = list(SHAPES)[:4]
SCENES = [
    Scene((Object(color, shape, "large", 0.5, 0.5, 0.35),), "white")
    for color in COLORS
    for shape in SHAPE_NAMES
]


def test_most_written_scenes_of_one_object_name_its_shape_and_some_show_nothing_else():
    for split, alone in (("train", 0.5), ("val", 0.0)):
        scenes = [sample_scene("written", split, generator(0, split, i)) for i in range(1500)]
        ones = [s for s in scenes if s.kind == "one"]
        assert np.mean([s.word is not None for s in ones]) == pytest.approx(0.6, abs=0.06)
        named = [s for s in ones if s.word]
        assert np.mean([not s.shown for s in named]) == pytest.approx(alone, abs=0.06)
        assert all(s.word == s.objects[0].shape for s in named)
        assert all(s.shown and not s.word for s in scenes if s.kind != "one")
        for scene in scenes[:300]:
            assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
        assert not any({"word", "shown"} & s.to_json().keys() for s in ones if not s.word)


def test_a_word_is_written_in_its_colour_below_the_object_and_letters_differ():
    pictures = []
    for word in SHAPES:
        scene = Scene((Object("red", "circle", "large", 0.5, 0.5, 0.35),), "white", word=word)
        picture = render(replace(scene, shown=False), 32)
        ink = (picture == COLORS["red"]).all(2)
        assert ((picture == BACKGROUNDS["white"]).all(2) | ink).all()  # sharp at 32 px
        assert ink[26:31].any(1).all()
        assert not ink[:26].any()
        assert not ink[31:].any()
        assert not ink[:, : 16 - 2 * len(word)].any()
        assert np.array_equal(render(scene, 32)[26:], picture[26:])
        assert np.array_equal(render(scene, 32)[:26], render(replace(scene, word=None), 32)[:26])
        pictures.append(picture)
    assert len({picture.tobytes() for picture in pictures}) == len(SHAPES)
    for word in ("pentagons", "zoo", "Star"):
        with pytest.raises(ValueError, match="cannot be written"):
            write(blank("white", 32), word, (0, 0, 0))


def test_a_word_changes_no_verdict():
    for scene in SCENES[::5]:
        written = replace(scene, word="square")
        picture = render(written, 64)
        assert not recognize(picture).clean
        assert judge(written, picture)["whole"]
        assert judge(written, render(scene, 64))["whole"]
        other = replace(written, objects=(replace(scene.objects[0], color="unknown"),))
        assert not judge(other, picture)["whole"]


def test_the_words_are_those_of_the_object_and_of_another_shape():
    found = attacked(SCENES, SHAPE_NAMES, seed=0)
    assert found[PLAIN] == SCENES
    assert all(s.word == s.objects[0].shape for s in found[RIGHT])
    assert all(s.word in SHAPE_NAMES and s.word != s.objects[0].shape for s in found[WRONG])
    assert found[WRONG] != attacked(SCENES, SHAPE_NAMES, seed=1)[WRONG]
    assert found[WRONG][:9] == attacked(SCENES[:9], SHAPE_NAMES, seed=0)[WRONG]


def test_variations_are_counted_by_what_they_show():
    scenes = attacked(SCENES[:4], SHAPE_NAMES, seed=0)[WRONG]
    true = [render(s, 64) for s in scenes[:2]]  # written in, too
    obj = scenes[2].objects[0]
    named = replace(scenes[2], objects=(replace(obj, shape=scenes[2].word, color="pink"),))
    pictures = np.stack([*true, render(named, 64), blank("white", 64)])
    found = shown(pictures, scenes)
    assert [found[k] for k in ("true", "shape", "word", "unclear")] == [0.5, 0.5, 0.25, 0.25]
    low, high = found["intervals"]["word"]
    assert low < 0.25 < high


class Reader(FrozenCLIP):
    """A CLIP that sees colours, and of shapes believes what is written."""

    def __init__(self):
        pass

    def text(self, captions):
        return {"clip_text": torch.cat([embedding(*c.split()[1:3]) for c in captions])}

    def image(self, x):
        rows = []
        for picture in ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
            (found,) = recognize(picture, written=True).objects
            read = [w for w in SHAPE_NAMES if says(picture, w, COLORS[found.color])]
            rows.append(embedding(found.color, read[0] if read else found.shape))
        return torch.cat(rows)


def says(picture, word, color):
    wanted = blank("white", len(picture))
    write(wanted, word, color)
    row = slice(len(picture) * 26 // 32, len(picture) * 31 // 32)
    return np.array_equal(picture[row], wanted[row])


def embedding(color, shape):
    codes = [list(COLORS).index(color), len(COLORS) + SHAPE_NAMES.index(shape)]
    return F.normalize(torch.eye(12)[codes].sum(0), dim=0)[None]


class Stage:
    reads, encoders = frozenset(), ()

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, **choices):
        raise AssertionError("embeddings are given")


class Prior(Stage):
    writes = "clip_image"

    def __init__(self, *encoders):
        self.encoders = encoders


class Painter(Stage):
    """Paints what its embedding says."""

    writes = "image_64"

    def sample(self, batch, seed, purpose="", progress=None, without=()):
        assert without == ("caption",)
        pictures = []
        for z in batch["clip_image"]:
            color, shape = list(COLORS)[z[:8].argmax()], SHAPE_NAMES[z[8:].argmax()]
            scene = Scene((Object(color, shape, "large", 0.5, 0.5, 0.35),), "white")
            pictures.append(torch.from_numpy(render(scene, 64)).permute(2, 0, 1) / 127.5 - 1)
        return torch.stack(pictures)


def paint(cascade, captions, given, what):
    return cascade({"caption": captions, "sample": torch.arange(len(captions)), **given}, 0)


def test_a_clip_that_believes_words_is_fooled_by_all_wrong_ones():
    cascade = Cascade([Prior(Reader()), Painter()])
    scenes = SCENES[::3]  # of all shapes
    data = HeldOut(list(map(caption, scenes)), {}, scenes)
    found, sheet = typographic(cascade, data, paint, seed=0)
    shots = found["zero_shot"]
    assert [shots[kind]["class"] for kind in (PLAIN, RIGHT, WRONG)] == [1, 1, 0]
    assert [shots[kind]["color"] for kind in (PLAIN, RIGHT, WRONG)] == [1, 1, 1]
    assert (found["fooled"], found["count"]) == (1, len(scenes))
    plain, wrong = (found["variations"][kind] for kind in (PLAIN, WRONG))
    assert (plain["true"], plain["word"], wrong["true"], wrong["word"]) == (1, 0, 0, 1)
    assert sheet["image_64"].shape == (12, 3, 64, 64)
    assert len(sheet["caption"]) == 12
    blind = Cascade([Prior(), Painter()])
    refused(lambda: typographic(blind, data, paint, 0), "a prior that reads one")
    refused(lambda: typographic(cascade, HeldOut(["x"], {}), paint, 0), "scenes of one object")
    refused(lambda: typographic(Cascade([Prior(Reader())]), data, paint, 0), "64 px")

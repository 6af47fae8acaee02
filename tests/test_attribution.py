"""Claims about attribution: costs add up, and fall on the stage that makes the mistakes."""

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate, normalize

from cascade.conditioning import enlarge
from cascade.data.scenes.captions import caption
from cascade.data.scenes.generate import render, sample_scene
from cascade.draws import generator
from cascade.eval.cascades import protocol
from cascade.eval.cascades.attribution import BLOCKS, attribution, sentence, superresolution
from cascade.eval.cascades.protocol import HeldOut, distance, looking, picture_metrics
from cascade.eval.metrics.features import CLIPFeatures
from cascade.eval.metrics.measures import ATTRIBUTION, measures
from cascade.eval.scenes.recognizer import judge
from cascade.pipeline import Cascade

N, NAMES = 84, ["prior", "decoder", "sr"]


def picture(scene):
    return torch.from_numpy(render(scene, 64)).permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The same pictures are judged over and over."""
    known = {}

    def once(scene, picture):
        key = scene, picture.tobytes()
        if key not in known:
            known[key] = judge(scene, picture)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "judge", once)
        yield


@pytest.fixture(scope="module")
def data():
    drawn = (sample_scene("plain", "val", generator(0, "val", i)) for i in itertools.count())
    scenes = [
        next(scene for scene in drawn if scene.kind == kind) for kind in ("one", "two") * (N // 2)
    ]
    small = torch.stack([picture(scene) for scene in scenes])
    truth = {"image_64": small, "image_256": interpolate(small, scale_factor=4)}
    rng = torch.Generator().manual_seed(0)
    truth["clip_image"] = normalize(torch.randn(N, 4, generator=rng), dim=1)
    return HeldOut([caption(scene) for scene in scenes], truth, scenes)


class Judge:
    """Stands for the judging CLIP: colours of the picture, and letters of the caption."""

    name, hash, dim = "j", "0", 6

    def image(self, x):
        return normalize(torch.cat([x.mean((2, 3)), x.std((2, 3))], 1), dim=1)

    def text(self, captions):
        rows = [[caption.count(letter) + 0.1 for letter in "abcder"] for caption in captions]
        return {"clip_text": normalize(torch.tensor(rows), dim=1)}


FEATURES = CLIPFeatures(Judge())


@dataclass
class Painter:
    """Stands for a stage: looks up the truth by sample, and makes some of it wrong."""

    reads: frozenset
    writes: str
    make: object
    seen: list = field(default_factory=list)

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, progress=None):
        self.seen.append(len(batch["sample"]))
        return self.make(batch)


def recolored(scene, i):
    """Every third has one object in black, or not in it."""
    if i % 3:
        return scene
    first, *others = scene.objects
    color = "red" if any(o.color == "black" for o in scene.objects) else "black"
    return replace(scene, objects=(replace(first, color=color), *others))


def cascade(data, wrong_decoder=True, wrong_sr=False):
    """A prior that is never right, and two stages that make mistakes of their own, or none.

    The second follows what it is given.
    """

    def decoder(batch):
        rows = batch["sample"].tolist()
        scenes = [recolored(data.scenes[i], i) if wrong_decoder else data.scenes[i] for i in rows]
        return torch.stack([picture(scene) for scene in scenes])

    def sr(batch):
        large = interpolate(batch["image_64"], scale_factor=4)
        return -large if wrong_sr else large

    def prior(batch):
        return torch.zeros(len(batch["sample"]), 4)

    return Cascade(
        [
            Painter(frozenset({"caption"}), "clip_image", prior),
            Painter(frozenset({"clip_image"}), "image_64", decoder),
            Painter(frozenset({"image_64"}), "image_256", sr),
        ]
    )


def paint(cascade, captions, given, what):
    return cascade({"caption": captions, "sample": torch.arange(len(captions)), **given}, 0)


def attributed(whole, names, data, painted):
    look = looking(data, FEATURES)
    return attribution(whole, names, data, look(painted), look(data.truth), FEATURES, paint)


def table_of(whole, data):
    return attributed(whole, NAMES, data, paint(whole, data.captions, {}, ""))


@pytest.fixture(scope="module")
def table(data):
    return table_of(cascade(data), data)


@pytest.fixture(scope="module")
def dark(data):
    """Of a cascade whose last stage paints negatives."""
    return table_of(cascade(data, wrong_decoder=False, wrong_sr=True), data)


def test_rows_are_the_measures_of_what_is_painted_from_the_truth(data, table):
    assert [row["given"] for row in table["rows"]] == [
        ["caption"],
        ["caption", "clip_image"],
        ["caption", "clip_image", "image_64"],
        ["caption", "clip_image", "image_64", "image_256"],
    ]
    assert [row.get("stage") for row in table["rows"]] == [None, *NAMES]
    assert (table["count"], table["sizes"]) == (N, ["image_64", "image_256"])
    for row in table["rows"]:
        given = {key: data.truth[key] for key in row["given"][1:]}
        done = paint(cascade(data), data.captions, given, "")
        pictures = {key: done[key] for key in table["sizes"]}
        look = looking(data, FEATURES)
        real = {key: seen.rows for key, seen in look(data.truth).items()}
        expected = picture_metrics(look(pictures), data, real, FEATURES)
        for key in table["sizes"]:
            for name in ("count", "one", "two"):
                assert row[key][name] == expected[key][name]
            for name in ("frechet", "clip_score"):
                assert row[key][name] == pytest.approx(expected[key][name], abs=1e-9)


def test_costs_add_up_to_what_the_cascade_loses(table):
    first, last = table["rows"][0], table["rows"][-1]
    for key in table["sizes"]:
        costs = [row["cost"][key] for row in table["rows"][1:]]
        keys = [measure.key for measure in measures(ATTRIBUTION)]
        assert keys == list(costs[0])
        whole = {m: sum(cost[m]["cost"] for cost in costs) for m in keys}
        assert whole["frechet"] == pytest.approx(first[key]["frechet"], abs=1e-9)
        gained = last[key]["clip_score"] - first[key]["clip_score"]
        assert whole["clip_score"] == pytest.approx(gained, abs=1e-9)
        for kind in ("one", "two"):
            assert last[key][kind]["whole"] == 1.0
            assert whole[kind] == pytest.approx(1 - first[key][kind]["whole"], abs=1e-9)


def test_the_stage_that_errs_is_named_and_the_others_cost_nothing(data, table, dark):
    for key in table["sizes"]:
        prior, decoder, sr = (row["cost"][key] for row in table["rows"][1:])
        for measure in ("frechet", "one", "two"):
            assert prior[measure]["cost"] == pytest.approx(0, abs=1e-9)
            assert sr[measure]["cost"] == pytest.approx(0, abs=1e-9)
            low, high = decoder[measure]["interval"]
            assert 0 < low < decoder[measure]["cost"] < high
            assert table["dearest"][key][measure]["stage"] == "decoder"
            assert table["dearest"][key][measure]["sure"]
    wrong = [data.scenes[i].kind for i in range(0, N, 3)].count("one")
    of = len(data.kind("one"))
    assert table["rows"][2]["cost"]["image_64"]["one"]["cost"] == pytest.approx(wrong / of)
    said = sentence(table)
    assert said.startswith("At 256 px the stage that costs most is decoder in Fréchet distance (")
    assert f"decoder in scenes of one object ({wrong / of:.3g} of {wrong / of:.3g})" in said

    assert dark["dearest"]["image_256"]["two"]["stage"] == "sr"
    assert dark["dearest"]["image_64"] == {}  # nothing goes wrong before
    assert "sr in scenes of two objects (1 of 1)" in sentence(dark)


def test_a_stage_is_passed_over_where_its_work_is_given(data):
    whole = cascade(data)
    painted = paint(whole, data.captions, {}, "")
    attributed(whole, NAMES, data, painted)
    assert [len(stage.seen) for stage in whole.stages] == [1, 2, 3]


def test_intervals_are_those_of_means_of_blocks(data):
    """A mean's jackknife is the standard error of the blocks' means, if these are of one size."""
    some = data.first(4 * BLOCKS)
    texts = FEATURES.clip.text(some.captions)["clip_text"]
    done = some.truth["image_64"].roll(1, 0)
    gain = ((FEATURES(some.truth["image_64"]) - FEATURES(done)) * texts).sum(1).double()
    means = np.array([gain[b::BLOCKS].mean() for b in range(BLOCKS)])
    half = 2.0930240544 * means.std(ddof=1) / BLOCKS**0.5  # Student's t with 19 degrees
    one = Cascade([Painter(frozenset({"caption"}), "image_64", lambda b: done)])
    found = attributed(one, ["all"], some, {"image_64": done})
    cost = found["rows"][1]["cost"]["image_64"]["clip_score"]
    assert cost["cost"] == pytest.approx(gain.mean().item(), abs=1e-6)
    low, high = cost["interval"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
    assert (low + high) / 2 == pytest.approx(cost["cost"])
    assert found["sizes"] == ["image_64"]


def test_what_chance_loses_is_laid_at_no_door(data):
    """Cosines that go up and down by chance: the stage of the largest cost is none to name."""
    draws = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(data.truth["image_64"].shape, generator=draws)
    done = (data.truth["image_64"] + noise).clamp(-1, 1)
    one = Cascade([Painter(frozenset({"caption"}), "image_64", lambda b: done)])
    found = attributed(one, ["all"], data, {"image_64": done})
    low, _ = found["rows"][1]["cost"]["image_64"]["clip_score"]["interval"]
    assert (low > 0) == ("clip_score" in found["dearest"]["image_64"])
    for kind in ("one", "two"):  # which noise of this size does not hide
        assert kind not in found["dearest"]["image_64"]


def test_too_few_captions_have_measures_but_no_costs(data):
    few = data.first(20)
    found = table_of(cascade(data), few)
    assert found["rows"][0]["image_256"]["frechet"] is None  # 20 < 4 times 6
    assert found["rows"][1]["cost"]["image_256"] == {}
    assert "no measure shows a significant loss" in sentence(found)


def test_pictures_too_small_to_read_are_not_judged(data):
    small = {"image_16": torch.nn.functional.avg_pool2d(data.truth["image_64"], 4)}
    tiny = Cascade([Painter(frozenset({"caption"}), "image_16", lambda b: small["image_16"])])
    data = replace(data, truth={**data.truth, **small})
    found = attributed(tiny, ["decoder"], data, small)
    assert "one" not in found["rows"][0]["image_16"]
    assert found["rows"][0]["image_16"]["frechet"] == pytest.approx(0, abs=1e-9)


def test_superresolution_is_the_row_of_the_smallest_true_picture(data, dark):
    judge = FEATURES
    truth = looking(data, judge)(data.truth)
    found = superresolution(cascade(data), data, truth, dark, judge)
    done = interpolate(-data.truth["image_64"], scale_factor=4)
    bicubic = enlarge(data.truth["image_64"], 4).clamp(-1, 1)
    true = data.truth["image_256"]
    assert (found["from"], found["to"], found["count"]) == ("image_64", "image_256", N)
    assert found["frechet"] == pytest.approx(distance(judge, done, true), abs=1e-9)
    assert found["frechet_bicubic"] == distance(judge, bicubic, true)
    assert found["frechet_ratio"] == found["frechet"] / found["frechet_bicubic"]
    assert found["two"]["whole"] == 0.0
    one = Cascade(cascade(data).stages[1:2])
    assert superresolution(one, data, truth, dark, judge) is None


def test_the_first_rows_are_views(data):
    some = data.first(7)
    assert (len(some), len(some.scenes)) == (7, 7)
    assert some.truth["image_256"].data_ptr() == data.truth["image_256"].data_ptr()
    assert data.first(1000).captions == data.captions

"""Pictures of conditions against closed forms, and how what was painted is compared with them."""

import io
import tarfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.data.conditions import (
    PALETTE,
    Column,
    OfPicture,
    OfScene,
    depth,
    edges,
    labels,
    lines,
    scribble,
    segmentation,
)
from cascade.data.scenes.captions import Object, Scene
from cascade.data.scenes.drawing import COLORS, SHAPES, blank, paint
from cascade.data.scenes.generate import render, write_scenes
from cascade.data.shards import Shards
from cascade.data.transforms import BadSample, Pictures, scaled
from cascade.errors import UserError
from cascade.eval.cascades import control
from cascade.eval.cascades.protocol import HeldOut
from cascade.pipeline import Cascade

TWO = Scene(
    (
        Object("red", "circle", "large", 0.3, 0.5, 0.36),
        Object("blue", "square", "large", 0.7, 0.5, 0.36),
    ),
    "white",
    "left of",
)


def drawn(shape, color="red", side=128, diameter=0.6):
    picture = blank("white", side)
    paint(picture, SHAPES[shape], COLORS[color], 0.5, 0.5, diameter)
    return picture


@pytest.mark.parametrize("color", COLORS)
def test_the_edges_of_a_disc_are_its_circle(color):
    found = edges(drawn("circle", color))
    assert set(np.unique(found)) == {0, 255}
    y, x = np.argwhere(found[..., 0]).T + 0.5 - 64
    assert abs(np.hypot(x, y) - 0.3 * 128).max() < 1.2
    angles = np.sort(np.arctan2(y, x))
    assert np.diff(angles, append=angles[0] + 2 * np.pi).max() < 0.1  # in all directions
    assert len(x) < 1.2 * 2 * np.pi * 0.3 * 128  # a pixel wide


def test_edges_weaker_than_the_threshold_count_if_they_continue_a_strong_one():
    faint = np.full((64, 64, 3), 100, np.uint8)
    faint[:, 32:] += 30  # at most 30 / (2 pi)^(1/2) = 12 grey levels per pixel after the blur
    assert not edges(faint).any()
    fading = np.full((64, 64, 3), 100, np.uint8)
    fading[:, 32:] += np.linspace(120, 30, 64).astype(np.uint8)[:, None, None]
    assert edges(fading)[2:-2, 30:34, 0].any(1).all()


def test_lines_are_straight():
    assert not lines(drawn("circle"))[..., 0].any()
    for shape in ("square", "triangle"):
        all_, straight = (by(drawn(shape))[..., 0] > 0 for by in (edges, lines))
        assert not (straight & ~all_).any()
        assert straight.sum() > 0.35 * all_.sum()


def test_a_scribble_covers_the_edges_coarsely():
    found, asked = scribble(drawn("star"))[..., 0] > 0, edges(drawn("star"))[..., 0] > 0
    assert found[asked].all()
    assert control.f1(asked, found, 6.0) == 1


@pytest.mark.parametrize("side", [64, 256])
def test_a_segmentation_is_what_the_renderer_paints(side):
    found = segmentation(TWO, side)
    picture = render(TWO, side).astype(int)
    near = {o.shape: abs(picture - COLORS[o.color]).sum(2) < 40 for o in TWO.objects}
    for i, shape in enumerate(("circle", "square"), 1):
        own = (found == PALETTE[i]).all(2)
        assert (own & near[shape]).sum() / (own | near[shape]).sum() > 0.85
    assert (found == 0).all(2).sum() + (labels(TWO.objects, side) > 0).sum() == side**2


def test_depth_follows_the_order_of_painting():
    found = depth(TWO, 64)
    assert found[32, 19, 0] == 127
    assert found[32, 45, 0] == 255
    assert found[0, 0, 0] == 0


def test_conditions_are_cropped_as_the_pictures_are():
    same = {"same": OfPicture(lambda picture: picture, 32), "small": OfPicture(np.copy, 16)}
    pictures = Pictures((32, 16), crop=16, conditions=same)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    for seed in range(4):
        views = pictures.views(picture, np.random.default_rng(seed), ())
        assert torch.equal(views["control/same_32"], views["image_32"])
        assert (views["control/small_16"] - views["image_16"]).abs().max() <= 1 / 255 + 1e-6
        bare = Pictures((32, 16), crop=16).views(picture, np.random.default_rng(seed))
        assert all(torch.equal(views[key], value) for key, value in bare.items())


def test_a_condition_larger_than_the_pictures_leaves_them_as_they_are(tmp_path):
    write_scenes(tmp_path, "plain", "train", 4, 64, 0)
    by = {"edges": OfPicture(edges, 64), "depth": OfScene(depth, 32)}
    items = Shards(tmp_path, Pictures((16,), conditions=by), shuffle=False)
    for n in range(4):
        item = items[n]
        assert item["control/edges_64"].shape == (3, 64, 64)
        assert item["control/depth_32"].unique().tolist()[::2] in ([-1.0], [-1.0, 1.0])
        whole = Shards(tmp_path, Pictures((64,)), shuffle=False)[n]["image_64"]
        picture = ((whole + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        assert torch.equal(item["control/edges_64"], scaled(edges(picture)))


def tar_of(path, **members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("_", "."))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "png")
    return file.getvalue()


def test_a_column_is_a_further_file_of_each_sample(tmp_path):
    first, other = drawn("star"), drawn("heart", "blue")
    grey = np.full((128, 128, 3), 77, np.uint8)
    tar_of(
        tmp_path / "train-0.tar",
        a_png=png(grey), a_depth_png=png(first), a_txt=b"a", b_png=png(grey), b_txt=b"b",
        b_depth_png=png(other), b_mask_png=png(grey),
    )  # fmt: skip
    by = {"column": Column("depth.png", 128)}
    items = Shards(tmp_path, Pictures((16,), conditions=by), shuffle=False)
    for n, picture in enumerate((first, other)):
        assert torch.equal(items[n]["control/column_128"], scaled(picture))
    by = {"column": Column("mask.png", 128)}
    items = Shards(tmp_path, Pictures((16,), conditions=by), shuffle=False)
    assert [skip.reason for skip in items[0]["skipped"]] == ["no mask.png"]


def test_a_sample_without_a_scene_is_a_bad_one():
    sample = SimpleNamespace(shard="", key="", read=lambda member: b"{}")
    with pytest.raises(BadSample, match="no scene in its JSON"):
        OfScene(depth, 32)(None, sample)


def test_f1_and_mean_iou_equal_their_closed_forms():
    line = np.zeros((32, 32), bool)
    line[:, 8] = True
    assert control.f1(line, np.roll(line, 2, 1), 2.0) == 1
    assert control.f1(line, np.roll(line, 3, 1), 2.0) == 0
    assert control.f1(line, line | np.roll(line, 12, 1), 2.0) == pytest.approx(2 / 3)
    assert control.f1(line, np.zeros_like(line), 2.0) == 0
    one, other = np.zeros((2, 10, 10), int)
    one[:, :4], other[:, 2:6] = 1, 1
    assert control.mean_iou(one, other) == pytest.approx((2 / 6 + 4 / 8) / 2)
    other[0, 9] = 2  # a class of its own counts as missed
    assert control.mean_iou(one, other) == pytest.approx((20 / 60 + 39 / 80 + 0) / 3)


class Last:
    writes = "image_256"

    def encoded(self, batch): ...

    def sample(self, batch, seed, **choices): ...


def moved(scene, by):
    objects = (Object(o.color, o.shape, o.size, o.x + by, o.y, o.diameter) for o in scene.objects)
    return Scene(tuple(objects), scene.background, scene.relation)


def test_a_painter_that_follows_conditions_is_told_from_one_that_ignores_them():
    scenes = [TWO, moved(TWO, 0.05), moved(TWO, -0.05)]
    truth = torch.stack([scaled(render(scene, 256)) for scene in scenes])
    elsewhere = torch.stack([scaled(render(moved(scene, 0.08), 256)) for scene in scenes])
    data = HeldOut(["a red circle left of a blue square"] * 3, {"image_256": truth}, scenes)
    cascade = Cascade([Last()])
    given_to = []

    def paint(cascade, captions, given, what):
        given_to.append(set(given))
        return {"image_256": truth if given else elsewhere}

    by = {"edges": OfPicture(edges, 256), "shapes": OfScene(segmentation, 256)}
    found, shown = control.measure_control(cascade, by, data, paint, 3)
    assert given_to == [set(), {"control/edges_256"}, {"control/shapes_256"}]
    assert found["edges"]["asked"] == 1
    assert found["edges"]["uncontrolled"] < 0.4
    assert found["shapes"]["asked"] > 0.97
    assert found["shapes"]["uncontrolled"] < found["shapes"]["asked"] - 0.2
    assert found["edges"]["accuracy"]["rate"] == found["uncontrolled"]["accuracy"]["rate"] == 1
    assert found["edges"]["loss"] == 0
    assert shown["image_256"].shape == (len(shown["caption"]), 3, 256, 256)
    with pytest.raises(UserError, match="no stage reads a condition"):
        control.measure_control(cascade, {}, data, paint, 3)
    with pytest.raises(UserError, match="of which the data has none"):
        control.check(cascade, HeldOut(data.captions, data.truth), by)
    with pytest.raises(UserError, match="edges has 512 px, the pictures 256 px"):
        control.check(cascade, data, {"edges": OfPicture(partial(edges), 512)})

"""Claims about aspect-ratio buckets: the choice of one, the order of samples, sizes and crops."""

import io
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from cascade import cli
from cascade.batch import FRAMING
from cascade.buckets import Buckets
from cascade.codecs import Pixels
from cascade.conditioning import Conditioner, Extent, Label
from cascade.config.compose import built, composed
from cascade.data.loading import loader
from cascade.data.order import BucketOrder
from cascade.data.shards import Shards
from cascade.data.tars.dataset import index_folder
from cascade.data.tars.index import load, save
from cascade.data.transforms import Pictures, framed
from cascade.draws import generator
from cascade.errors import UserError
from cascade.formats.rgb import BadSample, upright
from cascade.formats.rgb import sides as header_sides
from cascade.pipeline import innermost
from cascade.runs.model import frame_asked, load_cascade, paint
from cascade.stage import WEIGHTS, Stage
from cascade.training.fit import train
from tests.small import DECODER, SR
from tests.test_shards import write


def test_shapes_have_about_one_area_and_whole_multiples():
    for size, multiple in ((64, 8), (16, 4), (256, 32), (1024, 64)):
        shapes = Buckets(size, batch=1, multiple=multiple).shapes
        assert (size, size) in shapes
        assert len(shapes) >= 3
        assert {(w, h) for h, w in shapes} == set(shapes)
        for h, w in shapes:
            assert h % multiple == w % multiple == 0
            assert abs(h * w / size**2 - 1) < multiple / size
            assert max(h, w) <= 2 * min(h, w)
    with pytest.raises(UserError, match="no multiple"):
        Buckets(60, batch=1)
    with pytest.raises(UserError, match="no whole pixels at 6 px"):
        Buckets(16, batch=1, multiple=4).at(6)
    assert Buckets(16, batch=1, multiple=4).at(64)[0] == (48, 80)


def test_a_picture_goes_to_the_bucket_of_nearest_ratio():
    buckets, rng = Buckets(64, batch=1), generator(0, "sides", 0)
    heights, widths = rng.integers(1, 3000, size=(2, 500))
    found = buckets.nearest(heights, widths)
    for h, w, b in zip(heights.tolist(), widths.tolist(), found.tolist()):
        distances = [abs(math.log((w / h) / (x / y))) for y, x in buckets.shapes]
        assert distances[b] == pytest.approx(min(distances), abs=1e-12)
    assert buckets.shapes[buckets.nearest([0], [0])[0]] == (64, 64)


def test_a_bucket_with_less_than_a_batch_goes_to_its_nearest():
    buckets = Buckets(64, batch=10)
    assert buckets.merged([10, 11, 12, 13, 14]).tolist() == [0, 1, 2, 3, 4]
    assert buckets.merged([9, 11, 12, 13, 14]).tolist() == [1, 1, 2, 3, 4]
    assert buckets.merged([0, 3, 12, 5, 4]).tolist() == [2, 2, 2, 2, 2]
    assert buckets.merged([0, 0, 12, 6, 4]).tolist() == [2, 2, 2, 3, 3]
    assert len(set(buckets.merged([1, 2, 3, 0, 1]).tolist())) == 1


def labels_of(counts, kinds, batch, seed=0):
    """Labels of tars, each kind at least a batch."""
    rng = generator(seed, "labels", 0)
    flat = rng.choice(
        kinds, size=sum(counts), p=np.arange(1, kinds + 1) / (kinds * (kinds + 1) / 2)
    )
    flat[: kinds * batch] = np.repeat(np.arange(kinds), batch)
    flat = rng.permutation(flat)
    return np.split(flat, np.cumsum(counts)[:-1])


@pytest.mark.parametrize(
    ("batch", "block", "shuffle"), [(9, 1, True), (9, 2, True), (1, 2, True), (4, 64, False)]
)
def test_each_batch_has_one_bucket_and_no_sample_is_lost(batch, block, shuffle):
    counts = (9, 0, 7, 11, 3, 5, 8)
    labels = labels_of(counts, 3, batch)
    order = BucketOrder(labels, 5, block, shuffle, batch)
    assert len(order) == sum(counts)
    of = {(tar, i): int(own[i]) for tar, own in enumerate(labels) for i in range(len(own))}
    totals = Counter(of.values())
    seen, read = Counter(), []
    for epoch in range(3):
        steps = sum((epoch + 1) * c // batch for c in totals.values())
        for n in range(len(read), steps * batch):
            read.append(next(order.places(n)))
            assert of[read[-1]] == order.bucket(n // batch * batch)
        seen = Counter(read)
        # A bucket is behind by less than a batch, which the next epoch begins with.
        assert all(epoch <= seen[place] <= epoch + 1 for place in of)
        for kind, total in totals.items():
            done = sum(times for place, times in seen.items() if of[place] == kind)
            assert done == (epoch + 1) * total - (epoch + 1) * total % batch
    again = BucketOrder(labels, 5, block, shuffle, batch)
    numbers = generator(1, "numbers", 0).permutation(len(read))[:60].tolist()
    assert [next(again.places(n)) for n in numbers] == [read[n] for n in numbers]
    if shuffle and batch > 1:
        kinds = [order.bucket(n) for n in range(0, len(read), batch)]
        assert kinds != sorted(kinds)
        other = BucketOrder(labels, 6, block, True, batch)
        assert [next(other.places(n)) for n in range(len(read))] != read


@pytest.mark.parametrize("block", [1, 3])
def test_tars_are_fetched_a_block_ahead(block):
    order = BucketOrder(labels_of((25, 9, 7, 31, 3, 8, 22), 3, 4), 5, block, True, 4)
    n, seen = 0, []
    while n < 120:
        (first, end), tars = order.ahead(n)
        assert first == n < end
        assert end % 4 == 0
        assert order.ahead(end - 1) == ((first, end), tars)
        seen += [next(order.places(m)) for m in range(n, end)]
        # What completes a batch is of the block; what begins one may be of those before.
        assert {next(order.places(end - 1))[0]} <= {*tars}
        n = end


def test_those_that_stand_in_are_of_the_bucket_and_each_comes_once():
    labels = labels_of((25, 9, 7), 3, 4)
    order = BucketOrder(labels, 5, 2, True, 4)
    for n in range(0, 80, 7):
        ring, kind = list(order.places(n)), order.bucket(n)
        members = {(t, i) for t, own in enumerate(labels) for i in np.flatnonzero(own == kind)}
        assert set(ring) == members
        assert len(ring) == len(members)


def ramp(height, width):
    """A picture whose red is its column and whose green is its row, from 0 to 255."""
    rows, columns = (np.arange(n) * 255 / (n - 1) for n in (height, width))
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = columns[None], rows[:, None]
    return pixels.round().astype(np.uint8)


def file_of(pixels, turn=1, form="PNG"):
    """A file that is shown as `pixels` by its EXIF orientation."""
    stored = next(
        one
        for view in (pixels, pixels.swapaxes(0, 1))
        for one in (view, view[::-1], view[:, ::-1], view[::-1, ::-1])
        if upright(one, turn).shape == pixels.shape and (upright(one, turn) == pixels).all()
    )
    file, exif = io.BytesIO(), Image.Exif()
    if turn > 1:
        exif[0x0112] = turn
    options = {"quality": 98, "subsampling": 0} if form == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(file, form, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_what_is_told_of_a_picture_is_where_its_pixels_are(turn, form):
    rng = generator(0, "corners", turn)
    for sides, shape in (((90, 151), (24, 24)), ((200, 40), (40, 24)), ((400, 600), (24, 40))):
        data = file_of(ramp(*sides), turn, form)
        assert header_sides(data) == sides
        part, told = framed(data, None, shape, lambda spare: int(rng.integers(spare + 1)))
        assert part.shape == (*shape, 3)
        assert told["original_size"] == sides
        assert told["target_size"] == shape
        scale = max(new / old for new, old in zip(shape, sides))
        for axis, channel in ((0, 1), (1, 0)):
            at, side = told["crop_corner"][axis], sides[axis]
            assert 0 <= at <= scale * side - shape[axis] + 1e-6
            place = (at + np.arange(shape[axis]) + 0.5) / scale - 0.5
            wanted = place * 255 / (side - 1)
            got = part[..., channel].mean(1 - axis)
            inside = slice(2, -2)  # the filter knows no pixels beyond the part
            slack = 1.5 if form == "PNG" else 2.5
            assert np.abs(got - wanted)[inside].max() < slack


def test_a_picture_is_centred_or_its_corner_drawn():
    data = file_of(ramp(32, 100))
    corners = {
        framed(data, None, (16, 20), partial(Buckets(16, 1, 4).place, rng=generator(0, "crop", n)))[
            1
        ]["crop_corner"]
        for n in range(200)
    }
    assert {top for top, _ in corners} == {0}
    assert {left for _, left in corners} == set(range(31))
    centre = partial(Buckets(16, 1, 4, crop="centre").place, rng=generator(0, "crop", 0))
    assert framed(data, None, (16, 20), centre)[1]["crop_corner"] == (0, 15)
    with pytest.raises(BadSample, match="too small"):
        framed(file_of(ramp(3, 4)), None, (16, 20), centre)


SIDES = [(24, 40), (40, 24), (32, 32), (30, 34), (20, 80), (36, 50), (50, 36)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three indexed tars of 21, 14 and 21 ramps of several aspects."""
    folder = tmp_path_factory.mktemp("buckets")
    for shard, count in enumerate((21, 14, 21)):
        members = []
        for i in range(count):
            height, width = SIDES[(i * i + shard) % 7]
            members += [(f"{i}.png", file_of(ramp(height, width))), (f"{i}.txt", b"a ramp")]
        write(folder / f"{shard:05d}.tar", members)
    index_folder(folder, lambda done, total: None)
    return folder


BUCKETS = Buckets(16, batch=8, multiple=4)


def opened(folder, pictures=None, **options):
    return Shards(folder, pictures or Pictures((16,)), block=2, buckets=BUCKETS, **options)


@pytest.mark.parametrize(("world", "workers", "micro"), [(1, 0, 8), (2, 0, 2), (4, 2, 1)])
def test_every_batch_of_every_rank_and_pass_of_a_step_has_one_shape(folder, world, workers, micro):
    shards, passes = opened(folder), 8 // (world * micro)
    ranks = [loader(shards, micro, rank, world, 0, 14 * passes, workers) for rank in range(world)]
    read = list(zip(*ranks))
    alone, shapes = opened(folder), []
    for step in range(14):
        parts = [part for row in read[step * passes : (step + 1) * passes] for part in row]
        assert len({part["image_16"].shape[2:] for part in parts}) == 1
        shapes.append(tuple(parts[0]["image_16"].shape[2:]))
        numbers = range(8 * step, 8 * step + 8)
        assert [n for part in parts for n in part["sample"].tolist()] == [*numbers]
        keys = [key for part in parts for key in part["key"]]
        assert keys == [alone[n]["key"] for n in numbers]
        for part in parts:
            assert part["target_size"].tolist() == [[*shapes[-1]]] * micro
    assert {*shapes} == {*BUCKETS.shapes}
    assert len(set(shapes[:4])) > 1


def test_pictures_of_all_sizes_are_of_one_part(folder):
    item = opened(folder, Pictures((16, 32)))[3]
    h, w = item["image_16"].shape[1:]
    assert item["image_32"].shape[1:] == (2 * h, 2 * w) == tuple(item["target_size"].tolist())
    small = F.interpolate(item["image_32"][None], (h, w), mode="bicubic", antialias=True)[0]
    assert torch.equal(item["image_16"], small.clamp(-1, 1))
    preview = next(iter(opened(folder).preview(1, [8])))
    assert preview["image_8"].shape == (3, 8, 8)
    assert "crop_corner" not in preview


def test_what_does_not_fit_buckets_ends_in_one_line(folder, tmp_path):
    for pictures in (Pictures(()), Pictures((16,), crop=8)):
        with pytest.raises(UserError, match="frames whole pictures"):
            opened(folder, pictures)
    with pytest.raises(UserError, match=r"no whole pixels at 6 px"):
        opened(folder, Pictures((6, 24)))
    with pytest.raises(UserError, match="square pictures"):
        opened(folder, cache=True)
    write(tmp_path / "0.tar", [("a.png", file_of(ramp(9, 9))), ("a.txt", b"a ramp")])
    remedy = f"sides of pictures: run `cascade data index {tmp_path}`"
    with pytest.raises(UserError, match=remedy):
        opened(tmp_path)
    index_folder(tmp_path, lambda done, total: None)
    assert opened(tmp_path)[0]["image_16"].shape == (3, 16, 16)
    save(replace(load(tmp_path / "0.tar"), sides=None))  # as an older version wrote it
    assert Shards(tmp_path, Pictures((8,)))[0]["key"] == "0/a"
    with pytest.raises(UserError, match=remedy):
        opened(tmp_path)
    index_folder(tmp_path, lambda done, total: None)
    assert load(tmp_path / "0.tar").sides.tolist() == [[9, 9]]


def test_sizes_and_crops_become_a_vector_and_sampling_has_a_default():
    torch.manual_seed(0)
    extents = {key: Extent(key, 8, features=6) for key in FRAMING}
    conditioner = Conditioner({**extents, "label": Label(3, 8)})
    rows = {"original_size": [[30, 50], [700, 20]], "crop_corner": [[0, 0], [0, 12]]}
    given = {key: torch.tensor(of) for key, of in rows.items()}
    given |= {"label": torch.tensor([0, 2]), "target_size": torch.tensor([[12, 20], [12, 20]])}
    vector = conditioner(given).vector
    expected = conditioner.embedders["label"].embed(given["label"])
    periods = [2 * math.pi, 2e2 * math.pi, 2e4 * math.pi]
    for key, extent in extents.items():
        angles = given[key].double()[:, :, None] * (2 * math.pi / torch.tensor(periods).double())
        waves = torch.cat([angles.cos(), angles.sin()], 2).flatten(1).float()
        expected = expected + extent.project(waves)
    torch.testing.assert_close(vector, expected, atol=1e-4, rtol=1e-4)
    asked = {"label": given["label"], "sample": torch.arange(2), "crop_corner": rows["crop_corner"]}
    full = conditioner.complete(asked, (3, 12, 20))
    assert full["crop_corner"] is rows["crop_corner"]
    assert full["original_size"].tolist() == full["target_size"].tolist() == [[12, 20]] * 2
    assert extents["crop_corner"].default(12, 20) == (0, 0)
    assert conditioner.null(given).vector.isfinite().all()
    with pytest.raises(UserError, match="choose one of original_size"):
        Extent("size", 8)


def test_an_index_turns_pictures_as_training_does(tmp_path):
    turned = json.dumps({"exif": json.dumps({"Image Orientation": "Rotated 90 CW"})}).encode()
    members = [("a.png", file_of(ramp(9, 20))), ("a.txt", b"a"), ("a.json", turned)]
    members += [("b.jpg", file_of(ramp(9, 20), 8, "JPEG")), ("b.txt", b"b")]
    members += [("c.png", b"<html>"), ("c.txt", b"c")]
    write(tmp_path / "0.tar", members)
    index_folder(tmp_path, lambda done, total: None)
    assert load(tmp_path / "0.tar").sides.tolist() == [[20, 9], [9, 20], [0, 0]]


def test_super_resolution_follows_the_shape_of_its_small_picture():
    stage = built(composed("train", [*SR, "data.path=none"]).stage).eval()
    rows = {"image_8": torch.zeros(2, 3, 12, 20), "sample": torch.arange(2)}
    assert stage.sample(rows, 0).shape == (2, 3, 24, 40)
    assert Pixels(16, buckets=BUCKETS).shape({"frame_16": torch.tensor([[12, 20]])}) == (3, 12, 20)
    assert Pixels(16, buckets=BUCKETS).shape({}) == (3, 16, 16)
    with pytest.raises(UserError, match="no whole pixels at 6 px"):
        Pixels(6, buckets=BUCKETS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["buckets=plain", "stage.codec.buckets=null"], r"stage.codec.buckets=None: set both"),
        (["buckets=sdxl", "data.buckets=null", "stage.codec.buckets=null"], "add buckets=sdxl"),
        (["buckets=plain", "+data.buckets.multiple=1"], "sides of 21 px are not multiples of 2"),
    ],
)
def test_parts_of_buckets_that_contradict_each_other_are_refused(overrides, message, tmp_path):
    own = [*DECODER[:1], *DECODER[2:], *overrides, f"data.path={tmp_path}", f"run={tmp_path / 'r'}"]
    with pytest.raises(UserError, match=message):
        train(composed("train", own))


STAGE = [
    "stage=decoder_text",
    *DECODER[2:],
    "buckets=sdxl",
    "batch=8",
    "+data.buckets.multiple=4",
    "save_seconds=0.0",
]


class Killed(BaseException):
    """No `except Exception` stops it."""


@pytest.mark.slow
def test_a_training_in_buckets_resumes_exactly_and_paints_their_shapes(
    folder, tmp_path, monkeypatch
):
    """20 steps, once with two passes a step; killed, and gone on with four passes."""

    def run(name, *overrides):
        paths = [f"data.path={folder}", f"run={tmp_path / name}"]
        return train(composed("train", [*STAGE, *paths, "images=160", *overrides]))

    def given(patch, kill_at=None):
        seen, step = [], Stage.training_step

        def training_step(self, batch, number):
            if number == kill_at:
                raise Killed
            seen.append((batch["sample"].tolist(), tuple(batch["image_16"].shape[2:])))
            return step(self, batch, number)

        patch.setattr(Stage, "training_step", training_step)
        return seen

    with monkeypatch.context() as patch:
        expected = given(patch)
        whole = run("whole", "micro_batch=4")
    assert {shape for _, shape in expected} == {*BUCKETS.shapes}
    with monkeypatch.context() as patch:
        before = given(patch, kill_at=18)
        with pytest.raises(Killed):
            run("killed", "micro_batch=4", "save_seconds=0.0")
    with monkeypatch.context() as patch:
        after = given(patch)
        killed = run("killed", "micro_batch=4", "save_seconds=0.0")
    assert before[: len(expected) - len(after)] + after == expected
    weights = [load_file(run / WEIGHTS) for run in (whole, killed)]
    assert all(torch.equal(a, weights[1][key]) for key, a in weights[0].items())
    with monkeypatch.context() as patch:
        halves = given(patch)
        run("other", "micro_batch=2", "images=32", "grids=1")
    numbers = [n for samples, _ in halves for n in samples]
    assert numbers == [n for samples, _ in expected for n in samples][:32]
    assert [shape for _, shape in halves[::2]] == [shape for _, shape in expected[:8]]

    (tmp_path / "cascade.yaml").write_text("stages: {whole: {}}\n")
    cascade = load_cascade(tmp_path)
    for aspect, shape in (("3:2", (12, 20)), ("1:1", (16, 16)), ("9:16", (20, 12))):
        rows = frame_asked(cascade, aspect, 2)
        pictures = paint(cascade, ["a ramp", "a square"], 0, given=rows)["image_16"]
        assert pictures.shape == (2, 3, *shape)
    sample = ["sample", "a ramp", "--model", str(tmp_path), "--out", str(tmp_path / "out.png")]
    assert cli.main([*sample, "--aspect", "3:2"]) == 0
    assert Image.open(tmp_path / "out.png").size == (20, 12)
    for aspect, message in (("3:1", "2:1 is the most"), ("3", "give width and height")):
        with pytest.raises(UserError, match=message):
            frame_asked(cascade, aspect, 2)
    painter = innermost(cascade.painter)
    painter.codec = Pixels(16)
    with pytest.raises(UserError, match="was trained on squares"):
        frame_asked(cascade, "3:2", 2)

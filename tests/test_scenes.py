"""Claims about the scenes: splits that never meet, pictures that agree at every size, shards."""

import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from cascade.data.scenes.captions import RELATIONS, Scene, caption, long_caption
from cascade.data.scenes.drawing import COLORS
from cascade.data.scenes.generate import (
    LEVELS,
    SIZES,
    SPLITS,
    UNSEEN,
    render,
    sample_scene,
    split_of,
    write_scenes,
)
from cascade.draws import generator
from cascade.errors import UserError


@pytest.fixture(scope="module")
def scenes():
    return {
        (level, split): [sample_scene(level, split, generator(0, split, i)) for i in range(1000)]
        for level in LEVELS
        for split in SPLITS
    }


def pairs(scene):
    return [(o.color, o.shape) for o in scene.objects]


def meaning(scene):
    """What a caption with several objects asks for, however it is said."""
    first, second = scene.objects[0], scene.objects[-1]
    if scene.relation in ("right of", "below"):
        return RELATIONS[scene.relation][1], *pairs(scene)[::-1]
    return (
        scene.relation,
        len(scene.objects),
        (first.color, first.shape),
        (second.color, second.shape),
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("words", [caption, long_caption])
def test_captions_of_the_splits_never_meet(scenes, level, words):
    seen = [{words(scene) for scene in scenes[level, split]} for split in SPLITS]
    assert all(len(captions) >= 20 for captions in seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


@pytest.mark.parametrize("level", LEVELS)
def test_a_held_out_meaning_is_held_out_in_every_wording(scenes, level):
    train, val = (
        {meaning(scene) for scene in scenes[level, split] if len(scene.objects) > 1}
        for split in ("train", "val")
    )
    assert val
    assert not train & val
    for scene in scenes[level, "val"][:300]:
        if scene.relation:
            mirrored = pairs(scene)[::-1], RELATIONS[scene.relation][1]
            assert {split_of(*mirrored, phrasing) for phrasing in range(3)} == {"val"}


@pytest.mark.parametrize(("level", "held_out"), [("plain", 4), ("full", 6)])
def test_unseen_pairs_occur_in_their_split_only(scenes, level, held_out):
    unseen = {(UNSEEN[shape], shape) for shape in LEVELS[level].shapes}
    every = {(color, shape) for color in COLORS for shape in LEVELS[level].shapes}
    assert len(unseen) == held_out
    for split in ("train", "val"):
        assert {pair for s in scenes[level, split] for pair in pairs(s)} == every - unseen
    assert {pair for s in scenes[level, "unseen"] for pair in pairs(s)} == unseen


def test_every_seen_pair_is_trained_alone_in_other_words_than_those_held_out(scenes):
    alone = {
        split: {pairs(s)[0] for s in scenes["plain", split] if s.kind == "one"}
        for split in ("train", "val")
    }
    assert alone["train"] == alone["val"]
    assert len(alone["train"]) == 28


@pytest.mark.parametrize("level", LEVELS)
def test_shares_of_the_kinds(scenes, level):
    shares = {split: np.mean([s.kind == "one" for s in scenes[level, split]]) for split in SPLITS}
    train = {"plain": 0.35, "full": 0.3, "written": 0.7, "language": 0.35}[level]
    expected = {"train": train, "val": 0.5, "unseen": 0.5}
    assert shares == pytest.approx(expected, abs=0.05)  # four standard errors
    kinds = Counter(s.kind for s in scenes[level, "train"])
    several = {"three"} if level in ("full", "language") else set()
    assert set(kinds) == {"one", "two", *several}


def test_plain_scenes_stand_at_fixed_places(scenes):
    for scene in scenes["plain", "train"]:
        toward = np.array(RELATIONS[scene.relation][0] if scene.relation else (0, 0))
        for sign, o in zip((1, -1), scene.objects):
            assert abs(np.array([o.x, o.y]) - 0.5 - 0.25 * sign * toward).max() <= 0.04
            assert o.size == "large"
        assert scene.background in ("white", "gray")
        assert not scene.names_size


def test_full_scenes_keep_their_relations_sizes_and_distances(scenes):
    for scene in scenes["full", "train"]:
        for i, o in enumerate(scene.objects):
            low, high = SIZES[o.size]
            assert low <= o.diameter <= high
            assert 0 < o.diameter / 2 < min(o.x, o.y, 1 - o.x, 1 - o.y)
            for p in scene.objects[:i]:
                assert max(abs(o.x - p.x), abs(o.y - p.y)) > (o.diameter + p.diameter) / 2
        if scene.relation:
            first, second = scene.objects
            x, y = RELATIONS[scene.relation][0]
            assert x * (first.x - second.x) + y * (first.y - second.y) > 0


def test_captions_say_what_is_there(scenes):
    for key, some in scenes.items():
        for scene in some[:300] if key[0] != "language" else ():  # see tests/test_language.py
            short, long = caption(scene), long_caption(scene)
            assert all(o.color in short and o.shape in short for o in scene.objects), key
            assert scene.background not in short
            assert scene.background in long
            assert long.count(" is large") + long.count(" is small") >= len(scene.objects)
            assert ("small" in short or "large" in short) == scene.names_size


def test_scenes_survive_json(scenes):
    for some in scenes.values():
        for scene in some[:100]:
            assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("small", [16, 32, 64, 128])
def test_a_small_picture_is_the_average_of_the_large_one(scenes, level, small):
    k = 256 // small
    for scene in scenes[level, "train"][:30]:
        large = render(scene, 256).reshape(small, k, small, k, 3).mean((1, 3))
        assert abs(large - render(scene, small)).max() < 1.01  # both are rounded


def test_the_largest_pictures_agree_but_for_single_pixels_at_corners(scenes):
    for scene in scenes["full", "train"][:5]:
        halved = render(scene, 1024).reshape(256, 4, 256, 4, 3).mean((1, 3))
        assert abs(halved - render(scene, 256)).mean() < 0.1


def test_edges_are_anti_aliased(scenes):
    scene = next(s for s in scenes["plain", "train"] if pairs(s)[0][1] == "circle")
    colors = np.unique(render(scene, 64).reshape(-1, 3), axis=0)
    assert len(colors) > 10


def written(folder, **changes):
    kwargs = {"level": "plain", "split": "train", "count": 25, "size": 32, "seed": 3}
    return write_scenes(folder, **{**kwargs, "shard_size": 10, **changes})


def test_shards_have_the_layout_of_img2dataset(tmp_path):
    shards = written(tmp_path)
    assert [shard.name for shard in shards] == [f"train-0000{i}.tar" for i in range(3)]
    with tarfile.open(shards[1]) as tar:
        names = tar.getnames()
        fields = json.load(tar.extractfile("000010004.json"))
        text = tar.extractfile("000010004.txt").read().decode()
    assert len(names) == 30
    scene = sample_scene("plain", "train", generator(3, "train", 14))
    assert Scene.from_json(fields["scene"]) == scene
    assert fields["caption"] == text == caption(scene)
    assert fields["long_caption"] == long_caption(scene)


def test_the_same_call_writes_the_same_bytes(tmp_path):
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_an_interrupted_call_goes_on_and_touches_no_whole_shard(tmp_path):
    class Interrupted(Exception):
        pass

    def stop(done):
        if done == 17:
            raise Interrupted

    with pytest.raises(Interrupted):
        written(tmp_path, progress=stop)
    first = tmp_path / "train-00000.tar"
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    before = first.stat().st_mtime_ns
    shards, done = written(tmp_path), []
    assert first.stat().st_mtime_ns == before
    whole = written(tmp_path / "whole", progress=done.append)
    assert [p.read_bytes() for p in shards] == [p.read_bytes() for p in whole]
    assert done[-1] == 25


@pytest.mark.parametrize("change", [{"seed": 4}, {"size": 16}, {"level": "full"}, {"count": 5}])
def test_a_shard_of_other_content_is_never_overwritten(tmp_path, change):
    shard = written(tmp_path, count=10)[0]
    before = shard.read_bytes()
    with pytest.raises(UserError, match="holds other scenes"):
        written(tmp_path, **{"count": 10, **change})
    assert shard.read_bytes() == before


def test_a_damaged_shard_is_refused(tmp_path):
    shard = written(tmp_path, count=10)[0]
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match="remove it"):
        written(tmp_path, count=10)


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="choose"):
        sample_scene("plain", "test", np.random.default_rng(0))

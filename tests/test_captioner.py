"""A captioner trained on scenes: what its captions say is scored by their facts."""

from collections import Counter
from itertools import islice

import pytest

from cascade.data.scenes.captions import long_caption
from cascade.eval.scenes import captioner
from cascade.eval.scenes.facts import facts_in, facts_of, share
from tests.test_language import OPPOSITE
from tests.test_language import read as read_short


@pytest.fixture(scope="module")
def scenes():
    return {
        (level, split): list(islice(captioner.scenes(level, split), 150))
        for level in ("plain", "full")
        for split in ("train", "val", "unseen")
    }


def test_a_true_caption_states_all_facts_of_its_scene_and_no_others(scenes):
    for some in scenes.values():
        for scene in some:
            assert facts_in(long_caption(scene)) == facts_of(scene), long_caption(scene)


def test_facts_of_short_captions_are_those_that_another_rule_reads(scenes):
    for scene in scenes["plain", "val"]:
        text = long_caption(scene)
        pairs, way, _ = read_short(text.partition(" on a plain")[0].lower())
        found = facts_in(text)
        assert Counter(fact[1:] for fact in found.elements() if fact[0] == "binding") == Counter(
            pairs
        )
        stated = [fact[1:] for fact in found if fact[0] == "relation"]
        if way in ("right of", "below"):
            pairs, way = pairs[::-1], OPPOSITE[way]
        assert stated == ([(*pairs[0], way, *pairs[1])] if way else [])


def test_wrong_and_missing_facts_are_counted_by_kind():
    text = "A red circle above a blue square on a plain white background. "
    rest = "The red circle is large and at the top. The blue square is large and at the bottom."
    true = facts_in(text + rest)
    assert true.total() == 9
    other = (text + rest).replace("red", "green").replace("white", "gray")
    found = share([(facts_in(other), true), (true, true)])
    assert found["background"] == 1 / 2
    assert found["binding"] == found["size"] == found["place"] == 3 / 4
    assert found["number"] == 1
    assert found["relation"] == 1 / 2
    assert share([(facts_in("nonsense"), true)])["all"] == 0


def test_twenty_steps_of_training_make_a_folder_that_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(captioner, "BATCH", 16)
    out = tmp_path / "blip"
    losses = captioner.train(out, "plain", 20 * 16, lr=2e-2, width=32, layers=1)
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    found = captioner.measured(out, "plain", "val", 8)
    assert 0 <= found["all"] <= 1

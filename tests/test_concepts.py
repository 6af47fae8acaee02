"""Pictures of concepts in styles are judged against true pictures, on exact features."""

import pytest
import torch
import torch.nn.functional as F

from cascade.eval.cascades import sections
from cascade.eval.cascades.concepts import Concepts, concepts_of
from cascade.eval.cascades.styles import Gallery, Label
from cascade.eval.pages.report import Report
from tests.test_styles import LABELS as SHOWN
from tests.test_styles import Seer, shards
from tests.test_styles import codes as of_shards

STYLES = ("flat", "drawn", "painted")
# Concept 0 is never trained, and concept 1 not in the style "painted".
LABELS = [Label(f"C{c}", s, f"{c}, {s}") for c in range(20) for s in STYLES]
HELD_OUT = [label for label in LABELS if label.concept == "C0" or label[:2] == ("C1", "painted")]
TRAINED = [label for label in LABELS if label not in HELD_OUT]


def codes(pairs):
    concepts = torch.eye(20)[[int(concept[1:]) for concept, *_ in pairs]]
    styles = torch.eye(3)[[STYLES.index(style) for _, style, *_ in pairs]]
    return F.normalize(torch.cat([concepts, styles], 1), dim=1)


@pytest.fixture(scope="module")
def known():
    labels = [*TRAINED, *HELD_OUT]
    return Concepts(Gallery(labels, codes(labels), seed=0), len(TRAINED))


def pairs(labels):
    return [label[:2] for label in labels]


def rates(found):
    return [found[name] for name in ("retrieval", "style", "both", "among_styles")]


def test_true_pictures_are_right_in_every_way_and_by_kind(known):
    asked = pairs([*HELD_OUT, *TRAINED[:5]])
    found = known.measured(codes(asked), asked)
    assert rates(found) == [1, 1, 1, 1]
    counts = {kind: row["count"] for kind, row in found["kinds"].items()}
    assert counts == {"trained": 5, "held-out pair": 1, "held-out concept": 3}
    assert found["truth"]["style"] == 1
    assert found["styles"] == 3


def test_the_wrong_style_and_the_wrong_concept_are_told_apart(known):
    asked = pairs(HELD_OUT)
    other = [(concept, STYLES[STYLES.index(style) - 1]) for concept, style in asked]
    assert rates(known.measured(codes(other), asked)) == [1, 0, 0, 0]
    other = [("C7", style) for _, style in asked]
    found = known.measured(codes(other), asked)
    assert rates(found) == [0, 1, 0, 1]  # of its own concept, the picture in that style is nearest
    assert found["nearest"]["concept"] == 0
    assert (found["nearest"]["style"], found["nearest"]["cosine"]) == (1, pytest.approx(1))


def test_the_nearest_training_picture_shows_what_was_copied(known):
    """A painter that gives a training picture of the concept, or of the style, is seen to."""
    asked = [("C1", "painted")]
    copied = known.measured(codes([("C1", "flat")]), asked)
    assert (copied["nearest"]["concept"], copied["nearest"]["style"]) == (1, 0)
    assert copied["nearest"]["cosine"] == pytest.approx(1)
    assert copied["nearest"]["true_cosine"] == pytest.approx(0.5)  # one of two numbers is shared
    assert copied["kinds"].keys() == {"held-out pair"}


def test_noise_is_at_chance(known):
    torch.manual_seed(0)
    asked = pairs(LABELS) * 10
    found = known.measured(F.normalize(torch.randn(len(asked), 23), dim=1), asked)
    for name, chance in (("retrieval", 1 / 20), ("style", 1 / 3), ("among_styles", 1 / 3)):
        low, high = found["intervals"][name]
        assert low < chance < high, name


def test_data_without_concepts_are_left_alone_and_the_report_has_a_table(known, tmp_path):
    bare = shards(tmp_path / "bare", {"val": SHOWN, "train": SHOWN}, fields=("concept",))
    assert concepts_of(bare, "val", Seer(), 16, 0) is None
    data = shards(tmp_path / "data", {"val": SHOWN[2:6], "train": SHOWN[:2]})
    found = concepts_of(data, "val", Seer(), 16, 0)
    assert found.trained == 2
    asked = [label[:2] for label in SHOWN[2:6]]
    assert rates(found.measured(of_shards(SHOWN[2:6]), asked)) == [1, 1, 1, 1]
    assert found.measured(of_shards(SHOWN[2:6]), asked)["kinds"].keys() == {"held-out concept"}
    asked = pairs(HELD_OUT)
    report = Report("made")
    sections.concepts(report, {"val": known.measured(codes(asked), asked)})
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "held-out pair" in text
    assert "asked concept" in text

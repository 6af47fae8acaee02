"""How edits of the style are judged, on features that are known exactly."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cascade.eval.cascades import styles
from cascade.eval.cascades.styles import GALLERY, SHARES, Gallery, Label, measure_styles, pairs_of
from cascade.pipeline import Cascade
from tests.hostile import refused

CONCEPTS, STYLES = GALLERY, ("drawn", "painted")
LABELS = [Label(f"C{c}", s, f"thing {c}, {s}") for c in range(CONCEPTS) for s in STYLES]


def codes(labels):
    """Exact features: one number for each concept, and one for each style."""
    concepts = torch.eye(CONCEPTS)[[int(label.concept[1:]) for label in labels]]
    drawn = torch.eye(len(STYLES))[[STYLES.index(label.style) for label in labels]]
    return F.normalize(torch.cat([concepts, drawn], 1), dim=1)


def test_exact_features_retrieve_their_own_picture_in_its_style():
    gallery, own = Gallery(LABELS, codes(LABELS), seed=0), list(range(len(LABELS)))
    found = gallery.judged(codes(LABELS), own)
    assert [found[name] for name in ("retrieval", "style", "both")] == [1, 1, 1]
    assert found["count"] == len(LABELS)
    other_style = codes([LABELS[i ^ 1] for i in own])
    found = gallery.judged(other_style, own)  # the concept is right, and the style wrong
    assert (found["retrieval"], found["style"]) == (1, 0)
    other_concept = codes([LABELS[i - 2] for i in own])
    found = gallery.judged(other_concept, own)
    assert (found["retrieval"], found["style"], found["both"]) == (0, 1, 0)
    low, high = found["intervals"]["retrieval"]
    assert (low, high) == (0, pytest.approx(1 / (1 + len(LABELS) / 1.95996**2), rel=1e-4))
    assert json.loads(json.dumps(found))["retrieval"] == 0


def test_features_without_information_retrieve_at_chance_and_ties_are_wrong():
    torch.manual_seed(0)
    labels = LABELS * 8
    gallery = Gallery(LABELS, codes(LABELS), seed=0)
    own = [i % len(LABELS) for i in range(len(labels))]
    noise = F.normalize(torch.randn(len(labels), CONCEPTS + 2), dim=1)
    found = gallery.judged(noise, own)
    low, high = found["intervals"]["retrieval"]
    assert low < 1 / GALLERY < high < 0.04
    assert found["style"] == pytest.approx(1 / len(STYLES), abs=0.04)
    same = torch.ones(4, CONCEPTS + 2) / (CONCEPTS + 2) ** 0.5
    assert not gallery.retrieved(same, own[:4]).any()


def test_rivals_are_of_the_same_style_and_other_concepts_and_depend_on_the_truth_alone():
    gallery = Gallery([*LABELS, *LABELS[:6]], torch.zeros(len(LABELS) + 6, 1), seed=0)
    for j in (6, 9, 100):
        drawn = gallery._drawn(j)
        assert drawn[0] == j
        assert len(set(drawn)) == GALLERY
        assert {gallery.labels[i].style for i in drawn} == {LABELS[j].style}
        assert LABELS[j].concept not in {gallery.labels[i].concept for i in drawn[1:]}
        assert gallery._drawn(j) == drawn
    assert gallery._drawn(6) != Gallery(gallery.labels, gallery.rows, seed=1)._drawn(6)


def shards(folder, splits, fields=("concept", "style")):
    """Tars by split, of pictures of 16 px whose grey level is the concept and colour the style."""
    folder.mkdir()
    for split, labels in splits.items():
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for i, label in enumerate(labels):
                about = {name: getattr(label, name) for name in fields}
                shade = np.full((16, 16, 3), int(label.concept[1:]), np.uint8)
                shade[..., STYLES.index(label.style)] += 100
                file = io.BytesIO()
                Image.fromarray(shade).save(file, "PNG")
                parts = {"png": file.getvalue(), "txt": label.caption.encode()}
                for kind, data in {**parts, "json": json.dumps(about).encode()}.items():
                    info = tarfile.TarInfo(f"{i:05d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_pairs_show_one_concept_in_two_styles(tmp_path):
    data = shards(tmp_path / "data", {"val": LABELS, "train": LABELS[:40:2], "once": LABELS[1::2]})
    sources, truths, pairs = pairs_of(data, "val", 20, seed=0)
    assert sources is truths
    assert [j for _, j in pairs] == list(range(20))
    for i, j in pairs:
        source, truth = sources.labels[i], truths.labels[j]
        assert (source.concept == truth.concept, source.style == truth.style) == (True, False)
        assert truth.caption == f"thing {truth.concept[1:]}, {truth.style}"
    sources, truths, pairs = pairs_of(data, "once", 20, seed=0)
    assert {label.style for label in truths.labels} == {"painted"}
    assert {sources.labels[i].style for i, _ in pairs} == {"drawn"}
    assert [sources.labels[i].concept for i, _ in pairs] == truths_of(truths, 20)
    few = shards(tmp_path / "few", {"val": LABELS[: 2 * GALLERY - 2]})
    refused(lambda: pairs_of(few, "val", 20, 0), "leave --edits out")
    bare = shards(tmp_path / "bare", {"val": LABELS}, fields=("concept",))
    refused(lambda: pairs_of(bare, "val", 20, 0), "`concept` and a `style`: leave --edits out")


def truths_of(truths, count):
    return [label.concept for label in truths.labels[:count]]


class Seer:
    """Features that show the concept and the style of such pictures exactly."""

    name, dim, hash, resize = "exact", CONCEPTS + 2, "none", "none"

    def __call__(self, pictures):
        shades = ((pictures + 1) * 127.5).round().long()[:, :, 0, 0]
        concept = shades[:, 2]
        style = (shades[:, 1] > shades[:, 0]).long()
        return codes([LABELS[2 * c + s] for c, s in zip(concept.tolist(), style.tolist())])


class Last:
    writes, reads, encoders = "image_16", frozenset({"clip_image"}), ()
    leads_away = False

    def encoded(self, batch):
        return batch

    def sample(self, batch, seed, **choices):
        raise AssertionError("pictures are given")


def test_the_share_that_retrieves_best_is_reported_beside_no_edit_and_the_truth(
    tmp_path, monkeypatch
):
    data = shards(tmp_path / "data", {"val": LABELS})
    _, truths, pairs = pairs_of(data, "val", 24, seed=0)
    right = truths.pictures([j for _, j in pairs], 16)
    wrong = truths.pictures([(j + 2) % len(LABELS) for _, j in pairs], 16)
    half = torch.cat([right[:12], wrong[12:]])

    def changed(self, before, wanted, shares, way):
        assert wanted == truths.captions([j for _, j in pairs])
        assert before == truths.captions([i for i, _ in pairs])
        assert tuple(shares) == SHARES
        return torch.stack([wrong, half, right, half], 1)

    monkeypatch.setattr("cascade.runs.editing.Work.changed", changed)
    monkeypatch.setattr(
        "cascade.runs.editing.Work.squares",
        lambda self: {"known/image_16": truths.pictures([i for i, _ in pairs], 16)},
    )
    monkeypatch.setattr(styles, "clip_of", lambda cascade: type("CLIP", (), {"image_size": 16}))
    cascade = Cascade([Last()])
    found, sheet = measure_styles(cascade, data, "val", Seer(), seed=0, count=24)
    style = found["style"]
    assert [row["retrieval"] for row in style["by_share"]] == [0, 0.5, 1, 0.5]
    assert (style["share"], style["retrieval"], style["style"]) == (SHARES[2], 1, 1)
    assert (style["none"]["retrieval"], style["none"]["style"]) == (1, 0)
    assert (style["truth"]["retrieval"], style["truth"]["style"]) == (1, 1)
    assert (style["over_chance"], style["over_none"]) == (GALLERY, 1)
    assert [row["reached"] for row in found["targets"]] == [True, False]
    assert sheet["image_16"].shape == (36, 3, 16, 16)
    assert torch.equal(sheet["image_16"][6:12], right[:6])
    assert sheet["caption"][6] == f"edited: {LABELS[0].caption}"
    assert sheet["caption"][12] == f"true: {LABELS[0].caption}"

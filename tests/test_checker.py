"""The checker: what matches a concept is refused or black, by the cosines that open_clip finds."""

import json

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cascade.cli import main
from cascade.data.scenes.captions import Object, Scene, caption
from cascade.data.scenes.drawing import COLORS
from cascade.data.scenes.generate import render
from cascade.encoders.clip import FrozenCLIP
from cascade.runs.checker import Checker, Concept
from tests.hostile import refused
from tests.test_batch_mates import with_clip
from tests.test_phrases import model  # noqa: F401

PURPLE = "a purple triangle"
SCENES = [
    Scene((Object(color, shape, "large", 0.5, 0.5, 0.35),), "white")
    for color in COLORS
    for shape in ("circle", "triangle")
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    with_clip(folder)
    return folder


@pytest.fixture(scope="module")
def cosines(folder):
    """Of each scene's caption and of its picture to a concept, by open_clip."""
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'clip'}")
    pictures = np.stack([render(scene, 32) for scene in SCENES])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        concept = F.normalize(theirs.eval().encode_text(tokenizer([PURPLE])), dim=1)
        texts = F.normalize(theirs.encode_text(tokenizer(list(map(caption, SCENES)))), dim=1)
        images = F.normalize(theirs.encode_image(x), dim=1)
    return (texts @ concept.T)[:, 0], (images @ concept.T)[:, 0], pictures


def between(values, k):
    """A threshold that the k largest values exceed."""
    ordered = values.sort(descending=True).values
    return ((ordered[k - 1] + ordered[k]) / 2).item()


def test_a_prompt_that_matches_is_refused(folder, cosines):
    texts = list(map(caption, SCENES))
    clip, limit = FrozenCLIP(str(folder / "clip")), between(cosines[0], 1)
    checker = Checker(clip, [Concept("a red square", picture=-0.9), Concept(PURPLE, limit)])
    assert texts[cosines[0].argmax()] == PURPLE
    checker.check([text for text in texts if text != PURPLE])
    said = refused(lambda: checker.check([*texts, "a red square"]))
    assert said.startswith(f"'{PURPLE}' matches '{PURPLE}'")


@pytest.mark.parametrize("k", [1, 5])
def test_a_picture_that_matches_is_black(folder, cosines, k):
    clip, (_, of_pictures, pictures) = FrozenCLIP(str(folder / "clip")), cosines
    limit = between(of_pictures, k)
    checker = Checker(clip, [Concept("a red square", prompt=-0.9), Concept(PURPLE, picture=limit)])
    black, found = checker.blackened(pictures)
    matches = (of_pictures > limit).tolist()
    assert found == [PURPLE if match else None for match in matches]
    for match, before, after in zip(matches, pictures, black):
        assert not after.any() if match else np.array_equal(after, before)


def written(folder, text):
    (folder / "checker.yaml").write_text(text)
    return folder / "checker.yaml"


def test_a_file_names_a_clip_beside_it_and_its_concepts(folder):
    file = written(folder, f"clip: clip\nconcepts:\n- {{text: {PURPLE}, prompt: 1, picture: .3}}\n")
    checker = Checker.load(file, CPU)
    assert checker.clip.name == str(folder / "clip")
    assert checker.concepts == (Concept(PURPLE, 1.0, 0.3),)
    other = Checker(checker.clip, [Concept(PURPLE, 1.0, 0.31)])
    assert Checker.load(file, CPU).identity == checker.identity != other.identity


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clip: clip\n", "concepts: give clip, and"),
        ("clip: clip\nconcepts: a star", "concepts"),
        ("concepts: [{text: a star, prompt: 0.5}]", "clip"),
        ("clip: clip\nconcepts: []", "no concepts"),
        ("clip: clip\nconcepts: [a star]", "give clip, and concepts as a list"),
        ("clip: clip\nconcepts: [{prompt: 0.5}]", "text"),
        ("clip: clip\nconcepts: [{text: a star}]", "thresholds above -1"),
        ("clip: clip\nconcepts: [{text: '', prompt: 0.5}]", "thresholds above -1"),
        ("clip: clip\nconcepts: [{text: a star, prompt: 1.5}]", "thresholds above -1"),
        ("clip: clip\nconcepts: [{text: a star, prompt: high}]", "give a number"),
        ("clip: clip\nconcepts: [{text: a star, prompts: 0.5}]", "prompts"),
        ("clip: clip\nthreshold: 1\nconcepts: [{text: a star, prompt: 0.5}]", "threshold"),
        ("clip: [clip", "damaged"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, text, says):
    said = refused(lambda: Checker.load(written(tmp_path, text), CPU), says)
    assert "checker.yaml" in said
    refused(lambda: Checker.load(tmp_path / "none.yaml", CPU), "is not there")


def test_a_clip_that_is_not_there_is_refused(tmp_path):
    file = written(tmp_path, "clip: nowhere\nconcepts: [{text: a star, prompt: 0.5}]")
    refused(lambda: Checker.load(file, CPU).check(["a star"]), "nowhere is neither")


def test_the_commands_refuse_and_blacken_and_count(model, folder, tmp_path, capsys):  # noqa: F811
    one, all_ = tmp_path / "one.yaml", tmp_path / "all.yaml"
    clip = f"clip: {folder / 'clip'}\nconcepts: "
    one.write_text(f"{clip}[{{text: {PURPLE}, prompt: 0.9999}}]\n")
    all_.write_text(f"{clip}[{{text: {PURPLE}, picture: -0.99}}]\n")
    out = tmp_path / "out.png"
    argv = ["sample", "--model", str(model), "--out", str(out), "--checker"]
    assert main([*argv, str(one), PURPLE]) == 2
    assert f"'{PURPLE}' matches '{PURPLE}'" in capsys.readouterr().err
    assert not out.exists()
    assert main([*argv, str(one), "a star"]) == 0
    assert np.asarray(Image.open(out)).any()
    assert "0 of 1 pictures match" in capsys.readouterr().out
    assert main([*argv, str(all_), PURPLE, "--overwrite"]) == 0
    assert not np.asarray(Image.open(out)).any()
    assert "1 of 1 pictures match" in capsys.readouterr().out

    (tmp_path / "prompts.txt").write_text(f"{PURPLE}\na star\n")
    argv = ["generate", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--out", str(tmp_path / "set"), "--checker"]
    assert main([*argv, str(one)]) == 2
    assert not (tmp_path / "set").exists()
    for _ in range(2):  # pictures that were made before count as well
        assert main([*argv, str(all_)]) == 0
        assert "2 of them match" in capsys.readouterr().out
        (tmp_path / "set" / "00001_0000.png").unlink()
    assert "checker" in json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert main(argv[:-1]) == 2
    assert "checker: " in capsys.readouterr().err

"""A model leaves as a folder of its own, and paints the same pictures elsewhere."""

import json
import os
import shutil
import subprocess

import pytest
import yaml
from safetensors.torch import load_file

from cascade.cli import main
from cascade.encoders.text import tokenize
from cascade.export.tokenizer import clip_tokenizer
from cascade.runs.run import Run
from tests.models import write_model

CAPTIONS = ["a red circle", "two blue squares above a star"]


def painted(model, out):
    assert main(["sample", "--model", str(model), *CAPTIONS, "--n", "2", "--out", str(out)]) == 0
    return out.read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The exported folder, elsewhere, and the picture that the removed original painted."""
    root = tmp_path_factory.mktemp("model")
    write_model(root / "here/mine")
    before = painted(root / "here/mine", root / "before.png")
    command = ["export", "--model", str(root / "here/mine"), "--format", "card"]
    assert main([*command, "--out", str(root / "out"), "--license", "apache-2.0"]) == 0
    shutil.rmtree(root / "here")
    os.rename(root / "out", root / "elsewhere")
    return root / "elsewhere", before


def test_it_paints_the_same_pictures_without_the_original(exported, tmp_path, monkeypatch):
    folder, before = exported
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()  # which is not the CLIP, although it has its name
    assert painted(folder, tmp_path / "after.png") == before


def test_no_file_names_a_place_of_the_machine_it_came_from(exported):
    folder, _ = exported
    for file in folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            for place in (b"/data/secret", b"/here/", str(folder.parent).encode()):
                assert place not in data, (file, place)


def test_all_weights_are_safetensors_and_all_hashes_agree(exported):
    folder, _ = exported
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {
        "README.md", "cascade.yaml", "SHA256SUMS", "prior/config.yaml", "decoder/config.yaml",
        "prior/weights.safetensors", "decoder/weights.safetensors", "early/weights.safetensors",
        "clip/open_clip_config.json", "clip/open_clip_model.safetensors",
        "tokenizer/tokenizer.json",
    } <= names  # fmt: skip
    assert not {name for name in names if name.endswith((".bin", ".pt", ".ckpt"))}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    assert len((folder / "SHA256SUMS").read_text().splitlines()) == len(names) - 1


def test_the_card_says_what_it_is(exported):
    folder, _ = exported
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-to-image"
    assert "unclip" in front["tags"]
    assert Run(folder / "prior").load().encoders[0].hash in text
    assert "| decoder | image_16 |" in text
    assert "scale 2.0, weaker early" in text
    assert "## Numbers" not in text


def test_a_training_can_begin_with_an_exported_stage(exported):
    from cascade.runs.start import training

    folder, _ = exported
    config = training([f"start={folder / 'prior'}", "run=x", "data.path=shards"])
    assert config.embeddings == "shards/embeddings"
    assert config.data.embeddings.clip.folder == "shards/embeddings"
    assert config.clip.path == f"{folder / 'prior'}/../clip"
    assert config.stage.encoders[0].path_or_name == config.clip.path
    assert config.stage.net == Run(folder / "prior").config.net


def test_the_tokenizer_for_other_programs_has_the_same_tokens(exported):
    from transformers import CLIPTokenizer

    texts = ["a red circle", "wow! Ünï (quoted)...  two\nlines", "🙂 1234 it's a-b_c", "", "!" * 9]
    for tokenizer in (clip_tokenizer(77), CLIPTokenizer.from_pretrained(exported[0] / "tokenizer")):
        for text in texts:
            own = tokenize([text], 77)[0]
            end = int(own.argmax())
            assert tokenizer(text).input_ids == own[: end + 1].tolist()


@pytest.fixture
def model(tmp_path):
    write_model(tmp_path / "mine")
    return tmp_path / "mine"


def refused(argv, capfd):
    assert main(argv) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_nothing_is_overwritten_or_left_behind(model, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "exists" in refused(["export", "--model", str(model), "--out", str(out)], capfd)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    (model / "clip/open_clip_model.safetensors").write_bytes(b"0" * 64)
    refused(["export", "--model", str(model), "--out", str(tmp_path / "new")], capfd)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_numbers_come_with_their_protocol_and_never_from_older_weights(model, tmp_path, capfd):
    row = {"count": 40, "frechet": 0.125, "intervals": {"frechet": [0.1, 0.15]}}
    metrics = {
        "features": "CLIP features of /home/me/judge, aab30c59",
        "captions": {"val": 20},
        "captions_are": {"val": "held-out captions"},
        "seed": 3,
        "choices": ["decoder.steps=9"],
        "val": {"image_16": row, "count": 40},
    }
    (model / "metrics.json").write_text(json.dumps(metrics))
    command = ["export", "--model", str(model), "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert "licence is unknown" in capfd.readouterr().out
    card = (tmp_path / "one/README.md").read_text()
    assert "license: unknown" in card
    assert "| 0.125 | 0.1 to 0.15 | 40 |" in card
    assert "Seed 3" in card
    assert "CLIP features of judge, aab30c59" in card
    assert "decoder.steps=9" in card
    os.utime(model / "metrics.json", (1, 1))
    assert main([*command, str(tmp_path / "two")]) == 0
    assert "is older than the weights" in capfd.readouterr().out
    assert "0.125" not in (tmp_path / "two/README.md").read_text()


def test_imported_weights_keep_their_licence(model, tmp_path):
    (model / "prior/origin.json").write_text(json.dumps({"license": "creativeml-openrail-m"}))
    command = ["export", "--model", str(model), "--license", "mit", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "license: other" in card
    assert "`prior`: licence creativeml-openrail-m" in card
    assert "`decoder`: licence mit" in card


def test_the_weights_are_those_of_the_run(model, tmp_path):
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "out")]) == 0
    one, other = (load_file(f / "decoder/weights.safetensors") for f in (model, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all((one[key] == other[key]).all() for key in one)

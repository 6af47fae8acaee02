"""The command line as a user meets it: help at once, errors in one line, exit code 2."""

import subprocess
import sys

import pytest
import webdataset

from cascade.cli import main, parser
from cascade.data.shards import Shards, loader
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.verbs import sample, train

VERBS = ("train", "sample", "evaluate", "data", "describe", "demo", "sweep", "launch", "runs")
VERBS += ("cells", "generate", "report")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from cascade.cli import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'lightning', 'numpy', 'hydra', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train"], capture_output=True, text=True, check=True
    )
    assert "override" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([verb, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 150


def refused(argv, capsys):
    code = main(argv)
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert error.startswith("cascade: ")
    assert "\n" not in error
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.path=nowhere"], "nowhere: no .tar"),
        ([], "data.path"),
        (["data.path=x", "stage=decodr"], "decoder"),  # what there is
        (["data.path=x", "net=unet_gigantic"], "unet_tiny"),
        (["data.path=x", "net.chanels=3"], "chanels"),
        (["data.path=x", "batch=0"], "batch"),
        (["data.path=x", "optim.lr"], "optim.lr"),
    ],
)
def test_train_refuses(overrides, says, tmp_path, capsys):
    assert says in refused(["train", f"run={tmp_path / 'run'}", *overrides], capsys)
    assert not (tmp_path / "run").exists()


def test_train_refuses_an_empty_folder(tmp_path, capsys):
    assert "no .tar is there" in refused(["train", f"data.path={tmp_path}"], capsys)


def test_what_a_data_worker_raises_is_one_line_as_well(tmp_path, capsys, monkeypatch):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as tar:
        tar.write({"__key__": "a", "png": b"no picture", "txt": "a caption"})

    def reading(args):
        next(iter(loader(Shards(tmp_path, Pictures((16,))), batch=1, workers=1)))

    monkeypatch.setattr(train, "main", reading)
    monkeypatch.setenv("CASCADE_FAILURE", str(tmp_path / "failure.txt"))
    said = refused(["train"], capsys)
    assert said.startswith("cascade: all samples are bad from train-0/a on (")
    assert said == "cascade: " + (tmp_path / "failure.txt").read_text().strip()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["a red circle", "--model", "nowhere"], "nowhere is not a run"),
        (["  ", "--model", "nowhere"], "caption 1 is empty"),
        (["x" * 10_000, "--model", "nowhere"], "10,000 characters"),
        (["--model", "nowhere"], "no caption"),
        (["a", "--model", "nowhere", "--file", "missing.txt"], "missing.txt"),
        (["a \udcfc", "--model", "nowhere"], "caption 1 is not in the terminal's encoding"),
        (["a", "--model", "nowhere", "--out", "picture.gif"], ".png"),
        (["a", "--model", "nowhere", "--n", "0"], "at least 1"),
    ],
)
def test_sample_refuses(argv, says, capsys):
    assert says in refused(["sample", *argv], capsys)


@pytest.mark.parametrize("form", ["{}\n", "p{n}\t{}\r\n"])
def test_captions_of_a_file_are_one_a_line_and_ids_are_not_painted(form, tmp_path, monkeypatch):
    found = []

    def painted(captions):
        found.extend(captions)
        raise UserError("enough")

    monkeypatch.setattr(sample, "checked", painted)
    texts = [f"a red{s}circle" for s in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"] + ["über"]
    lines = [form.replace("{n}", str(n)).replace("{}", text) for n, text in enumerate(texts)]
    (tmp_path / "a.txt").write_bytes("".join(lines).encode("utf-16"))
    assert main(["sample", "--model", "nowhere", "--file", str(tmp_path / "a.txt")]) == 2
    assert found == ["a red circle"] * 8 + ["über"]


def test_sample_writes_over_nothing(tmp_path, capsys):
    out = tmp_path / "mine.png"
    out.write_bytes(b"precious")
    argv = ["sample", "a red circle", "--model", str(tmp_path), "--out", str(out)]
    assert "exists" in refused(argv, capsys)
    assert out.read_bytes() == b"precious"

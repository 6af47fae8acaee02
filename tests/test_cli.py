"""The command line as a user meets it: help at once, errors in one line, exit code 2."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from cascade.cli import main, parser
from cascade.data.shards import Shards, loader
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.files import check_writable
from cascade.verbs import train

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
        (["a", "--model", "nowhere", "--out", "picture.gif"], ".png"),
        (["a", "--model", "nowhere", "--n", "0"], "at least 1"),
    ],
)
def test_sample_refuses(argv, says, capsys):
    assert says in refused(["sample", *argv], capsys)


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "a red circle", "--model", "nowhere", "--out", "PLACE/out.png"],
        ["generate", "--model", "nowhere", "--prompts", "PROMPTS", "--out", "PLACE"],
        ["evaluate", "--model", "no", "--data", "no", "--judge", "no", "--out", "PLACE"],
        ["evaluate", "--pictures", "nowhere", "--out", "PLACE"],
        ["train", "data.path=nowhere", "run=PLACE"],
        ["train", "data.path=nowhere", "run=PLACE", "launcher=local"],
        ["launch", "cascade=demo", "data.path=nowhere", "run=PLACE"],
        ["sweep", "sweep=guidance", "run=PLACE"],
        ["demo", "run=PLACE"],
        ["data", "scenes", "PLACE", "--train", "1"],
        ["data", "pack", "PLACE", "--pictures", "FOLDER"],
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(argv, tmp_path, capsys):
    (tmp_path / "file").write_text("a red circle")
    given = {"PLACE": tmp_path / "file" / "out", "PROMPTS": tmp_path / "prompts.txt"}
    given["PROMPTS"].write_text("a red circle")
    given["FOLDER"] = tmp_path
    for word, path in given.items():
        argv = [a.replace(word, str(path)) for a in argv]
    before = sorted(tmp_path.rglob("*"))
    said = refused(argv, capsys)
    assert str(tmp_path / "file") in said
    assert "Not a directory" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_whether_a_place_can_be_written_to_is_asked_without_a_trace(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UserError, match="dangling"):
        check_writable(tmp_path / "dangling" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]

    def refuse(path, **_):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*a \(.*Read-only file system\): give"):
        check_writable(tmp_path / "a", "give another --out")


def test_what_a_disk_refuses_is_one_line(tmp_path, capsys, monkeypatch):
    def reading(args):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr(train, "main", reading)
    assert f"{tmp_path / 'x'}: Permission denied: check" in refused(["train"], capsys)


def test_sample_writes_over_nothing(tmp_path, capsys):
    out = tmp_path / "mine.png"
    out.write_bytes(b"precious")
    argv = ["sample", "a red circle", "--model", str(tmp_path), "--out", str(out)]
    assert "exists" in refused(argv, capsys)
    assert out.read_bytes() == b"precious"

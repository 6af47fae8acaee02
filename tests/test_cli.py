"""The command line as a user meets it: help at once, errors in one line, exit code 2."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset

from cascade import cli
from cascade.cli import main, parser
from cascade.data.loading import loader
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.files.atomic import check_writable
from cascade.verbs import sample, train

VERBS = ("train", "sample", "evaluate", "data", "describe", "demo", "sweep", "launch", "runs")
VERBS += ("measure", "generate", "report")


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


def test_an_earlier_name_of_a_verb_is_understood_and_not_listed(capsys):
    assert parser().parse_args(["cells", "frozen.yaml"]).verb == "measure"
    assert "cells" not in parser().format_help()


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


@pytest.mark.parametrize(
    "argv",
    [
        ["sample", "a red circle", "--model", "nowhere", "--out", "PLACE/out.png"],
        ["generate", "--model", "nowhere", "--prompts", "PROMPTS", "--out", "PLACE"],
        ["evaluate", "--model", "no", "--data", "no", "--judge", "FOLDER", "--out", "PLACE"],
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


@pytest.mark.parametrize("form", ["{}\n", "p{n}\t{}\r\n"])
def test_captions_of_a_file_are_one_a_line_and_ids_are_not_painted(form, tmp_path, monkeypatch):
    found = []

    def painted(captions, *_):
        found.extend(captions)
        raise UserError("enough")

    monkeypatch.setattr(sample, "captions_asked", painted)
    texts = [f"a red{s}circle" for s in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"] + ["über"]
    lines = [form.replace("{n}", str(n)).replace("{}", text) for n, text in enumerate(texts)]
    (tmp_path / "a.txt").write_bytes("".join(lines).encode("utf-16"))
    assert main(["sample", "--model", "nowhere", "--file", str(tmp_path / "a.txt")]) == 2
    assert found == ["a red circle"] * 8 + ["über"]


@pytest.mark.parametrize(
    ("verb", "options", "needs"),
    [
        ("evaluate --pictures x --dino d", "--data=s", "--model"),
        ("evaluate --pictures x --dino d", "--judge=j", "--model"),
        ("evaluate --pictures x --dino d", "--split=val", "--model"),
        ("evaluate --pictures x --dino d", "--count=320", "--model"),
        ("evaluate --pictures x --dino d", "--guidance=1", "--model"),
        ("evaluate --pictures x --dino d", "--geneval=0", "--model"),
        ("evaluate --pictures x --dino d", "--seed=0", "--model"),
        ("evaluate --pictures x --dino d", "--set=decoder.scale=3", "--model"),
        ("evaluate --model x --data s --judge j", "--reference=r", "--pictures"),
        ("evaluate --model x --data s --judge j", "--inception=w", "--pictures"),
        ("evaluate --model x --data s --judge j", "--clip=c", "--pictures"),
        ("evaluate --model x --data s --judge j", "--dino=d", "--pictures"),
        ("evaluate --model x --data s --judge j", "--resize=clean", "--pictures"),
        ("evaluate --model x --data s --judge j", "--cache=c", "--pictures"),
        ("evaluate --model x --data s --judge j", "--shard=0/2", "--pictures"),
        ("evaluate --model x --data s --judge j", "--bootstrap=200", "--reference or --inception"),
        ("evaluate --pictures x --clip c", "--bootstrap=0", "--reference or --inception"),
        ("evaluate --pictures x --dino d", "--captions=c.csv", "--clip"),
        ("evaluate --pictures x --dino d", "--checkpoint=c.pt", "--clip"),
        ("evaluate --pictures x --dino d", "--quick-gelu=false", "--clip"),
        ("data pack x --pictures p", "--file-column=a", "--captions"),
        ("data pack x --pictures p", "--caption-columns=a", "--captions"),
        ("data precompute x --text t", "--out=o", "--clip"),
        ("data precompute x --clip c", "--text-out=o", "--text"),
        ("data precompute x --clip c", "--length=256", "--text"),
        ("data precompute x --clip c", "--bf16", "--text"),
        ("data precompute x --clip c", "--layer=mean", "--text"),
        ("sweep sweep=captions", "--price=2", "--dry-run"),
        ("data precompute x", "--checkpoint=c.pt", "--clip or --text"),
        ("data precompute x", "--quick-gelu=true", "--clip or --text"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(verb, options, needs, capsys):
    option = options.split("=")[0]
    error = refused([*verb.split(), options], capsys)
    assert f"{option} has no effect without {needs}" in error


@pytest.mark.parametrize("of", ["--clip", "--text"])
def test_a_checkpoint_is_for_a_name(of, tmp_path, capsys):
    for option in ("--checkpoint=missing.pt", "--quick-gelu=true"):
        error = refused(["data", "precompute", "x", of, str(tmp_path), option], capsys)
        assert "is for a name of open_clip's" in error
        assert "would be ignored" in error


def test_every_option_of_evaluate_is_of_pictures_or_of_a_model_or_said_to_be_of_both():
    """A new option has to be put into the table of what needs what, or it may be ignored."""
    options = set(vars(parser().parse_args(["evaluate", "--model", "x"])))
    both = {"code", "trust", "verb", "module", "model", "pictures", "config"}
    assert options - both == set(cli._NEEDS["evaluate"])


def test_show_prints_no_launcher(capsys):
    argv = ["train", "--show", "data.path=x", "launcher=slurm"]
    assert "omit launcher=slurm" in refused(argv, capsys)


def test_sample_writes_over_nothing(tmp_path, capsys):
    out = tmp_path / "mine.png"
    out.write_bytes(b"precious")
    argv = ["sample", "a red circle", "--model", str(tmp_path), "--out", str(out)]
    assert "exists" in refused(argv, capsys)
    assert out.read_bytes() == b"precious"

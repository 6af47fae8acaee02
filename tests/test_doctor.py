"""What `cascade doctor` finds: nothing in what is sound, and each fault that is put into it."""

import fcntl
import io
import json
import os
import shutil
import subprocess
import tarfile
import threading
from collections import namedtuple
from dataclasses import asdict
from importlib import metadata

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.data.tars.dataset import index_folder
from cascade.doctor import installation, machine, output, probe
from cascade.doctor.finding import Budget, guarded
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError
from cascade.files import processors
from cascade.files.locks import ClaimFiles, Holder
from cascade.training import fit
from tests import small
from tests.test_text import write_t5

SMALL = small.DECODER

SOUND = {"broken": {}, "built": "13.0", "driver": 0, "card": False, "hidden": False}
SOUND |= {"devices": [], "unsupported": [], "complaint": ""}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Indexed shards with a held-out split, and a model of one stage that was trained on them."""
    folder = tmp_path_factory.mktemp("sound")
    for split, count in (("train", 20), ("val", 4)):
        write_scenes(folder / "shards", "plain", split, count, 64, seed=0, shard_size=10)
    index_folder(folder / "shards", lambda done, total: None)
    own = [f"data.path={folder / 'shards'}", f"clip.path={folder / 'model' / 'clip'}", *SMALL]
    config = composed("train", [*own, f"run={folder / 'model' / 'decoder'}", "images=8"])
    torch.manual_seed(0)
    clip = built(config.clip.model)
    save_clip(clip, clip.build(), folder / "model" / "clip")
    fit.train(config)
    text = OmegaConf.to_yaml({"stages": {"decoder": {"steps": 4, "scale": 2.0}}})
    (folder / "model" / "cascade.yaml").write_text(text)
    return folder.rename(folder.with_name("moved"))  # so that copies are read, not this


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A copy to damage, where nothing else is to be found out."""
    shutil.copytree(sound, tmp_path / "copy", copy_function=shutil.copy2)
    monkeypatch.setattr(probe, "started", lambda modules: None)
    monkeypatch.setattr(probe, "answer", lambda process, seconds: SOUND)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "OMP_", "MKL_"))]:
        monkeypatch.delenv(name)
    return tmp_path / "copy"


@pytest.fixture
def ask(capsys):
    """The exit code, and what was found: (level, what is wrong)."""

    def asked(*arguments):
        code = main(["doctor", "--json", *map(str, arguments)])
        about = json.loads(capsys.readouterr().out)
        levels = [found["level"] for found in about["findings"]]
        assert about["problems"] == levels.count("problem")
        assert about["warnings"] == levels.count("warning")
        assert all(f["remedy"] for f in about["findings"] if f["level"] != "note")
        return code, [(found["level"], found["what"]) for found in about["findings"]]

    return asked


def test_nothing_is_wrong_with_what_is_sound(place, ask, capsys):
    before = {path: path.stat() for path in place.rglob("*") if path.is_file()}
    code, found = ask(place / "shards", place / "model")
    assert [(level, what) for level, what in found if level != "note"] == []
    assert code == 0
    said = " ".join(what for _, what in found)
    assert "24 samples in 3 tars" in said
    assert "splits: train (2 tars), val (1 tar)" in said
    assert "finished, 8 of 8 images" in said
    assert "weights.safetensors is the average of step-00000002" in said
    assert "it was trained with the encoder" in said  # its hash is the recorded one
    assert main(["doctor", str(place / "model"), str(place / "shards")]) == 0
    assert capsys.readouterr().out.endswith("\n0 problems, 0 warnings\n")
    after = {path: path.stat() for path in place.rglob("*") if path.is_file()}
    assert {p: s.st_mtime_ns for p, s in after.items()} == {
        p: s.st_mtime_ns for p, s in before.items()
    }


def written(tar, pictures):
    """A tar of pictures with captions, by the standard library."""
    with tarfile.open(tar, "w") as archive:
        for i, picture in enumerate(pictures):
            file = io.BytesIO()
            exif = Image.Exif()
            if i % 2:
                exif[0x0112] = 6
            picture.save(file, "PNG", exif=exif)
            for name, data in ((f"{i:04}.png", file.getvalue()), (f"{i:04}.txt", b"a thing")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def index_damaged(shards):
    path = shards / "dataset.json"
    path.write_text(path.read_text()[:-40])


def one_index_damaged(shards):
    path = shards / "train-00000.index"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def tar_changed(shards):
    with (shards / "train-00001.tar").open("ab") as file:
        file.write(bytes(512))


def tar_gone(shards):
    (shards / "train-00001.tar").unlink()


def tar_added(shards):
    shutil.copy(shards / "train-00001.tar", shards / "train-00002.tar")


def tar_cut(shards):
    path = shards / "train-00000.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    index_folder(shards, lambda done, total: None)


def embeddings_missing(shards):
    (shards / "embeddings").mkdir()


def index_of_an_older_version(shards):
    """As it was written before tars were read as a whole; the indexes of tars are not looked at."""
    path = shards / "dataset.json"
    about = json.loads(path.read_text())
    about = {"totals": about["totals"], "tars": about["tars"]}
    for tar in about["tars"].values():
        for name in ("digest", "held_out", "such_as"):
            del tar[name]
    path.write_text(json.dumps(about))


def gzipped(shards):
    for path in shards.glob("*.tar"):
        path.rename(path.with_suffix(".tar.gz"))


def nothing_held_out(shards):
    for path in [*shards.glob("val*"), shards / "dataset.json"]:
        path.unlink()


def no_split(shards):
    for path in shards.iterdir():
        path.rename(path.with_name(path.name.replace("train-", "").replace("val-", "1")))
    (shards / "dataset.json").unlink()


def half_a_split(shards):
    (shards / "val-00000.tar").rename(shards / "00007.tar")
    (shards / "dataset.json").unlink()


def captioned(shards, **members):
    """Five samples with these members beside the picture, all in one tar."""
    picture = io.BytesIO()
    Image.new("RGB", (99, 99)).save(picture, "PNG")
    with tarfile.open(shards / "train-00000.tar", "w") as archive:
        for i in range(5):
            for name, data in {"png": picture.getvalue(), **members}.items():
                member = tarfile.TarInfo(f"step_{i:02}.{name.replace('_', '.')}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    index_folder(shards, lambda done, total: None)


def western(shards):
    captioned(shards, txt="ein grüner Würfel".encode("cp1252"))


def several_lines(shards):
    captioned(shards, txt=b"a cube\na green cube\n")


def json_alone(shards):
    captioned(shards, json=b'{"caption": "a cube"}')


def dots_in_keys(shards):
    captioned(shards, txt=b"a cube", **{"5_png": b"x", "5_txt": b"x"})


def white(shards):
    written(shards / "train-00000.tar", [Image.new("L", (99, 99), 255)] * 6)
    index_folder(shards, lambda done, total: None)


def tiny_and_black(shards):
    written(shards / "train-00000.tar", [Image.new("RGBA", (32, 99), (0, 0, 0, 255))] * 6)
    index_folder(shards, lambda done, total: None)


@pytest.mark.parametrize(
    ("damage", "level", "says"),
    [
        (index_damaged, "problem", "dataset.json is damaged"),
        (one_index_damaged, "problem", "train-00000.index is missing or damaged"),
        (tar_changed, "problem", "train-00001.tar has changed since it was indexed"),
        (tar_gone, "problem", "train-00001.tar is gone"),
        (tar_added, "problem", "train-00002.tar is not in the index"),
        (tar_cut, "problem", "train-00000.tar is cut short after 5 samples"),
        (embeddings_missing, "problem", "embeddings lacks 3 of 3 shards"),
        (nothing_held_out, "warning", "nothing is held out"),
        (no_split, "warning", "nothing is held out"),
        (half_a_split, "warning", "00007.tar is of no split"),
        (index_of_an_older_version, "warning", "the index of 3 tars is of an older version"),
        (gzipped, "problem", "train-00000.tar.gz is compressed (3 such tars)"),
        (western, "problem", "caption is not UTF-8, perhaps CP1252: 5 of 19, such as train-00000/"),
        (several_lines, "warning", "several lines in their txt"),
        (json_alone, "warning", "26.3% of the samples have no .txt, but a .json"),
        (dots_in_keys, "warning", "of all samples are left out (5 dot in the key"),
        (white, "warning", "nearly all white: 6 of 20, such as train-00000/0000"),
        (white, "note", "not in RGB, and converted: 6 of 20"),
        (white, "note", "turned upright, as their EXIF says: 3 of 20, such as train-00000/0001"),
        (tiny_and_black, "warning", "under 64 px: 6 of 20"),
        (tiny_and_black, "warning", "nearly all black: 6 of 20"),
    ],
)
def test_what_is_wrong_with_shards_is_found(place, ask, damage, level, says):
    damage(place / "shards")
    code, found = ask(place / "shards")
    assert any(of == level and says in what for of, what in found), found
    assert code == (2 if "problem" in dict(found) else 0)
    assert level != "problem" or code == 2


def test_what_an_index_holds_out_is_a_split(place, ask):
    """And a copy with other times is still the same."""
    shards = place / "shards"
    no_split(shards)
    index_folder(shards, lambda done, total: None, val="25%")
    for tar in shards.glob("*.tar"):
        os.utime(tar, (1e9, 1e9))
    code, found = ask(shards, "--full")
    assert code == 0
    assert not [what for level, what in found if level != "note"]
    said = "splits: train (3 tars), val (25.00% of the pictures of 3 tars)"
    assert said in [what for _, what in found]


def test_of_many_tars_some_are_read_and_full_reads_all(place, ask):
    shards = place / "shards"
    for i in range(2, 21):
        shutil.copy(shards / "train-00000.tar", shards / f"train-{i:05}.tar")
    index_folder(shards, lambda done, total: None)
    # Behind the index's back, and where every eighth or so does not look.
    path = shards / "train-00001.tar"
    kept, data = path.stat(), path.read_bytes()
    path.write_bytes(data.replace(b"txt", b"abc"))
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    code, found = ask(shards)
    assert code == 0
    assert any("214 samples in 22 tars; 8 of 22 tars opened, --full" in what for _, what in found)
    code, found = ask(shards, "--full")
    assert code == 2
    assert any("train-00001.tar is not what the index says" in what for _, what in found)


def encoder_missing(model):
    shutil.rmtree(model / "clip")


def encoder_changed(model):
    path = model / "clip" / "open_clip_model.safetensors"
    tensors = load_file(path)
    tensors["logit_scale"] += 1
    save_file(tensors, path)


def weights_changed(model):
    path = model / "decoder" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1  # the last number's exponent
    path.write_bytes(data)


def weights_not_finite(model):
    path = model / "decoder" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\0\xc0\x7f"
    path.write_bytes(data)


def checkpoint_damaged(model):
    path = model / "decoder" / "checkpoints" / "step-00000002" / "state.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def choice_unknown(model):
    (model / "cascade.yaml").write_text("stages: {decoder: {guidance: 2.0}}\n")


def choice_of_another_stage(model):
    (model / "cascade.yaml").write_text("stages: {decoder: {level: 0.1}}\n")


def stage_missing(model):
    (model / "cascade.yaml").write_text("stages: {prior: {}, decoder: {}}\n")


def configuration_damaged(model):
    (model / "decoder" / "config.yaml").write_text("a: [1\n")


def configuration_of_another(model):
    path = model / "decoder" / "config.yaml"
    path.write_text(path.read_text().replace("channels: 8\n", "channels: 16\n"))


def failed(model):
    (model / "decoder" / "failure.txt").write_text("loss is nan\n")


def status_damaged(model):
    (model / "decoder" / "status.json").write_text("{")


def stopped(model):
    (model / "decoder" / "status.json").write_text('{"images": 4, "total": 80}')
    (model / "decoder" / "metrics.csv").unlink()


def output_changed(model):
    folder = model / "decoder"
    about = {"attempt": None, "images": 8, "outputs": {"weights.safetensors": {"bytes": 1}}}
    (folder / "done").write_text(json.dumps(about))


def silent(model):
    beats = model / "decoder" / "heartbeats"
    beats.mkdir(exist_ok=True)
    (beats / "rank0.json").touch()
    os.utime(beats / "rank0.json", (1e9, 1e9))
    lock = (model / "decoder" / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


@pytest.mark.parametrize(
    ("damage", "level", "says"),
    [
        (silent, "warning", "but was silent for"),
        (encoder_missing, "problem", "clip"),
        (encoder_changed, "problem", "was trained with another encoder"),
        (weights_changed, "problem", "weights.safetensors is not the average of step-00000002"),
        (weights_not_finite, "problem", "numbers that are not finite"),
        (checkpoint_damaged, "problem", "state.pt has changed"),
        (choice_unknown, "problem", "decoder.guidance"),
        (choice_of_another_stage, "problem", "it has no level"),
        (stage_missing, "problem", "prior is not a run"),
        (configuration_damaged, "problem", "config.yaml is damaged"),
        (configuration_of_another, "problem", "does not hold the weights of"),
        (failed, "problem", "loss is nan"),
        (status_damaged, "problem", "status.json is damaged"),
        (stopped, "warning", "it is stopped"),
        (output_changed, "problem", "what it made is changed or gone"),
    ],
)
def test_what_is_wrong_with_a_model_is_found(place, ask, damage, level, says):
    held = damage(place / "model")
    code, found = ask(place / "model")
    del held
    assert any(of == level and says in what for of, what in found), found
    assert level != "problem" or code == 2


def test_who_holds_the_lease_is_told(place, ask):
    folder = place / "model" / "decoder"
    other = Holder("node7", "elsewhere", 17, "1", "2026-01-01 00:00:00", 3)
    ClaimFiles(folder, "lease").path(9).write_text(json.dumps(asdict(other)))
    code, found = ask(folder)
    assert code == 0
    (said,) = [what for level, what in found if level == "note" and "its lease" in what]
    assert "process 17 on node7 (attempt 3), since 2026-01-01 00:00:00" in said
    ClaimFiles(folder, "lease").path(9).write_text("released\n")
    assert not any("its lease" in what for _, what in ask(folder)[1])


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return write_t5(tmp_path_factory.mktemp("t5"))


def changed(file, **values):
    about = json.loads(file.read_text())
    for name, value in values.items():
        part = about["model_cfg"]["text_cfg"] if name == "width" else about
        part[name] = value
    file.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda clip, t5: None, ""),
        (lambda clip, t5: (clip / "open_clip_model.safetensors").unlink(), "is not a CLIP"),
        (
            lambda clip, t5: changed(clip / "open_clip_config.json", width=32),
            "does not hold the weights",
        ),
        (lambda clip, t5: (t5 / "model.safetensors").write_bytes(b"PK"), "cannot be read as"),
        (lambda clip, t5: changed(t5 / "config.json", model_type="umt5"), "has model_type umt5"),
        (
            lambda clip, t5: changed(t5 / "config.json", num_layers=3),
            "does not hold the weights",
        ),
        (lambda clip, t5: (t5 / "spiece.model").unlink(), "is not a whole T5"),
    ],
)
def test_an_encoder_is_asked_whether_it_would_load(place, ask, t5, damage, says):
    clip, own = place / "model" / "clip", shutil.copytree(t5, place / "t5")
    whole = FrozenCLIP(str(clip)).hash, FrozenT5(str(own)).hash
    damage(clip, own)
    code, found = ask(clip, own)
    wrong = [what for level, what in found if level == "problem"]
    if says:
        assert code == 2
        assert len(wrong) == 1
        assert says in wrong[0], wrong
    else:
        assert not wrong
        assert {f"hash {one}" for one in whole} < {what for _, what in found}


def test_what_is_nothing_or_is_not_there_is_a_problem(place, ask):
    (place / "empty").mkdir()
    Image.new("RGB", (9, 9)).save(place / "page.tar", "PNG")
    for name, says in (
        ("none", "cannot be read: No such file"),
        ("none.tar", "cannot be read: No such file"),
        ("empty", "nothing here that can be checked"),
        ("page.tar", "this is a single picture"),
        ("model/decoder/weights.safetensors", "this is a file of safetensors"),
    ):
        code, found = ask(place / name)
        assert code == 2
        assert any(level == "problem" and says in what for level, what in found), found


def versions(monkeypatch, **other):
    real = metadata.version

    def version(name):
        found = other.get(name.replace("-", "_"), real)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found if isinstance(found, str) else real(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"torch": "2.10.1+cu132"}, "torch is 2.10.1+cu132, but >=2.11 is needed"),
        ({"lightning": "2.6.3"}, "lightning 2.6.3 is a malicious release"),
        ({"hydra_core": "1.4.0"}, "hydra-core is 1.4.0"),
        ({"open_clip_torch": None}, "open_clip_torch is not installed"),
    ],
)
def test_versions_are_compared_with_what_is_needed(place, ask, monkeypatch, other, says):
    assert not [f for f in installation.packages() if f.level != "note"]
    versions(monkeypatch, **other)
    code, found = ask()
    assert code == 2
    assert any(level == "problem" and says in what for level, what in found), found


def test_an_installation_without_its_metadata_is_told(monkeypatch):
    monkeypatch.setattr(installation, "OURS", "cascade-that-nobody-installed")
    assert [found.level for found in installation.packages()] == ["warning"]


@pytest.mark.parametrize(
    ("saw", "level", "says"),
    [
        ({"broken": {"torch": "ImportError: libcudart.so.13"}}, "problem", "torch cannot be"),
        ("exit code -11: it printed nothing", "problem", "torch cannot be imported (exit code -11"),
        (None, "warning", "its CUDA hangs"),
        (SOUND | {"card": True, "driver": 12080}, "problem", "the driver is of CUDA 12.8"),
        (SOUND | {"card": True, "driver": 13000, "complaint": "no device"}, "problem", "no device"),
        (SOUND | {"card": True, "built": None}, "warning", "is built for CPUs"),
        (SOUND | {"card": True, "hidden": True}, "note", "CUDA_VISIBLE_DEVICES hides"),
        (SOUND | {"devices": ["K80"], "unsupported": ["K80"]}, "problem", "no code for K80"),
        (SOUND | {"devices": ["H200"]}, "note", "CUDA 13.0: H200"),
    ],
)
def test_what_torch_and_its_cuda_lack_is_found(saw, level, says):
    assert any(f.level == level and says in f.what for f in probe.imports(saw))


@pytest.mark.parametrize(
    ("capability", "codes", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((12, 0), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((3, 7), ["sm_75", "compute_75"], False),
        ((10, 0), ["sm_100a"], True),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_code_for_a_gpu_runs_as_nvidia_says(capability, codes, runs):
    """CUDA's rule: compiled code within a major version from its minor on, PTX from there on."""
    assert probe._runs(capability, codes) == runs


def test_a_process_that_hangs_or_dies_holds_nobody_up():
    lines = ("exec sleep 60", "echo no good >&2; exit 3", "echo a warning; echo '{\"broken\": {}}'")
    found = []
    for line in lines:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(["sh", "-c", line], **pipes) as process:
            found.append(probe.answer(process, 1.0))
    assert found == [None, "exit code 3: no good", {"broken": {}}]


@pytest.mark.slow  # it imports torch once more
def test_the_process_that_looks_at_torch_answers():
    saw = probe.answer(probe.started(["torch", "no_such_module"]), 120.0)
    assert list(saw["broken"]) == ["no_such_module"]
    assert saw["built"] == torch.version.cuda
    assert saw["devices"] == []


def environment(monkeypatch, ask, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, found = ask()
    assert code == 0
    return [what for level, what in found if level == "warning"]


def test_what_the_environment_says_is_told(place, ask, monkeypatch):
    assert environment(monkeypatch, ask) == []
    (said,) = environment(monkeypatch, ask, SBATCH_PARTITION="debug", SLURM_CONF="/etc/slurm.conf")
    assert said.startswith("SBATCH_PARTITION: ")
    assert "debug" not in said
    assert len(environment(monkeypatch, ask, SLURM_JOB_ID="7", SLURM_MEM_PER_CPU="1")) == 2
    monkeypatch.delenv("SLURM_JOB_ID")
    said = environment(monkeypatch, ask, OMP_NUM_THREADS="4096", HF_HOME="/no/such/folder")
    assert any(what.startswith("OMP_NUM_THREADS=4096") for what in said)
    assert any("HF_HOME leads to /no/such/folder" in what for what in said)
    assert any(what.startswith("SLURM_MEM_PER_CPU: srun") for what in said)


def test_threads_are_compared_with_the_quota(monkeypatch):
    """A container with all CPUs in its mask, and time of one and a half."""
    monkeypatch.setattr(processors, "quota", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {*range(64)})
    assert len([*machine.threads({"OMP_NUM_THREADS": "2"})]) == 1
    _, found = machine.threads({"OMP_NUM_THREADS": "3"})
    assert found.what == "OMP_NUM_THREADS=3, and 1.5 CPUs may be used: threads wait for each other"
    assert found.remedy == "export OMP_NUM_THREADS=1"


def test_room_is_compared_with_what_will_be_written(place, ask, monkeypatch):
    for free, level in ((2**20, "problem"), (2**32, "warning"), (2**40, "note")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(2**40, 0, free))
        found = [*machine.disks([place / "shards" / "not" / "yet", place])]
        assert [(f.level, "GiB free" in f.what) for f in found] == [(level, True)]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**26, 0, 2**16))
    stopped(place / "model")
    code, found = ask(place / "model")
    assert code == 2
    assert any(what.startswith("/dev/shm has 64 MiB") for _, what in found)
    assert any(what.startswith("a checkpoint has") for _, what in found)


def test_locks_are_looked_at_where_work_is_shared(tmp_path, monkeypatch):
    assert [found.level for found in machine.locks(tmp_path)] == ["note"]
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_mount", lambda folder: ("lustre", "rw,localflock"))
        assert "on lustre with local locks" in next(machine.locks(tmp_path)).what

    def refuses(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(machine.fcntl, "lockf", refuses)
    assert "has no locks" in next(machine.locks(tmp_path)).what


def test_the_json_names_no_user_and_no_machine(place, monkeypatch, capsys):
    monkeypatch.setenv("USER", "erika")
    monkeypatch.setenv("LOGNAME", "erika")
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setattr(output.platform, "node", lambda: "login7")
    main(["doctor", "--json", str(place / "shards"), "/scratch/erika/x", "/login7/erikas"])
    said = capsys.readouterr().out
    assert str(place) not in said
    assert "~/shards" in said
    assert "/scratch/USER/x" in said
    assert "/HOST/erikas" in said
    assert json.loads(said)["versions"]["torch"] == metadata.version("torch")


def test_a_check_that_breaks_off_is_a_finding():
    """As where a package is missing: the rest is said nevertheless."""

    def broken():
        raise ModuleNotFoundError("No module named 'torch'")
        yield

    (found,) = guarded(broken)
    assert found.level == "problem"
    assert "No module named 'torch'" in found.what


def test_a_budget_is_of_all_calls_together():
    budget = Budget(0.3)
    assert budget.within(lambda: 1) == 1
    with pytest.raises(UserError, match="bad"):
        budget.within(lambda: (_ for _ in ()).throw(UserError("bad")))
    with pytest.raises(TimeoutError):
        budget.within(threading.Event().wait)
    assert budget.left == 0
    assert Budget(None).within(lambda: 1) == 1

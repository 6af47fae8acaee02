"""A run killed at any moment and started again equals the run that was never killed, bit for bit.

Weights, average, optimizer, schedule, random state and the order of samples. In one process a kill
is an exception; the processes of several ranks, and those of the slow tests, get SIGKILL.
"""

import csv
import errno
import json
import random
import resource
import signal
import threading
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.clip import CLIPTraining, save_clip
from cascade.errors import Failed, Superseded, UserError
from cascade.files.lease import NAME
from cascade.files.locks import RELEASED, ClaimFiles
from cascade.stage import WEIGHTS, Stage
from cascade.training import checkpoint, fit
from cascade.training.callbacks import saving
from cascade.training.callbacks.history import History
from cascade.training.callbacks.saving import Checkpoints
from cascade.training.checkpoint import newest_checkpoint
from cascade.training.module import Training
from tests.processes import Job
from tests.small import EMBEDDED, PRIOR

STEPS, BATCH = 4, 4
COMMON = [f"batch={BATCH}", f"images={STEPS * BATCH}", "warmup=8", "grids=0", "ema=0.9"]
COMMON += ["save_seconds=0.0", "optim.lr=1e-3"]
NET = ["net.net.channels=8", "net.net.patch=2", "net.net.embed=16"]
NET += ["net.net.multipliers=[1]", "net.net.blocks=1"]
SR = ["stage=sr256", "size=16", "low=8", "crop=null", *NET]
KINDS = {
    # Two micro-batches to a step, and what torch draws itself.
    "a stage with dropout": [*SR, "micro_batch=2", "+net.net.dropout=0.5"],
    # Statistics that are taken from the data before the first step.
    "a prior": PRIOR,
    "a CLIP": ["stage=clip", "optim=clip", *EMBEDDED],
}


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes of a `Job`: the last bits depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Scenes, a CLIP, and its embeddings of them."""
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 20, 32, seed=0, shard_size=10)
    model = built(composed("train", ["stage=clip", f"data.path={folder}", *EMBEDDED]).clip.model)
    torch.manual_seed(0)
    save_clip(model, model.build(), folder / "clip")
    assert cli.main(["data", "precompute", str(folder), "--clip", str(folder / "clip")]) == 0
    return folder


@pytest.fixture
def config(shards, tmp_path):
    def make(*overrides, run="run"):
        paths = [f"data.path={shards}", f"clip.path={shards / 'clip'}", f"run={tmp_path / run}"]
        return [*COMMON, *paths, *overrides]

    return make


def run(overrides):
    return fit.train(composed("train", overrides))


class Killed(BaseException):
    """No `except Exception` stops it."""


def seen_by(monkeypatch, module, kill_at=None):
    """What each micro-batch of the runs to come is given, by its number: samples, random state.

    Args:
        kill_at: the number, counted from the beginning of the run, of the one that kills it.
    """
    seen, step = {}, module.training_step

    def training_step(self, batch, number):
        if number == kill_at:
            raise Killed
        seen[number] = batch["sample"].tolist(), torch.get_rng_state().tolist()
        return step(self, batch, number)

    monkeypatch.setattr(module, "training_step", training_step)
    return seen


def state(folder):
    path = newest_checkpoint(folder).path
    return torch.load(path / "state.pt", weights_only=True)


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def weights(folder):
    return load_file(next(folder.glob("*.safetensors")))


def events(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_step_equals_one_never_killed(kind, config, monkeypatch):
    module = CLIPTraining if kind == "a CLIP" else Stage
    with monkeypatch.context() as patch:
        expected = seen_by(patch, module)
        whole = run(config(*KINDS[kind], run="whole"))
    assert sorted(n for samples, _ in expected.values() for n in samples) == [*range(16)]
    assert len({tuple(drawn) for _, drawn in expected.values()}) == len(expected)
    for kill_at in expected:
        overrides = config(*KINDS[kind], run=f"killed-{kill_at}")
        with monkeypatch.context() as patch:
            before = seen_by(patch, module, kill_at)
            with pytest.raises(Killed):
                run(overrides)
        with monkeypatch.context() as patch:
            after = seen_by(patch, module)
            killed = run(overrides)
        saved = kill_at // (len(expected) // STEPS) * (len(expected) // STEPS)
        assert [*before] == [*range(kill_at)]
        assert [*after] == [*range(saved, len(expected))]  # no more than a step is done again
        assert before | after == expected
        assert_equal(state(whole), state(killed))
        assert_equal(weights(whole), weights(killed))


def test_a_kill_between_what_belongs_together_is_harmless(config, monkeypatch):
    """Average, status, checkpoint: it dies before and behind each of them, at both steps."""
    whole = run(config(*SR, "images=8", run="whole"))
    write, written = checkpoint.write_atomically, 0

    def dying(at):
        def killing(path, make):
            nonlocal written
            counts = path.name in (WEIGHTS, "status.json") or path.name.startswith("step-")
            if counts and (written := written + 1) == at:
                raise Killed
            write(path, make)
            if counts and (written := written + 1) == at:
                raise Killed

        return killing

    for at in range(1, 13):
        written, overrides = 0, config(*SR, "images=8", run=f"killed-{at}")
        with monkeypatch.context() as patch:
            for module in ("stage", "files.atomic", "training.checkpoint"):
                patch.setattr(f"cascade.{module}.write_atomically", dying(at))
            with pytest.raises(Killed):
                run(overrides)
        killed = run(overrides)
        assert_equal(weights(whole), weights(killed))
        assert fit.finished(killed)
        assert json.loads((killed / "status.json").read_text()) == {"images": 8, "total": 8}
        if at not in (10, 11):  # when it was finished, but for the checkpoint
            assert_equal(state(whole), state(killed))


def test_nothing_is_saved_between_the_micro_batches_of_a_step(config, monkeypatch):
    """Time for one comes in the first micro-batch of the second step, known to all a step later."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    step, at = Stage.training_step, []

    def training_step(self, batch, number):
        clock.now += 1000 * (number == 2)
        return step(self, batch, number)

    def note(self, trainer, module, saved):
        at.append((saved["global_step"], trainer.fit_loop.batch_idx))

    monkeypatch.setattr(saving, "time", clock)
    monkeypatch.setattr(Stage, "training_step", training_step)
    monkeypatch.setattr(History, "on_save_checkpoint", note)
    run(config(*KINDS["a stage with dropout"], "save_seconds=100.0"))
    assert at == [(3, 5), (4, 7)]


def test_a_change_of_the_accumulation_does_not_split_a_step(config, monkeypatch):
    """As it happens when the ranks become more or fewer."""
    whole = run(config(*SR, "micro_batch=4", run="whole"))
    with monkeypatch.context() as patch:
        seen_by(patch, Stage, kill_at=3)
        with pytest.raises(Killed):
            run(config(*SR, "micro_batch=4"))
    with monkeypatch.context() as patch:
        seen = seen_by(patch, Stage)
        changed = run(config(*SR, "micro_batch=1"))
    assert [samples for samples, _ in seen.values()] == [[n] for n in range(12, 16)]
    for key, value in weights(whole).items():
        torch.testing.assert_close(weights(changed)[key], value, atol=2e-5, rtol=1e-3)


def test_a_clip_at_its_greatest_scale_equals_one_never_killed(config, monkeypatch):
    """It is held there in the step itself: what was done behind it would not be saved."""
    monkeypatch.setattr("cascade.encoders.clip.MAX_LOGIT_SCALE", 2.6)
    clip = KINDS["a CLIP"]
    whole = run(config(*clip, run="whole"))
    with monkeypatch.context() as patch:
        seen_by(patch, CLIPTraining, kill_at=1)
        with pytest.raises(Killed):
            run(config(*clip))
    assert_equal(state(whole), state(run(config(*clip))))


def plain(value):
    if type(value) is dict:
        return all(type(key) in (str, int) and plain(v) for key, v in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return value is None or type(value) in (torch.Tensor, bool, int, float, str)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_tensors_numbers_and_words_only(kind, config):
    folder = run(config(*KINDS[kind]))
    found = state(folder)
    assert plain(found)
    about = json.loads((newest_checkpoint(folder).path / "manifest.json").read_text())
    position = {"step": 4, "images": 16, "consumed": 16, "offset": 0, "ranks": 1}
    assert found["position"] == position
    assert position.items() <= about.items()
    assert about["versions"].keys() == {"torch", "lightning", "python"}
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000004",
    ]


def test_checkpoints_of_older_versions_are_refused_and_nothing_starts_over(config, tmp_path):
    old = tmp_path / "run" / "checkpoints" / "step-00000009.ckpt"
    old.parent.mkdir(parents=True)
    torch.save({"global_step": 9}, old)
    with pytest.raises(UserError, match=r"step-00000009\.ckpt: a single file"):
        run(config(*SR))


def test_a_run_without_room_fails_with_the_last_good_checkpoint_and_goes_on_later(
    config, monkeypatch
):
    whole, write = run(config(*SR, run="whole")), checkpoint._write

    def filling(state, folder):
        if state["position"]["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", filling)
        with pytest.raises(Failed, match=r"No space left.*step-00000002 is intact"):
            run(config(*SR))
    assert_equal(state(whole), state(run(config(*SR))))


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_ends_equal(config, monkeypatch):
    whole = run(config(*SR, run="whole"))
    with monkeypatch.context() as patch:
        seen_by(patch, Stage, kill_at=3)
        with pytest.raises(Killed):
            run(config(*SR))
    folder = whole.with_name("run")
    file = folder / "checkpoints" / "step-00000003" / "state.pt"
    file.write_bytes(file.read_bytes()[:5000] + b"?" + file.read_bytes()[5001:])
    assert_equal(state(whole), state(run(config(*SR))))
    assert [e["step"] for e in events(folder) if e["event"] == "resumed"] == [2]
    assert [e["checkpoint"] for e in events(folder) if e["event"] == "set aside"] == [
        "step-00000003"
    ]
    assert len([*(folder / "checkpoints").iterdir()]) == 2


def test_a_kill_while_the_configuration_is_written_leaves_none(config, monkeypatch):
    def half(path, text):
        if "config.yaml" not in path.name:
            return write(path, text)
        path.write_bytes(text[: len(text) // 2].encode())
        raise Killed

    write = Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Killed):
            run(config(*SR))
    run(config(*SR))


def test_a_run_that_is_taken_over_renames_nothing_into_place_and_can_go_on(config, monkeypatch):
    whole, folder = run(config(*SR, run="whole")), None
    step, before = Stage.training_step, {}

    def there():
        kept = (folder / "status.json", *folder.glob("*.safetensors"), *folder.glob("check*/*/*"))
        return {path: path.read_bytes() for path in kept}

    def training_step(self, batch, number):
        if number == 2:
            claims.make(1)
            before.update(there())
        return step(self, batch, number)

    folder = whole.with_name("run")
    claims = ClaimFiles(folder, NAME)
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        with pytest.raises(Superseded, match=r"run was taken over by process \d+ on"):
            run(config(*SR))
    assert before
    assert there() == before
    assert "finished" not in {e["event"] for e in events(folder)}
    with pytest.raises(UserError, match="is written to by process"):
        run(config(*SR))
    claims.path(1).write_text(RELEASED)
    assert_equal(state(whole), state(run(config(*SR))))


# What a person sees of it.


def test_the_timeline_tells_starts_checkpoints_and_the_end(config, monkeypatch):
    with monkeypatch.context() as patch:
        seen_by(patch, Stage, kill_at=2)
        with pytest.raises(Killed):
            run(config(*SR))
    folder = run(config(*SR))
    told = [(e["event"], e.get("step", e["images"])) for e in events(folder)]
    assert told == [
        ("started", 0),
        ("checkpoint", 1),
        ("checkpoint", 2),
        ("resumed", 2),
        ("checkpoint", 3),
        ("checkpoint", 4),
        ("finished", 16),
    ]


def test_metrics_go_on_without_a_row_twice_or_half_a_row(config, monkeypatch):
    # TensorBoard orders files of one second and one process by this number, as text.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    monkeypatch.setattr(fit, "History", partial(History, every=1))
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *args: None)
        seen_by(patch, Stage, kill_at=3)
        with pytest.raises(Killed):
            run(config(*SR))
    folder = Path(next(o for o in config() if o.startswith("run=")).removeprefix("run="))
    table = folder / "metrics.csv"
    assert len(table.read_text().splitlines()) == 4
    table.write_text(table.read_text() + "16,0.1")
    with monkeypatch.context() as patch:
        seen_by(patch, Stage, kill_at=2)
        with pytest.raises(Killed):
            run(config(*SR))
    run(config(*SR))
    rows = [*csv.DictReader(table.open())]
    assert [row["images"] for row in rows] == ["4", "8", "12", "16"]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == [4, 8, 12, 16]


# Processes of their own, and SIGKILL.


def process(argv, notes, kill_at=None, before=None):
    """`cascade train`, which notes the samples of each micro-batch.

    Args:
        notes: a file for each rank, to which they are appended.
        kill_at: the number of the micro-batch that sends SIGKILL to its process.
        before: called first.
    """

    def noting(step):
        def training_step(self, batch, number):
            if number == kill_at:
                signal.raise_signal(signal.SIGKILL)
            with open(f"{notes}.{self.global_rank}", "a") as file:
                note = self.trainer.global_step, number, batch["sample"].tolist()
                file.write(json.dumps(note) + "\n")
            return step(self, batch, number)

        return training_step

    Training.training_step = noting(Training.training_step)
    if before:
        before()
    return cli.main(["train", *argv])


def noted(notes):
    """(step, micro-batch, rank) and samples; a file's last line may be half written."""
    for rank in range(2):
        path = Path(f"{notes}.{rank}")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            if line.endswith("\n"):
                step, number, samples = json.loads(line)
                yield (step, number, rank), samples


RANKS = {1: [], 2: ["trainer.devices=2"]}


@pytest.mark.parametrize(("kind", "micro_batch"), [("a stage with dropout", 1), ("a CLIP", 2)])
def test_ranks_killed_together_equal_ranks_never_killed(kind, micro_batch, config, tmp_path):
    def start(name, kill_at=None):
        argv = config(*KINDS[kind], f"micro_batch={micro_batch}", *RANKS[2], run=name)
        args = [argv, str(tmp_path / f"{name}.txt"), kill_at]
        return Job(process, args, ranks=2, out=tmp_path / "out")

    whole = start("whole")
    assert whole.wait() == [0, 0], whole.output()
    killed = start("killed", kill_at=3)
    killed.processes[0].join()
    killed.kill()
    assert killed.wait()[0] == -signal.SIGKILL
    again = start("killed")
    assert again.wait() == [0, 0], again.output()
    assert_equal(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    # What is done twice is done alike.
    assert dict(noted(tmp_path / "whole.txt")) == dict(noted(tmp_path / "killed.txt"))


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(first, then, config, tmp_path):
    sr = [*SR, "micro_batch=2"]
    job = Job(
        process,
        [config(*sr, *RANKS[first], run="whole"), str(tmp_path / "whole.txt")],
        ranks=first,
        out=tmp_path / "out",
    )
    assert job.wait() == [0] * first, job.output()
    notes, killed = str(tmp_path / "killed.txt"), config(*sr, run="killed")
    job = Job(
        process, [[*killed, *RANKS[first]], notes, 4 // first], ranks=first, out=tmp_path / "out"
    )
    job.processes[0].join()
    job.kill()
    assert job.wait()[0] == -signal.SIGKILL
    job = Job(process, [[*killed, *RANKS[then]], notes], ranks=then, out=tmp_path / "out")
    assert job.wait() == [0] * then, job.output()
    a, b = tmp_path / "whole", tmp_path / "killed"
    for key, value in weights(a).items():
        torch.testing.assert_close(weights(b)[key], value, atol=1e-5, rtol=0)
    for file in (tmp_path / "whole.txt", notes):
        steps = defaultdict(set)
        for (step, _, _), samples in noted(file):
            steps[step].update(samples)
        assert steps == {step: {*range(4 * step, 4 * step + 4)} for step in range(STEPS)}
    assert [e["ranks"] for e in events(b) if e["event"] in ("started", "resumed")] == [first, then]


def slowly():
    """The third checkpoint is never done: its file says so, and waits."""
    count, write = 0, checkpoint._Hashed.write

    def waiting(self, data):
        nonlocal count
        if ".step-00000003." in self.file.name and (count := count + 1) == 20:
            self.file.flush()
            Path(self.file.name).parents[2].joinpath("half-way").touch()
            threading.Event().wait()
        return write(self, data)

    checkpoint._Hashed.write = waiting


def without_room():
    """From the third checkpoint on, no file may be as long as its `state.pt`."""
    write = checkpoint._write

    def limited(state, folder):
        if state["position"]["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        write(state, folder)

    checkpoint._write = limited


def wait_for(path, job):
    while not path.exists():
        job.processes[0].join(0.01)
        assert job.processes[0].is_alive(), job.output()


def test_a_kill_in_the_middle_of_a_checkpoint_costs_that_one_only(config, tmp_path):
    whole, folder = run(config(*SR, run="whole")), tmp_path / "killed"
    argv, notes = config(*SR, run="killed"), str(tmp_path / "notes")
    job = Job(process, [argv, notes, None, slowly], out=tmp_path / "out")
    wait_for(folder / "half-way", job)
    job.kill()
    assert job.wait() == [-signal.SIGKILL]
    (rest,) = (folder / "checkpoints").glob(".step-00000003.*")
    assert (rest / "state.pt").stat().st_size > 0
    assert newest_checkpoint(folder).step == 2
    assert_equal(state(whole), state(run(argv)))
    assert not [*(folder / "checkpoints").glob(".*")]


def test_a_limit_to_the_size_of_files_is_as_a_full_disk(config, tmp_path):
    whole = run(config(*SR, run="whole"))
    argv, notes = config(*SR), str(tmp_path / "notes")
    job = Job(process, [argv, notes, None, without_room], out=tmp_path / "out")
    assert job.wait() == [1]
    assert "File too large" in job.output()
    assert "step-00000002 is intact: make room and start again" in job.output()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"]
    assert_equal(state(whole), state(run(argv)))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_60_steps_outlives_kills_at_random_moments(ranks, config, tmp_path):
    dice, notes = random.Random(ranks), str(tmp_path / "notes")
    longer = ["images=240", "+net.net.dropout=0.5", *RANKS[ranks]]

    def start(name):
        argv = [config(*SR, *longer, run=name), f"{notes}-{name}"]
        return Job(process, argv, ranks=ranks, out=tmp_path / "out")

    assert start("whole").wait() == [0] * ranks
    kills, job = 0, start("killed")
    while kills < 5:
        mark = dice.randrange(1, 12) + len([*noted(f"{notes}-killed")])
        while len([*noted(f"{notes}-killed")]) < mark and job.processes[0].is_alive():
            job.processes[0].join(dice.random() / 50)
        assert job.processes[0].is_alive(), job.output()
        job.kill(rank=dice.randrange(ranks))
        job.kill()
        assert job.wait() == [-signal.SIGKILL] * ranks
        kills, job = kills + 1, start("killed")
    assert job.wait() == [0] * ranks, job.output()
    assert_equal(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert dict(noted(f"{notes}-whole")) == dict(noted(f"{notes}-killed"))

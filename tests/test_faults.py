"""What goes wrong within a step, alone and in real trainings: skipped, gone back, interrupted."""

import json
import multiprocessing
import os
import signal
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from cascade.cli import main
from cascade.conf import __path__ as conf
from cascade.config.compose import built, composed
from cascade.data.loading import loader
from cascade.data.scenes.generate import write_scenes
from cascade.data.shards import Shards
from cascade.errors import Failed, TryAgain
from cascade.runs.run import Position
from cascade.training import fit
from cascade.training.callbacks.ema import EMA
from cascade.training.callbacks.guard import Guard, Rollback, resume_from, rollbacks
from cascade.training.callbacks.interruption import Interruption, ignore_signals, stoppable
from cascade.training.callbacks.saving import Checkpoints
from cascade.training.callbacks.seeding import Seeding
from cascade.training.callbacks.watchdog import Watchdog
from cascade.training.devices import Bfloat16
from cascade.verbs import train
from tests import small
from tests.processes import Job

SMALL = [*small.SR, "ema=0.9", "images=40"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(folder, "plain", "train", 30, 32, seed=0, shard_size=10)
    return folder


@pytest.fixture
def config(shards, tmp_path):
    def make(*overrides, run="run"):
        return composed(
            "train", [*SMALL, f"data.path={shards}", f"run={tmp_path / run}", *overrides]
        )

    return make


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(run, kind):
    return [line for line in lines(run / "events.jsonl") if line["event"] == kind]


def state(run):
    """Of the newest checkpoint."""
    path = sorted((run / "checkpoints").glob("step-*"))[-1]
    return torch.load(path / "state.pt", weights_only=True)


def by_hand(config, firsts, skipped=()):
    """What training comes to without Lightning.

    Args:
        firsts: number of each step's first sample.
        skipped: the steps that are left out, save for the learning rate.
    """
    torch.manual_seed(config.seed)
    stage, shards = built(config.stage), built(config.data)
    stage.to(memory_format=torch.channels_last)
    share, times = fit.accumulation(config.batch, config.micro_batch, 1)
    optimizer = stage.optimizer(list(stage.parameters()))
    schedule = LambdaLR(optimizer, lambda step: stage.learning_rate(step * stage.batch))
    ema, seeding, k = EMA(config.ema), Seeding(config.seed), 0
    ema.on_fit_start(None, stage)
    for step, first in enumerate(firsts):
        optimizer.zero_grad()
        for batch in islice(loader(shards, share, start=first), times):
            seeding.on_train_batch_start(SimpleNamespace(global_rank=0), stage, batch, k)
            (stage.training_step(stage.encoded(batch), k) / times).backward()
            k += 1
        if step in skipped:
            optimizer.zero_grad()
        else:
            nn.utils.clip_grad_norm_(stage.parameters(), config.gradient_clip)
            optimizer.step()
            ema.on_before_optimizer_step(None, stage, optimizer)
            ema.on_train_batch_end(None, stage, None, None, 0)
        schedule.step()
    return stage.state_dict(), optimizer.state_dict(), ema


def assert_equals(run, hand):
    weights, optimizer, ema = hand
    found = state(run)
    assert all(torch.equal(found["state_dict"][k], weights[k]) for k in weights)
    theirs = found["optimizer_states"][0]
    assert theirs["param_groups"][0]["lr"] == optimizer["param_groups"][0]["lr"]
    for i, moments in optimizer["state"].items():
        assert all(torch.equal(theirs["state"][i][k], moments[k]) for k in moments)
    average = found["callbacks"]["EMA"]
    assert average["step"] == ema.step
    assert all(torch.equal(average["average"][k], ema.average[k]) for k in ema.average)


@pytest.mark.parametrize("fault", ["not_a_number", "gradient"])
@pytest.mark.parametrize("micro_batch", ["null", "2"])
def test_a_skipped_step_moves_nothing_but_the_learning_rate(config, fault, micro_batch):
    options = config(f"faults={fault}", f"faults.{fault}.step=4", f"micro_batch={micro_batch}")
    run = fit.train(options)
    assert_equals(run, by_hand(options, range(0, 40, 4), skipped=[4]))
    (bad,) = lines(run / "bad_batches.jsonl")
    (rank,) = bad["ranks"]
    assert (bad["step"], rank["samples"]) == (4, [16, 17, 18, 19])
    assert rank["keys"] == [built(options.data)[n]["key"] for n in rank["samples"]]
    wrong, right = ("loss", "gradient") if fault == "not_a_number" else ("gradient", "loss")
    assert rank[wrong] in ("nan", "inf")
    assert fault == "not_a_number" or float(rank[right]) > 0
    assert len(events(run, "skipped step")) == 1


def test_three_skipped_steps_in_a_row_go_by_and_a_fourth_stops_the_run(config):
    bad = ["faults=not_a_number", "faults.not_a_number.step=4", "save_seconds=0.0"]
    fit.train(config(*bad, "faults.not_a_number.times=3", run="three"))
    with pytest.raises(Failed, match=r"4 times .* step 7.*checkpoints/step-00000007 is kept"):
        fit.train(config(*bad, "faults.not_a_number.times=4", run="four"))


class Steps:
    """A guard and a weight, without a trainer."""

    def __init__(self, run, **options):
        self.module = nn.Linear(1, 1, bias=False)
        self.module.batch = 4
        strategy = SimpleNamespace(broadcast=lambda x: x, barrier=lambda: None)
        self.trainer = SimpleNamespace(
            global_step=0, world_size=1, is_global_zero=True, strategy=strategy
        )
        self.guard = Guard(run, Position(0, batch=4), **options)
        self.guard.on_train_start(self.trainer, self.module)

    def step(self, loss):
        batch = {"sample": torch.arange(4) + 4 * self.trainer.global_step}
        self.guard.on_train_batch_start(self.trainer, self.module, batch, 0)
        self.module.weight.grad = torch.ones(1, 1)
        self.guard.on_before_backward(self.trainer, self.module, torch.tensor(loss))
        self.guard.on_before_optimizer_step(self.trainer, self.module, None)
        self.trainer.global_step += 1


def test_an_eleventh_skipped_step_among_a_thousand_stops_the_run_resumed_or_not(tmp_path):
    nan = float("nan")
    early = Steps(tmp_path)
    for i in range(3000):
        early.step(nan if i % 100 == 0 else 1.0)
    steps = Steps(tmp_path)
    for i in range(1000):
        if i == 700:
            state = steps.guard.state_dict()
            steps.guard = Guard(tmp_path, Position(0, batch=4))
            steps.guard.load_state_dict(state)
        if i == 990:
            with pytest.raises(Failed, match="11 times in 1,000 steps, last at step 990"):
                steps.step(nan)
            return
        steps.step(nan if i % 99 == 0 else 1.0)


class Weights(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.w, self.batch = nn.Parameter(torch.ones(3)), 1

    def training_step(self, batch, _):
        with_inf = 3e38 * self.w if batch["sample"] == 2 else self.w
        return (with_inf @ with_inf).float()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), fused=True)


def test_under_bfloat16_a_step_is_skipped_too(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append(module.w.detach().clone())

    trainer = L.Trainer(
        accelerator="cpu", plugins=[Bfloat16("cpu")], max_steps=5, gradient_clip_val=1.0,
        callbacks=[Guard(tmp_path, Position(0, batch=1)), Look()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = [{"sample": torch.tensor([n])} for n in range(5)]
    trainer.fit(Weights(), torch.utils.data.DataLoader(data, batch_size=None))
    moved = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert moved == [True, False, True, True]


def test_a_jump_goes_back_and_passes_over_the_samples_since(config, monkeypatch):
    monkeypatch.setattr(fit, "Guard", partial(Guard, window=6))
    options = config("faults=jump", "faults.jump.step=8", "spike=50.0", "save_seconds=0.0")
    run = fit.train(options)
    (jump,) = rollbacks(run)
    begun = jump["begun"]
    assert 0 < begun <= jump["step"] == 8
    assert jump["consumed"] == resume_from(run) == 36
    # From the checkpoint before, on samples behind the jump.
    back = begun - 1
    firsts = [*range(0, 4 * back, 4), *range(36, 36 + 4 * (10 - back), 4)]
    assert_equals(run, by_hand(options, firsts))
    assert (run / "checkpoints" / f"aside-1-step-{begun:08d}").is_dir()
    (event,) = events(run, "rollback")
    assert event["to"] == f"checkpoints/step-{back:08d}"


def test_what_a_jump_led_to_is_known_to_the_next_start(config, monkeypatch):
    """Killed right behind the decision, and once more later."""
    monkeypatch.setattr(fit, "Guard", partial(Guard, window=6))
    options = ["faults=jump", "faults.jump.step=8", "spike=50.0", "save_seconds=0.0"]
    whole = fit.train(config(*options, run="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(fit, "Rollback", KeyError)  # caught by nobody
        with pytest.raises(Rollback, match="loss spike"):
            fit.train(config(*options, run="killed"))
    more = [*options[2:], "faults=sigterm", "faults.sigterm.step=8"]
    with pytest.raises(TryAgain):
        fit.train(config(*more, run="killed"))
    killed = fit.train(config(*more, run="killed"))
    a, b = (state(run) for run in (whole, killed))
    assert a["position"] == b["position"]
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])


def test_a_fourth_jump_stops_the_run(tmp_path):
    for n in range(4):
        steps = Steps(tmp_path, spike=10.0, window=5)
        for i in range(8):
            steps.step(1 + 0.01 * (i % 3))
        with pytest.raises(Failed if n == 3 else Rollback, match=r"spike at step 8: loss 2,"):
            steps.step(2.0)
    assert len(rollbacks(tmp_path)) == 3


def test_nothing_jumps_unless_asked_nor_before_the_window_is_full(tmp_path):
    for options in ({}, {"spike": 10.0, "window": 9}):
        steps = Steps(tmp_path, **options)
        for i in range(8):
            steps.step(1 + 0.01 * (i % 3))
        steps.step(1e6)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_stops_behind_a_checkpoint_and_the_run_goes_on_as_if_without(config, name):
    before = signal.getsignal(signal.SIGTERM)
    options = config("faults=sigterm", "faults.sigterm.step=3", f"faults.sigterm.name={name}")
    with pytest.raises(TryAgain, match=f"{name}: stopped after step 5"):
        fit.train(options)
    run = Path(options.run)
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert events(run, "interrupted")[0]["signal"] == name
    assert signal.getsignal(signal.SIGTERM) == before
    assert_equals(fit.train(options), by_hand(options, range(0, 40, 4)))


def test_a_signal_before_the_first_step_is_no_failure(config, monkeypatch):
    before, check = signal.getsignal(signal.SIGTERM), Shards.check

    def interrupted(*args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:  # as around a decoder
            check(*args)

    options = config()
    monkeypatch.setattr(Shards, "check", interrupted)
    with pytest.raises(TryAgain, match="SIGTERM outside of all steps"):
        fit.train(options)
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert_equals(fit.train(options), by_hand(options, range(0, 40, 4)))


def test_it_saves_when_the_first_rank_says_so_and_not_twice_for_one_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cascade.training.callbacks.saving.time.monotonic", lambda: now[0])
    checkpoints, saved = Checkpoints(tmp_path, EMA(), Position(0, batch=4), 8, seconds=10.0), []

    def save(trainer, module):
        saved.append(trainer.global_step)
        checkpoints.saved_at = now[0]

    checkpoints.save = save
    callback = Interruption(tmp_path, checkpoints)
    for step in range(9):
        now[0] = 4.0 * step
        a_step(callback, step)
    assert saved == [4, 8]  # due at 12 and 28 s, and a step later all know
    other = Interruption(tmp_path, checkpoints)
    now[0] = 100
    for step in range(4):
        a_step(other, step, first=False)
    assert saved == [4, 8]


def test_a_second_signal_while_saving_is_harmless(config, monkeypatch):
    save = Checkpoints.save

    def interrupted(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, trainer, module)
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    options = config("faults=sigterm", "faults.sigterm.step=3")
    with pytest.raises(TryAgain, match="SIGTERM"):
        fit.train(options)
    assert state(Path(options.run))["position"]["step"] == 5


def interruption(tmp_path, **options):
    saved, checkpoints = [], Checkpoints(tmp_path, EMA(), Position(0, batch=4), 8)
    checkpoints.save = lambda *_: saved.append(1)
    callback = Interruption(tmp_path, checkpoints, **options)
    return callback, saved


def a_step(callback, step, world_size=1, first=True):
    """Step 0 is the start."""
    module = SimpleNamespace(batch=4, device=torch.device("cpu"))
    trainer = SimpleNamespace(global_step=step, world_size=world_size, is_global_zero=first)
    if step:
        callback.on_train_batch_end(trainer, module, None, None, 0)
    else:
        callback.on_train_start(trainer, module)


def test_under_slurm_sigterm_waits_to_be_killed_and_other_signals_do_not(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr("cascade.training.callbacks.interruption.time.sleep", slept.append)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        callback, saved = interruption(tmp_path, wait=7.0)
        callback.received = number
        a_step(callback, 0)
        with pytest.raises(TryAgain):
            a_step(callback, 1)
        assert saved == [1]
    assert slept == [7]


def rank_whose_workers_are_not_told(run):
    """As if a second signal had come while the first one's error told them."""
    with stoppable(run):
        data = DataLoader(range(8), num_workers=1, worker_init_fn=ignore_signals)
        held.append(iter(data))
        next(held[0])
        os.kill(held[0]._workers[0].pid, signal.SIGTERM)  # Slurm's, which is only delayed
        next(held[0])


held = []  # no garbage at the end of the process


def test_a_rank_that_has_stopped_does_not_wait_for_its_data_workers(tmp_path):
    rank = multiprocessing.get_context("fork").Process(
        target=rank_whose_workers_are_not_told, args=(tmp_path,)
    )
    rank.start()
    rank.join(20)
    code = rank.exitcode
    rank.kill()
    assert code == 0


def test_a_signal_to_another_rank_counts_and_ranks_at_different_samples_fail(tmp_path, monkeypatch):
    def other(received, consumed):
        def reduce(notes, op):
            theirs = torch.tensor([received, consumed, -consumed, 0, 0])
            notes.copy_(torch.maximum(notes, theirs))

        monkeypatch.setattr(torch.distributed, "all_reduce", reduce)

    callback, saved = interruption(tmp_path)
    other(int(signal.SIGUSR1), 0)
    a_step(callback, 0, world_size=2)
    with pytest.raises(TryAgain, match="SIGUSR1"):
        a_step(callback, 1, world_size=2)
    assert saved == [1]
    callback, saved = interruption(tmp_path)
    other(0, 8)
    a_step(callback, 0, world_size=2)
    with pytest.raises(Failed, match="different samples, 0 and 8"):
        a_step(callback, 1, world_size=2)
    assert saved == []


def watched(run, how):
    watchdog = Watchdog(Path(run), 0.4)
    trainer = SimpleNamespace(global_rank=1, global_step=7)
    watchdog.start(1)
    watchdog.setup(trainer, None, "fit")
    watchdog.on_train_batch_end(trainer, None, None, None, 0)
    hangs = signal.pause
    if how == "in a step":
        watchdog.on_train_batch_start(trainer, None, None, 1)
    elif how == "with Python's lock":
        import re

        hangs = partial(re.match, "(a+)+b", 40 * "a")
    elif how == "not":
        for _ in range(30):
            watchdog.beat("long")
            signal.sigtimedwait([], 0.05)
        watchdog.on_exception(trainer, None, None)
        signal.sigtimedwait([], 3.0)  # nobody is watched any more
        return 5
    hangs()


HANGS = {"in a step": 75, "between steps": 75, "with Python's lock": 1, "not": 5}


def test_a_process_without_progress_ends_and_shows_where_it_was(tmp_path):
    jobs = {how: Job(watched, (str(tmp_path / how), how), out=tmp_path / how) for how in HANGS}
    try:
        assert {how: job.wait()[0] for how, job in jobs.items()} == HANGS
    finally:
        for job in jobs.values():
            job.kill()
    for how in ("in a step", "between steps"):
        assert "in watched" in (tmp_path / how / "stacks-rank1.txt").read_text()
        assert "in watched" in jobs[how].output()
        (event,) = events(tmp_path / how, "hung")
        assert (event["rank"], event["step"]) == (1, 7)
        assert event["seconds"] >= (0.4 if how == "in a step" else 1.2)
    assert "in watched" in jobs["with Python's lock"].output()
    beat = json.loads((tmp_path / "not" / "heartbeats" / "rank1.json").read_text())
    assert beat["step"] == 7
    assert beat["phase"] == "long"


def test_a_fault_strikes_once_in_a_run(config):
    options = config("faults=crash", "faults.crash.step=2", "save_seconds=0.0")
    with pytest.raises(RuntimeError, match="an injected crash"):
        fit.train(options)
    assert_equals(fit.train(options), by_hand(options, range(0, 40, 4)))


def test_every_fault_composes_and_several_together():
    names = sorted(path.stem for path in (Path(conf[0]) / "faults").glob("*.yaml"))
    assert len(names) > 10
    every = built(composed("train", ["data.path=none", f"faults=[{','.join(names)}]"]).faults)
    assert sorted(every) == names
    for name in names:
        alone = built(composed("train", ["data.path=none", f"faults={name}"]).faults)
        assert list(alone) == [name]
        assert isinstance(alone[name], L.Callback)


def test_ctrl_c_ends_with_130(config, monkeypatch):
    """As the command line makes of KeyboardInterrupt; without a checkpoint, and at once."""
    monkeypatch.setattr(train, "main", lambda args: fit.train(config(*args.overrides)))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options = ["faults=sigterm", "faults.sigterm.step=3", "faults.sigterm.name=SIGINT"]
        assert main(["train", *options]) == 130
    finally:
        signal.signal(signal.SIGINT, before)

"""Bad samples are named once, whoever meets them and however often; too many of them end a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from cascade.data.loading import loader
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.training.callbacks.skips import SKIPPED, Skips
from tests.processes import Job
from tests.test_shards import sample, write

WESTERN = "caption is not UTF-8, perhaps CP1252: convert it with iconv -f CP1252 -t UTF-8"
BAD = {
    "0/0003": "broken picture",
    "1/0004": "broken picture",
    "1/0005": "no caption",
    "1/0006": WESTERN,
}


@pytest.fixture
def folder(tmp_path):
    """Two shards of twelve samples; four are bad."""
    for shard in range(2):
        members = []
        for i in range(12):
            whole = sample(f"{i:04d}", i)
            picture, caption, _ = whole
            reason = BAD.get(f"{shard}/{i:04d}")
            if reason == "broken picture":
                whole = [(picture[0], b"<html>"), caption]
            elif reason == "no caption":
                whole = [picture, (caption[0], b" \n")]
            elif reason == WESTERN:
                whole = [picture, (caption[0], "Übung".encode("cp1252"))]
            members += whole
        (tmp_path / "shards").mkdir(exist_ok=True)
        write(tmp_path / "shards" / f"{shard}.tar", members)
    return tmp_path / "shards"


class Module(L.LightningModule):
    def __init__(self, batch):
        super().__init__()
        self.trained = SimpleNamespace(batch=batch)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, _):
        return (self.weight * batch["image_8"]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(L.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.named = lines(self.path.parent)


def fit(folder, run, steps, ranks=1, first=0, accumulate=1, then=None, **options):
    """Trains on batches of 4 of all ranks together."""
    run = Path(run)
    run.mkdir(exist_ok=True)
    shards = Shards(Path(folder), Pictures((8,)), seed=1)
    saved = []
    options = {"fraction": 1.0, "every": 3, **options}
    skips = Skips(run, save=lambda trainer, module: saved.append(trainer.global_step), **options)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=[skips, *([then] if then else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    share = 4 // ranks // accumulate
    data = loader(shards, share, trainer.global_rank, ranks, start=4 * first)
    try:
        trainer.fit(Module(4), data)
    except UserError as error:
        return saved, str(error)
    return saved, None


def lines(run):
    return [json.loads(line) for line in (run / SKIPPED).read_text().splitlines()]


def test_each_bad_sample_is_named_once_at_its_first_place(folder, tmp_path, capsys):
    shards = Shards(folder, Pictures((8,)), seed=1)
    first = {}
    for n in range(48):
        for skip in shards[n]["skipped"]:
            first.setdefault(skip.key, (n, skip.reason))
    fit(folder, tmp_path / "run", 12)
    found = lines(tmp_path / "run")
    assert {line["key"]: (line["sample"], line["reason"]) for line in found} == first
    assert len(found) == len(BAD)
    said = capsys.readouterr().out
    assert all(part in said for part in ("2 broken picture, ", "1 no caption", f"1 {WESTERN}"))
    (event,) = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(event)["broken picture"] == 2


def test_a_run_that_goes_on_names_none_again_and_mends_a_torn_line(folder, tmp_path):
    run = tmp_path / "run"
    fit(folder, run, 4)
    some = lines(run)
    with (run / SKIPPED).open("a") as file:
        file.write('{"sample": 7, "ke')
    fit(folder, run, 12, first=2)
    found = lines(run)
    assert found[: len(some)] == some
    assert len(some) < len({line["key"] for line in found}) == len(found) == len(BAD)


def test_what_was_met_before_a_checkpoint_is_named_before_it(folder, tmp_path):
    shards, save = (
        Shards(folder, Pictures((8,)), seed=1),
        SaveAt(5, tmp_path / "run" / "checkpoint"),
    )
    fit(folder, tmp_path / "run", 6, every=100, then=save)
    met = {skip.key for n in range(20) for skip in shards[n]["skipped"]}
    assert met
    assert {line["key"] for line in save.named} == met


@pytest.mark.parametrize("accumulate", [1, 2])
def test_too_many_stop_the_run_behind_a_checkpoint(folder, tmp_path, accumulate):
    limits = {"fraction": 0.1, "window": 20}  # a bad one in 8 is more, in 20 it is not yet
    saved, error = fit(folder, tmp_path / "run", 24, accumulate=accumulate, **limits)
    assert "samples are bad, over 10.0% (" in error
    assert any(reason in error for reason in BAD.values())
    assert ": repair those in" in error
    assert f"step {saved[0]} is saved" in error
    assert len(saved) == 1
    assert saved[0] % 3 == 0
    saved, error = fit(folder, tmp_path / "other", 24, **{**limits, "fraction": 0.3})
    assert (saved, error) == ([], None)


def in_ranks(folder, run):
    fit(folder, run, 12, ranks=2)


def stopped(folder, run):
    saved, error = fit(folder, run, 24, ranks=2, fraction=0.1, window=20)
    return 2 if error and len(saved) == 1 else 1


def test_two_ranks_name_what_one_names_and_stop_together(folder, tmp_path):
    fit(folder, tmp_path / "one", 12)
    args = str(folder), str(tmp_path / "two")
    jobs = [Job(in_ranks, args, ranks=2, out=tmp_path / "out")]
    jobs.append(Job(stopped, (str(folder), str(tmp_path / "end")), ranks=2, out=tmp_path / "out2"))
    assert jobs[0].wait() == [0, 0], jobs[0].output()
    assert jobs[1].wait() == [2, 2], jobs[1].output()
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert jobs[0].output().count("bad samples, replaced by the next good ones") == 1

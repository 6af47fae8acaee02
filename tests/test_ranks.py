"""Trainings on several ranks: with DDP and with FSDP2 they equal one on a single rank."""

import csv
import json
import os
import signal
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.architecture import Architecture
from cascade.encoders.clip import CLIPTraining
from cascade.errors import UserError
from cascade.stage import Stage
from cascade.training.devices import Bfloat16
from cascade.training.module import Training
from cascade.training.sharding import Sharded, divided, mean_by_rank, replicated, sharded
from tests.processes import Job

SMALL = [
    "stage=sr256",
    "size=16",
    "low=8",
    "crop=null",
    "batch=4",
    "warmup=8",
    "net.net.channels=8",
    "net.net.patch=2",
    "net.net.embed=16",
    "ema=0.9",
    "learning_rate.total=160",
]
PRIOR = [
    "stage=prior",
    "process=cosine_x0_analytic",
    "+process.levels=4",
    "batch=4",
    "images=24",
    "warmup=8",
    "++optim.eps=1e-3",  # gradients that are zero but for rounding do not move their parameters
]
# A vision transformer: the statistics of batch normalisation are those of a rank's own samples.
CLIP = ["stage=clip", "clip.model.vision_layers=1", "batch=8", "images=24", "++optim.eps=1e-3"]

# Ranks, and what makes them train in each way.
ONE = (1, [])
DDP = (2, ["trainer.devices=2"])
FSDP = (2, ["trainer=fsdp", "trainer.devices=2"])
ACCUMULATED = (2, ["trainer=fsdp", "trainer.devices=2", "micro_batch=1"])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Shards of small scenes, an untrained CLIP, and its embeddings of them."""
    folder = tmp_path_factory.mktemp("ranks")
    for split, count in (("train", 20), ("val", 8)):
        write_scenes(folder / "shards", "plain", split, count, 32, seed=0, shard_size=10)
    return folder


def config(data, *overrides):
    return composed("train", [*overrides, f"data.path={data / 'shards'}"])


def test_several_devices_get_ddp_and_one_gets_nothing():
    for make in (replicated, sharded):
        assert make(1, 1) == make("auto", 1) == "auto"
    for devices, nodes in ((2, 1), ("2", 1), (1, 2)):
        assert isinstance(replicated(devices, nodes), DDPStrategy)
        assert isinstance(sharded(devices, nodes), Sharded)


@pytest.mark.parametrize(("choice", "kind"), [("auto", DDPStrategy), ("fsdp", Sharded)])
def test_a_trainer_is_a_choice_of_two(choice, kind):
    alone = built(composed("train", ["data.path=none", f"trainer={choice}"]).trainer)
    assert L.Trainer(accelerator="cpu", logger=False, **alone).world_size == 1
    overrides = ["data.path=none", f"trainer={choice}", "trainer.devices=2"]
    both = built(composed("train", overrides).trainer)
    trainer = L.Trainer(accelerator="cpu", logger=False, **both)
    assert isinstance(trainer.strategy, kind)
    assert trainer.world_size == 2


def test_what_cannot_be_divided_is_refused():
    strategy = Sharded()
    clip = Training(CLIPTraining(Architecture(32, 32, 16, 32, 1, 32, 1, 16), torch.optim.AdamW))
    with pytest.raises(UserError, match="not a CLIPTraining") as refusal:
        strategy.connect(clip)
    assert "\n" not in str(refusal.value)
    stage = built(composed("train", [*SMALL, "data.path=none", "optim=adafactor"]).stage)
    module = Training(stage)
    module.trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    strategy.connect(module)
    with pytest.raises(UserError, match="optim=adamw"):
        strategy.setup_optimizers(module.trainer)


def test_only_what_its_own_forward_enters_is_divided():
    for choice in ("stage=sr1024", "stage=sr256_text", "stage=prior", "stage=decoder"):
        with torch.device("meta"):
            stage = built(composed("train", [choice, "data.path=none"]).stage)
        found = list(divided(stage))
        assert found
        assert not any(isinstance(module, (nn.ModuleList, nn.Conv2d)) for module in found)
        inside = [m for module in found for m in module.modules() if m is not module]
        assert not set(map(id, found)) & set(map(id, inside))


def test_bfloat16_clips_the_gradients_of_a_fused_optimizer():
    """Lightning's own does not: once it does, ours can go."""

    class Line(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(1, 1)

        def training_step(self, batch, _):
            assert torch.is_autocast_enabled("cpu")
            return 1e3 * self.line(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0, fused=True)

    def moved(plugin):
        torch.manual_seed(0)
        line = Line()
        before = nn.utils.parameters_to_vector(line.parameters()).detach()
        L.Trainer(
            accelerator="cpu",
            plugins=[plugin],
            gradient_clip_val=0.5,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(line, DataLoader(torch.ones(2, 1)))
        return (nn.utils.parameters_to_vector(line.parameters()).detach() - before).norm()

    with pytest.raises(RuntimeError, match="gradient clipping"):
        moved(MixedPrecision("bf16-mixed", "cpu"))
    torch.testing.assert_close(moved(Bfloat16("cpu")), torch.tensor(0.5), atol=1e-3, rtol=0)


def recorded(arguments, folder):
    """`cascade ARGUMENTS`, which also notes the samples that this rank trains on."""
    seen, step = [], Stage.training_step

    def recording(stage, batch, i):
        seen.extend(batch["sample"].tolist())
        return step(stage, batch, i)

    Stage.training_step = recording
    code = cli.main(arguments)
    name = f"{len(list(folder.iterdir()))}-{os.environ.get('RANK', 0)}.json"
    (folder / name).write_text(json.dumps(seen))
    return code


@pytest.fixture
def trained(data, tmp_path):
    """Trains a run in one way; returns its directory."""

    def train(run, way, *overrides, stage=SMALL):
        ranks, choices = way
        folder = tmp_path / run
        (folder / "seen").mkdir(parents=True, exist_ok=True)
        arguments = [*stage, *overrides, *choices, f"run={folder}"]
        arguments += [f"data.path={data / 'shards'}", f"clip.path={data / 'clip'}"]
        job = Job(
            recorded,
            [["train", *arguments], folder / "seen"],
            out=folder / "out",
            ranks=ranks,
        )
        assert job.wait() == [0] * ranks, job.output()
        return folder

    return train


def checkpoint(run):
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    return torch.load(newest / "state.pt", weights_only=True)


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").open()))


def assert_same_losses(a, b):
    assert [row["images"] for row in rows(a)] == [row["images"] for row in rows(b)]
    for row, other in zip(rows(a), rows(b)):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-4)


def assert_alike(a, b):
    """The same weights, averages, moments, statistics and grids."""
    close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4, check_stride=False)
    close(load_file(a / "weights.safetensors"), load_file(b / "weights.safetensors"))
    mine, theirs = checkpoint(a), checkpoint(b)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        close(mine[part], theirs[part])
    close(mine["callbacks"]["EMA"]["average"], theirs["callbacks"]["EMA"]["average"])
    for picture in (a / "samples").glob("*.png"):
        pixels = [np.asarray(Image.open(run / "samples" / picture.name)) for run in (a, b)]
        np.testing.assert_allclose(*(p.astype(int) for p in pixels), atol=1)


def seen(run):
    return sorted(n for file in (run / "seen").iterdir() for n in json.loads(file.read_text()))


@pytest.mark.slow
def test_one_rank_two_with_ddp_and_two_with_shares_train_alike(trained):
    ways = {"one": ONE, "ddp": DDP, "fsdp": FSDP}
    one, *others = [trained(name, way, "images=160", "grids=2") for name, way in ways.items()]
    assert len(rows(one)) == 2
    assert len(list((one / "samples").glob("0*.png"))) == 2
    for run in (one, *others):
        assert seen(run) == list(range(160))
    for run in others:
        assert_same_losses(one, run)
        assert_alike(one, run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ways", [(ONE, FSDP, ONE), (DDP, ACCUMULATED, DDP)], ids=["one-fsdp-one", "ddp-fsdp-ddp"]
)
def test_each_goes_on_from_the_checkpoint_of_another(trained, ways):
    whole = trained("whole", ONE, "images=48", "grids=0")
    for images, way in zip((16, 32, 48), ways):
        run = trained("changing", way, f"images={images}", "grids=0")
    assert seen(run) == list(range(48))
    assert_alike(whole, run)


class Crossed(nn.Module):
    """Registers its layers in another order than that of their gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.a, self.b = nn.Linear(40, 7), nn.Linear(30, 50), nn.Linear(50, 40)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def went_on(hook):
    """Whether weights depend on when DDP began: 0 if not."""
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), []
    for begins in ({0}, {0, 4}):
        net = Crossed()
        for step in range(8):
            if step in begins:
                ddp = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
                if hook:
                    ddp.register_comm_hook(None, hook)
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            x = torch.randn(3, 30, generator=torch.Generator().manual_seed(100 * step + rank))
            ddp(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(nn.utils.parameters_to_vector(net.parameters()).detach())
    torch.distributed.destroy_process_group()
    return int(not torch.equal(*found))


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "code"), [(mean_by_rank, 0), (None, 1)], ids=["ours", "DDP's"])
def test_sums_over_four_ranks_do_not_depend_on_how_long_they_have_run(hook, code, tmp_path):
    """DDP's own do: once they do not, ours can go."""
    job = Job(went_on, (hook,), out=tmp_path, ranks=4)
    assert job.wait(120) == [code] * 4, job.output()


@pytest.mark.slow
def test_four_ranks_that_go_on_equal_four_that_never_stopped(trained):
    """Bit for bit, although DDP arranges its gradients anew after the first step of a process."""
    four = 4, ["trainer.devices=4"]
    whole = trained("whole", four, "images=32", "grids=0")
    for images in (8, 16, 32):
        run = trained("going", four, f"images={images}", "grids=0")
    a, b = (load_file(folder / "weights.safetensors") for folder in (whole, run))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def embedded(data):
    from cascade.encoders.clip import save_clip

    architecture = built(config(data, "stage=clip").clip.model)
    torch.manual_seed(0)
    save_clip(architecture, architecture.build(), data / "clip")
    arguments = ["data", "precompute", str(data / "shards"), "--clip", str(data / "clip")]
    assert cli.main(arguments) in (0, None)


@pytest.mark.slow
def test_statistics_are_the_same_on_every_rank(trained, embedded):
    """Those of the embeddings before training, and what the process measures behind it."""
    one, *others = [
        trained(name, way, stage=PRIOR)
        for name, way in (("one", ONE), ("ddp", DDP), ("fsdp", FSDP))
    ]
    state = load_file(one / "weights.safetensors")
    assert state["codec.mean"].any()
    assert (state["process.log_odds"] > -1e4).any()
    for run in others:
        assert_same_losses(one, run)
        assert_alike(one, run)


@pytest.mark.slow
def test_a_clip_trains_alike_on_two_ranks(trained):
    one, two = trained("one", ONE, stage=CLIP), trained("two", DDP, stage=CLIP)
    assert_same_losses(one, two)
    states = [load_file(run / "open_clip_model.safetensors") for run in (one, two)]
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)


def waiting(arguments):
    """`cascade ARGUMENTS`, of which rank 1 stops at the first step."""
    if os.environ["RANK"] == "1":
        Stage.training_step = lambda *_: signal.pause()
    return cli.main(arguments)


@pytest.mark.slow
def test_a_rank_does_not_wait_for_ever(data, tmp_path):
    overrides = [*SMALL, *DDP[1], "+trainer.strategy.seconds=3", "images=8", "grids=0"]
    arguments = ["train", *overrides, f"run={tmp_path / 'run'}", f"data.path={data / 'shards'}"]
    job = Job(waiting, [arguments], out=tmp_path / "out", ranks=2)
    job.processes[0].join(60)
    assert job.processes[0].exitcode not in (0, None), job.output()
    job.kill()

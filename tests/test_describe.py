"""What `cascade describe` says of a training step is what happens in one: real tensors agree."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cascade.conf
from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.diffusion import noise
from cascade.nets.cost import GIB, Rehearsal, Way, parameters, parts
from cascade.trainable import Trainable
from cascade.training.callbacks.ema import EMA
from cascade.training.rehearsal import batches, rehearsed

CONF = Path(next(iter(cascade.conf.__path__)))
SMALL = ["stage=decoder", "size=16", "text.reader.length=8", "net.channels=48", "net.blocks=1"]


def choices(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def small():
    return rehearsed(SMALL)[1]


def real(overrides, count):
    """The same module and batch as are rehearsed, in memory."""
    config = composed("train", ["data.path=none", *overrides])
    module = built(config.stage)
    return module, batches(config, module)(count)


@pytest.mark.parametrize(
    "overrides",
    [SMALL, ["stage=prior"], ["stage=sr256", "crop=16"]],
    ids=lambda overrides: overrides[0],
)
def test_flops_are_those_of_a_real_step(overrides):
    _, rehearsal = rehearsed(overrides)
    module, batch = real(overrides, 8)
    with FlopCounterMode(display=False) as forward:
        module.loss(batch)
    with FlopCounterMode(display=False) as training:
        module.training_step(batch, 0).backward()
    assert rehearsal.forward == pytest.approx(forward.get_total_flops() / 8, rel=0.01)
    assert rehearsal.step().flops == pytest.approx(training.get_total_flops() / 8, rel=0.01)


class Tiny(Trainable):
    """A convolution, then one head of attention over the places."""

    def __init__(self, c=8):
        super().__init__(torch.optim.AdamW)
        self.conv = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c, bias=False)

    def loss(self, batch):
        h = self.norm(self.conv(batch["x"]).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(h)[:, None].chunk(3, 3)
        return F.scaled_dot_product_attention(q, k, v).float().square().mean()

    def training_step(self, batch, _):
        return self.loss(batch)

    export = restore = None


def tiny(side):
    with torch.device("meta"):
        module = Tiny()
    return Rehearsal(module, lambda count: {"x": torch.zeros(count, 3, side, side)})


@pytest.mark.parametrize("bf16", [False, True])
def test_flops_of_a_convolution_and_attention_in_closed_form(bf16):
    n, c, rehearsal = 64, 8, tiny(8)
    conv, qkv, product = 2 * n * 9 * 3 * c, 2 * n * c * 3 * c, 2 * n * n * c
    assert rehearsal.forward == conv + qkv + 2 * product
    # Backward: of the convolution its weight alone, as pictures want no gradient; of attention,
    # which keeps no weights, q k^T once more, and the gradients of q, k, v and the weights.
    assert rehearsal.step(bf16).flops == 2 * conv + 3 * qkv + 7 * product


def test_attention_stores_no_weights():
    """Four times the places, four times the memory: nothing is quadratic in them."""
    small, large = (tiny(side).step().peak(1000) for side in (16, 32))
    assert large == pytest.approx(4 * small, rel=0.01)


def test_autocast_is_as_on_a_gpu():
    """There norms come in float32, and weights are cast once; attention is in bfloat16."""
    rehearsal, seen = tiny(8), {}
    for name, layer in rehearsal.module.named_children():
        layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    step = rehearsal.step(bf16=True)
    assert seen == {"conv": torch.bfloat16, "norm": torch.float32, "qkv": torch.bfloat16}
    weights = [rehearsal.module.conv.weight, rehearsal.module.qkv.weight]
    assert step.events[:, 0].max() == 2 * sum(w.numel() for w in weights)


def measured(overrides, count, checkpointing):
    """The most bytes alive in the second micro-batch of a real run, weights and all."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        module, batch = real(overrides, count)
        module.net.checkpoint = checkpointing
        average = EMA()
        average.on_fit_start(None, module)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        for _ in range(2):
            module.training_step(batch, 0).backward()
            optimizer.step()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return torch.tensor(sizes).cumsum(0).max().item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_is_what_a_real_step_takes(small, checkpointing):
    memory = Way(small, small.step(checkpointing=checkpointing)).memory(16)
    peak = measured(SMALL, 16, checkpointing)
    assert memory.total == pytest.approx(peak, rel=0.15)
    assert memory.activations == pytest.approx(peak - memory.total + memory.activations, rel=0.15)
    assert memory.activations > 0.2 * memory.total  # or the test would say little


def test_memory_of_weights_and_what_goes_with_them():
    rehearsal = tiny(8)
    whole, shared = (Way(rehearsal, rehearsal.step(bf16=True), n) for n in (1, 4))
    p, of_one = parameters(rehearsal.module), whole.memory(3)
    assert (of_one.weights, of_one.gradients, of_one.average) == (4 * p, 4 * p, 4 * p)
    assert (of_one.optimizer, of_one.gathered) == (8 * p, 0)
    assert shared.memory(3).optimizer == 2 * p
    casts = 2 * (rehearsal.module.conv.weight.numel() + rehearsal.module.qkv.weight.numel())
    assert of_one.activations - shared.memory(3).activations <= casts


def test_memory_grows_with_the_batch_until_it_does_not_fit(small):
    stored, repeated = (small.step(bf16=True, checkpointing=c) for c in (False, True))
    way = Way(small, stored)
    totals = [way.memory(batch).total for batch in (1, 2, 3, 10, 100, 1000)]
    assert totals == sorted(set(totals))
    limit = 2 * GIB
    most = way.largest(limit)
    assert way.memory(most).total <= limit < way.memory(most + 1).total
    assert way.largest(1000) == 0
    assert repeated.flops > stored.flops
    assert repeated.peak(100) < stored.peak(100)
    assert Way(small, stored, 8).largest(limit) > most
    assert Way(small, repeated).largest(limit) > most


def test_a_schedule_stays_usable_after_a_rehearsal():
    """Its table is made once in a process; made of fake numbers it would spoil all that follows."""
    noise._linear_table.cache_clear()
    rehearsed([*SMALL, "process=linear_eps"])
    assert noise.linear_table(torch.tensor([1.0])).item() == pytest.approx(-10.117, abs=1e-3)


def test_parts_are_named_by_what_they_condition_on():
    with torch.device("meta"):
        module = built(composed("train", ["data.path=none", "stage=sr256"]).stage)
    assert {"conditioner.low", "net.down", "net.up"} <= parts(module).keys()


def test_parts_hold_all_parameters():
    for stage in choices("stage"):
        config = composed("train", ["data.path=none", f"stage={stage}"])
        with torch.device("meta"):
            module = built(config.stage)
        assert parts(module).total() == parameters(module)


@pytest.mark.parametrize("stage", choices("stage"))
def test_every_stage_runs_forward(stage):
    _, rehearsal = rehearsed([f"stage={stage}"])
    assert rehearsal.forward > 0


@pytest.mark.parametrize("overrides", [SMALL, ["stage=prior_ar"], ["stage=clip"]], ids=str)
def test_a_stage_is_described(overrides, capsys):
    assert main(["describe", *overrides, "batch=24", "gpus=3"]) == 0
    out = capsys.readouterr().out
    assert overrides[0] in out
    assert "8 samples at a time" in out
    assert "most at a time" in out


def test_a_stage_is_found_for_a_network(capsys):
    assert main(["describe", "net=unet_sr_tiny"]) == 0
    assert "stage=sr256 net=unet_sr_tiny" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stage", choices("stage"))
def test_every_stage_is_described(stage):
    assert main(["describe", f"stage={stage}"]) == 0


# Networks that differ in widths and depths alone from one that is described in full, by its name.
LEARNED = ["stage=decoder", "process=cosine_eps_learned"]
LARGER = {
    "if_m": (LEARNED, ["if_l", "if_xl"]),
    "glide_released": (LEARNED, ["glide_base", "karlo_decoder", "unclip_decoder"]),
    "imagen_300m": (["stage=decoder"], ["imagen_500m", "imagen_1b", "imagen_2b"]),
    "karlo_prior": (["stage=prior"], ["unclip_prior"]),
}
FORWARD = {net: [*stage, f"net={net}"] for stage, nets in LARGER.values() for net in nets}


@pytest.mark.slow
@pytest.mark.parametrize("net", sorted({*choices("net")} - {*FORWARD}))
def test_every_network_is_described(net):
    # Nothing conditions this one, and every stage conditions its network.
    assert main(["describe", f"net={net}"]) == (2 if net == "ddpm_64" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", FORWARD.values(), ids=FORWARD)
def test_a_larger_network_runs_forward_in_the_same_stage(overrides):
    _, rehearsal = rehearsed(overrides)
    assert rehearsal.forward > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gpu_memory=much"], "gpu_memory=much: choose a number of GiB above 0"),
        (["gpu_memory=0"], "gpu_memory=0"),
        (["gpu_memory=nan"], "gpu_memory=nan"),
        (["gpus=2.5"], "gpus=2.5: choose a whole number above 0"),
        (["stage=decoder", "gpu_memori=80"], "gpu_memori"),
        (["stage=decoder", "batch=0"], "batch=0"),
        (["stage=decoder", "batch=many"], "batch=many"),
        (["stage=decoder", "micro_batch=-1"], "micro_batch=-1"),
        (["net=unet_gigantic"], "unet_tiny"),  # what there is
        (["stage=decoder", "net=prior_tiny"], "net.embed"),
        (["stage=decoder", "net=unet_tiny", "+net.pixels=4"], "net does not fit stage decoder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, says, capsys):
    assert main(["describe", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("cascade: ")
    assert says in error
    assert "\n" not in error

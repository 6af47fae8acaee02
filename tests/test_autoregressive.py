"""The autoregressive prior: PCA and buckets, the network and its cache, the law of its draws."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._device import _device_constructors

from cascade.autoregressive import Autoregressive, TokenSampler, drawn
from cascade.codecs import Tokens
from cascade.conditioning import Cond, Conditioner, Sequence, Vector
from cascade.config.compose import built, composed
from cascade.diffusion.sampling import DiffusionSampler
from cascade.draws import Draws
from cascade.errors import UserError
from cascade.nets.ar import TokenTransformer
from cascade.pipeline import BestOf
from cascade.stage import Stage

# --- the network


def net(components=5, buckets=7):
    """Zero-initialised branches would hide what they are connected to."""
    torch.manual_seed(1)
    made = TokenTransformer(components, buckets, width=16, layers=3, heads=2, context=6)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return made.double().eval()


def condition(b=3, n=6):
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(n) < torch.tensor([[2], [5], [6]])[:b]
    return Cond(tokens=torch.randn(b, n, 16, generator=g).double(), mask=mask, after_text=1)


def some_tokens(b=3, t=6, v=7):
    return torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(3))


def test_logits_depend_on_all_tokens_before_and_on_none_after():
    model, cond, tokens = net(), condition(), some_tokens()
    seen = []
    model.embed.register_forward_hook(lambda _, args, out: seen.append(out))
    prefix = cond.tokens.clone().requires_grad_()
    logits = model(tokens, dataclasses.replace(cond, tokens=prefix))
    for i in range(6):
        before, text = torch.autograd.grad(
            logits[:, i].square().sum(), [seen[0], prefix], retain_graph=True
        )
        assert i == 5 or before[:, i:].abs().max() == 0
        assert i == 0 or before[:, :i].abs().amax(2).min() > 0
        assert (text.abs().amax(2) > 0).equal(cond.mask)


def test_cached_logits_equal_those_of_a_whole_pass():
    model, cond, tokens = net(), condition(), some_tokens()
    whole = model(tokens, cond)
    with torch.no_grad():
        logits, cache = model.prefill(cond)
        parts = [logits, *(model.step(tokens[:, i], cache) for i in range(5))]
    torch.testing.assert_close(torch.stack(parts, 1), whole, atol=1e-10, rtol=0)
    assert cache.length == cache.kv.shape[4] == 6 + 6


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpoint in (False, True):
        model = net()
        model.checkpoint = checkpoint
        model(some_tokens(), condition()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_masked_text_might_as_well_be_absent():
    model, tokens = net(), some_tokens(1)
    cond = condition(1)
    other = Cond(tokens=torch.where(cond.mask[..., None], cond.tokens, 100.0), mask=cond.mask)
    torch.testing.assert_close(model(tokens, cond), model(tokens, other))
    short = Cond(tokens=cond.tokens[:, :2], mask=cond.mask[:, :2])
    torch.testing.assert_close(model(tokens, cond), model(tokens, short))
    torch.testing.assert_close(model.prefill(cond)[0], model.prefill(short)[0])


def test_it_builds_on_meta_whatever_was_loaded_before(monkeypatch):
    """While transformers loads a model, another `torch.linspace` is in the place of torch's own;
    if that is when torch notes which functions `torch.device` covers, its own is not among them."""
    _device_constructors.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *args, **kwargs: None)
        with torch.device("meta"):
            torch.zeros(1)
    try:
        with torch.device("meta"):
            assert not torch.linspace(0, 1, 2).is_meta
            net = TokenTransformer(2, 8, 16, 1, 2, 4)
        assert all(p.is_meta for p in net.parameters())
    finally:
        _device_constructors.cache_clear()


def test_the_published_size():
    """1 B in print; which parts that counts is read in the file."""
    config = composed("train", ["stage=prior_ar", "data.path=x", "net=prior_ar_unclip"])
    with torch.device("meta"):
        counted = sum(p.numel() for p in built(config.net).parameters())
    layer = 12 * 1664**2 + 13 * 1664  # four projections, the MLP; biases and two norms
    rest = (1024 + 257 + 320) * 1664 + 1664**2 + 3 * 1664
    assert counted == 24 * layer + rest == 803_399_168


# --- the loss and the draws


@dataclass
class Fixed:
    """Stands for a trained network: logits that are given, [b, t, v], whatever the tokens."""

    logits: torch.Tensor
    weaker: torch.Tensor | None = None
    told: list = field(default_factory=list)

    def __call__(self, tokens, cond):
        return self.logits

    def prefill(self, cond):
        self.given = torch.cat([self.logits, self.weaker]) if cond == "both" else self.logits
        return self.given[:, 0], iter(self.given.unbind(1)[1:])

    def step(self, token, cache):
        self.told.append(token)
        return next(cache)


class Word(str):
    def cat(self, other):
        return Word("both")


def sample(model, sampler, shape, weaker=None, noise=torch.randn):
    return sampler(Autoregressive(), model, shape, Word("own"), weaker, noise)


def test_the_loss_is_the_mean_negative_log_probability_of_the_tokens():
    model, cond, tokens = net(), condition(), some_tokens()
    loss = Autoregressive().loss(model, tokens, cond, torch.randn)
    p = model(tokens, cond).softmax(2).detach().numpy()
    by_hand = [-np.mean([np.log(p[b, i, tokens[b, i]]) for i in range(6)]) for b in range(3)]
    np.testing.assert_allclose(loss.detach().numpy(), by_hand, atol=1e-10)
    uniform = Fixed(torch.zeros(3, 6, 7))
    nats = Autoregressive().loss(uniform, tokens, cond, torch.randn)
    torch.testing.assert_close(nats, torch.full((3,), np.log(7.0)).float())


def test_tokens_are_drawn_by_their_probability():
    torch.manual_seed(0)
    n, v = 20_000, 5
    logits = torch.randn(3, v)
    model = Fixed(logits.expand(n, 3, v))
    tokens = sample(model, TokenSampler(percentile=0.0, temperature=2.0), (n, 3))
    assert all(torch.equal(told, tokens[:, i]) for i, told in enumerate(model.told))
    for i in range(3):
        p = (logits[i] / 2).softmax(0)
        counts = torch.bincount(tokens[:, i], minlength=v)
        deviations = (counts - n * p) / (n * p * (1 - p)).sqrt()
        assert deviations.abs().max() < 4.5


def test_the_dot_product_alone_is_drawn_from_the_top_half_of_its_distribution():
    """The bucket in which the median lies keeps the part of it that lies above."""
    torch.manual_seed(0)
    n, p = 20_000, torch.tensor([0.2, 0.4, 0.3, 0.1])
    model = Fixed(p.log().expand(n, 2, 4))
    tokens = sample(model, TokenSampler(), (n, 2))
    for i, expected in enumerate([[0.0, 0.2, 0.6, 0.2], p.tolist()]):
        found = torch.bincount(tokens[:, i], minlength=4) / n
        torch.testing.assert_close(found, torch.tensor(expected), atol=0.016, rtol=0)
    assert (tokens[:, 0] > 0).all()


def test_a_draw_inverts_the_cdf():
    logits = torch.tensor([0.25, 0.0, 0.5, 0.25]).double().log().expand(6, 4)
    u = torch.tensor([1e-12, 0.2499, 0.25, 0.7499, 0.75, 1 - 1e-12], dtype=torch.float64)
    assert drawn(logits, u).tolist() == [0, 0, 2, 2, 3, 3]


def test_guidance_extrapolates_the_logits_of_both_branches():
    """Of one network in one doubled batch, of another one beside it."""
    torch.manual_seed(0)
    own, weaker = torch.randn(2, 64, 3, 5)
    sampler = TokenSampler(scale=3.0, temperature=0.7)
    plain = dataclasses.replace(sampler, scale=1.0)
    noise = partial(Draws, 0, "noise", range(64))
    formula = Fixed(weaker + 3.0 * (own - weaker))
    expected = sample(formula, plain, (64, 3), noise=noise())
    one = Fixed(own, weaker)
    assert torch.equal(expected, sample(one, sampler, (64, 3), (one, Word("null")), noise()))
    assert torch.equal(one.told[0], expected[:, 0].repeat(2))
    two = Fixed(own), Fixed(weaker)
    assert torch.equal(expected, sample(two[0], sampler, (64, 3), (two[1], Word("x")), noise()))
    assert torch.equal(two[1].told[0], expected[:, 0])
    unguided = sample(one, plain, (64, 3), (one, Word("null")), noise())
    assert torch.equal(unguided, sample(Fixed(own), plain, (64, 3), noise=noise()))


def test_fewer_steps_draw_the_same_first_tokens_and_leave_the_mean_behind():
    model, cond = net(), condition()
    noise = partial(Draws, 0, "noise", range(3))
    reports = []
    short, whole = (
        TokenSampler(steps=steps)(
            Autoregressive(), model, (3, 6), cond, None, noise(), lambda *r: reports.append(r[:2])
        )
        for steps in (4, 100)
    )
    assert torch.equal(short[:, :4], whole[:, :4])
    assert (short[:, 4:] == 3).all()
    assert reports == [(i, 4) for i in range(1, 5)] + [(i, 6) for i in range(1, 7)]


def test_tokens_of_a_sample_are_the_same_whatever_the_batch():
    model, cond = net(), condition()
    null = Cond(tokens=torch.zeros_like(cond.tokens), mask=torch.arange(6).expand(3, -1) < 1)
    sampler = TokenSampler(scale=2.0)
    draw = partial(sampler, Autoregressive(), model)
    together = draw((3, 6), cond, (model, null), Draws(5, "noise", [7, 8, 9]))
    for i in range(3):
        one, none = (Cond(tokens=c.tokens[i : i + 1], mask=c.mask[i : i + 1]) for c in (cond, null))
        alone = draw((1, 6), one, (model, none), Draws(5, "noise", [7 + i]))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"temperature": 0.0}, {"percentile": 1.0}])
def test_a_sampler_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        TokenSampler(**wrong)


# --- the stage


def captioned(n, seed):
    """Two captions, and about each an embedding that varies."""
    g = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 2, (n,), generator=g)
    centres = F.normalize(torch.tensor([[1.0, 1, 0, 0, 0, 1], [-1, 1, 1, 0, 0.5, 0]]), dim=1)
    texts = F.normalize(torch.tensor([[1.0, 0, 0, 1, 0, 1], [0, 1, 1, 0, -1, 0]]), dim=1)
    z = centres[which] + 0.25 * torch.randn(n, 6, generator=g) * torch.linspace(1, 0.2, 6)
    return {
        "sample": torch.arange(n),
        "clip_image": F.normalize(z, dim=1),
        "clip_text": texts[which],
        "text": F.one_hot(which, 4)[:, None].float(),
        "text_mask": torch.ones(n, 1, dtype=torch.bool),
    }


def test_a_small_prior_learns_what_a_caption_means():
    torch.manual_seed(0)
    embedders = {
        "caption": Sequence(4, 32),
        "clip_text": Vector("clip_text", 6, width=32, tokens=1),
    }
    stage = Stage(
        codec=Tokens(6, 6, 16),
        conditioner=Conditioner(embedders, {"caption": 0.1}),
        net=TokenTransformer(6, 16, width=32, layers=2, heads=2, context=1),
        process=Autoregressive(),
        sampler=TokenSampler(),
        optimizer=partial(torch.optim.AdamW, lr=4e-3),
    )
    stage.codec.fit([captioned(2000, 0)])
    optimizer = stage.configure_optimizers()
    losses = []
    for step in range(120):
        batch = captioned(64, 1 + step)
        loss = stage.loss(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - np.log(16)) < 0.02
    stage.eval()
    test = captioned(400, 1000)
    upper = stage.sample(test, seed=0)
    stage.sampler = TokenSampler(percentile=0.0)
    drawn = stage.sample(test, seed=0)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(400))
    few = {key: value[:7] for key, value in test.items()}
    torch.testing.assert_close(stage.sample(few, seed=0), drawn[:7])
    first = test["text"][:, 0, 0] > 0
    for rows in (first, ~first):
        mean, truth = drawn[rows].mean(0), test["clip_image"][rows].mean(0)
        assert (mean - truth).norm() < 0.1  # of the other caption: 1.4
        spread = drawn[rows].var(0).sum() / test["clip_image"][rows].var(0).sum()
        assert 0.75 < spread < 1.35
    # A larger dot product is asked for, and given; of two samples, the better one is kept.
    dots = [(z * test["clip_text"]).sum(1).mean() for z in (test["clip_image"], drawn, upper)]
    assert abs(dots[1] - dots[0]) < 0.04
    assert dots[2] > dots[1] + 0.02
    best = BestOf(stage, 2).sample(test, seed=0)
    assert (best * test["clip_text"]).sum(1).mean() > dots[1] + 0.02


def test_one_word_puts_it_in_the_place_of_the_diffusion_prior():
    common = ["data.path=x"]
    diffusion, tokens = (
        built(composed("train", [*common, f"stage={stage}"]).stage)
        for stage in ("prior", "prior_ar")
    )
    assert isinstance(diffusion.sampler, DiffusionSampler)
    assert isinstance(tokens.sampler, TokenSampler)
    assert (tokens.reads, tokens.writes) == (diffusion.reads, diffusion.writes)
    dataclasses.replace(tokens.sampler, scale=1.0, steps=16)  # what a cascade.yaml says of a prior

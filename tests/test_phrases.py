"""Weighted phrases and negative captions: what they mean, exactly, to every network and prior."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cascade.cli import main
from cascade.conditioning import Cond, log_weights
from cascade.config.compose import built, composed, saved
from cascade.encoders import phrases
from cascade.encoders.clip import FrozenCLIP
from cascade.encoders.phrases import Phrase, asked, parsed, tokens_of
from cascade.encoders.text import FrozenT5, Tokenizer, tokenize
from cascade.nets import attention
from cascade.nets.ar import TokenTransformer
from cascade.nets.attention import TransformerBlock
from cascade.nets.efficient_unet import EfficientUNet
from cascade.nets.prior import causal_mask
from cascade.nets.sketch import Sketch
from cascade.nets.unet import UNet
from cascade.pipeline import BestOf, Cascade, TextEmbedding, Without
from cascade.runs.model import check_asked
from tests.hostile import refused
from tests.test_batch_mates import SMALL, TINY, with_clip
from tests.test_batch_mates import randomised as random_stage
from tests.test_nets import randomised
from tests.test_text import write_t5

AN_IMAGE = {"sample": torch.arange(1), "clip_image": torch.eye(1, 64)}
CAPTION, WEIGHED = "a red circle above a blue square", "a (red:{}) circle above a blue square"


@pytest.mark.parametrize(
    ("text", "caption", "found"),
    [
        ("a red circle", "a red circle", ()),
        ("a (red:1.3) circle", "a red circle", (Phrase(2, 5, 1.3),)),
        ("(a red: 2 ) (circle:.5)", "a red circle", (Phrase(0, 5, 2), Phrase(6, 12, 0.5))),
        ("a ( red :0) circle", "a  red  circle", (Phrase(3, 6, 0),)),
        ("a (red:1) circle", "a red circle", ()),
        (r"a \(red:1.3\) circle", "a (red:1.3) circle", ()),
        (r"a \ and a \\", "a \\ and a \\", ()),
        ("at 5:30 (pm:2)", "at 5:30 pm", (Phrase(8, 10, 2),)),
    ],
)
def test_texts_are_captions_with_weighted_phrases(text, caption, found):
    assert parsed(text) == (caption, found)
    assert asked([text])["caption"] == [text]  # without weights, brackets are brackets


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a (red) circle", r"\( belongs to no"),
        ("a (red:1.3 circle", r"\( belongs to no"),
        ("a red:1.3) circle", r"\) belongs to no"),
        ("a ((red:1.3) circle:2)", r"\( belongs to no"),
        ("a (red:) circle", "'' is no weight|: is no weight| is no weight"),
        ("a (red:-1) circle", "-1 is no weight"),
        ("a (red:nan) circle", "nan is no weight"),
        ("a (red:11) circle", "11 is no weight"),
        ("a (:1.3) circle", "a phrase is empty"),
        ("a ( :1.3) circle", "a phrase is empty"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(text, says):
    assert "write (phrase:1.3)" in refused(lambda: parsed(text), says)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    with_clip(folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return FrozenCLIP(str(folder / "clip"))


def places(encoder, text):
    caption, found = parsed(text)
    return [tokens_of(encoder, caption, phrase) for phrase in found]


def test_the_tokens_of_a_phrase_are_told_apart(clip, tmp_path):
    text = "(a small:2) red square, (left:3) of a (ring-shaped:0) thing"
    for encoder in (clip, Tokenizer(32)):
        ids = tokenize([parsed(text)[0]], 32)[0]
        one, two, three = ([*range(32)][place] for place in places(encoder, text))
        assert [one, two] == [[1, 2], [6]]
        assert torch.equal(ids[three], tokenize(["ring-shaped"], 5)[0, 1:-1])
        assert "begins or ends within a word" in refused(lambda e=encoder: places(e, "a (re:2)d"))
    far = "very " * 31 + "(red:2) circle"
    assert "exceeds the 32 tokens" in refused(lambda: places(Tokenizer(32), far))
    t5 = FrozenT5(str(write_t5(tmp_path)))
    whole = t5.tokenized(["a small red square left of a circle"])[0]
    found = places(t5, "a (small red:2) square (left:2) of a (circle:2)")
    pieces = [t5.tokenized([words])[0][:-1] for words in ("small red", "left", "circle")]
    assert [whole[place] for place in found] == pieces
    assert found[-1].stop == len(whole) - 1
    assert "has no `tokenized`" in refused(lambda: places(object(), "a (red:2) circle"))


def weighted(cond, place, weight):
    weights = torch.zeros(cond.mask.shape)
    weights[:, place] = math.log(weight) if weight else -math.inf
    return replace(cond, mask=log_weights(cond.mask) + weights)


def repeated(cond, place, times):
    """The condition with copies of one token, which stand behind the others."""
    more = (cond.tokens[:, [place]].expand(-1, times - 1, -1), cond.mask[:, [place]])
    mask = torch.cat([cond.mask, more[1].expand(-1, times - 1)], 1)
    return replace(cond, tokens=torch.cat([cond.tokens, more[0]], 1), mask=mask)


def some(n=5, width=16):
    g = torch.Generator().manual_seed(3)
    mask = torch.arange(n) < torch.tensor([[n], [n - 1]])
    return Cond(tokens=torch.randn(2, n, width, generator=g).double(), mask=mask)


NETS = {
    "self-attention": UNet(8, (1, 2), 1, 16, attention=(1,), head_channels=8, width=16),
    "cross-attention": UNet(8, (1,), 1, 16, attention=(0,), head_channels=8, width=16, cross=True),
    "efficient": EfficientUNet(8, (1,), (1,), 16, (0,), 16, heads=2, image_channels=0),
}


@pytest.mark.parametrize("name", [*NETS, "sketch"])
def test_a_weight_of_n_is_n_copies_of_a_token_and_of_zero_none(name):
    """The independent value: a softmax over keys of which one is there n times."""
    cond, x = some(), torch.randn(2, 3, 8, 8).double()
    if name == "sketch":
        sketch = randomised(Sketch(16, 8, 2, 8))

        def net(cond):
            return sketch(cond.tokens, cond.mask)
    else:
        made = randomised(copy.deepcopy(NETS[name]))

        def net(cond):
            return made(x, torch.zeros(2).double(), cond)

    for times in (2, 5):
        torch.testing.assert_close(net(weighted(cond, 2, times)), net(repeated(cond, 2, times)))
    masked = cond.mask.clone()
    masked[:, 2] = False
    torch.testing.assert_close(net(weighted(cond, 2, 0)), net(replace(cond, mask=masked)))
    assert torch.equal(net(weighted(cond, 2, 1)), net(cond))
    assert (net(weighted(cond, 2, 5)) - net(cond)).abs().max() > 1e-3


def test_a_weight_in_a_causal_transformer_is_copies_as_well():
    """In one layer, for the last position: in more, the first of two copies sees itself alone."""
    block, cond = randomised(TransformerBlock(16, 2)), some()
    double = torch.cat([cond.tokens[:, :3], cond.tokens[:, 2:]], 1)
    mask = torch.cat([cond.mask[:, :3], cond.mask[:, 2:]], 1)
    expected = block(double, causal_mask(mask))
    found = block(cond.tokens, causal_mask(weighted(cond, 2, 2).mask))
    torch.testing.assert_close(found[:, 3:], expected[:, 4:])
    allowed = causal_mask(weighted(cond, 2, 0).mask)
    hidden = cond.mask.clone()
    hidden[:, 2] = False
    assert torch.equal(allowed > -math.inf, causal_mask(hidden))
    assert set(allowed.unique().tolist()) == {0.0, -math.inf}


def test_the_autoregressive_cache_weighs_as_the_whole_sequence_does():
    net = randomised(TokenTransformer(4, 8, 16, 2, 2, context=5))
    tokens = torch.tensor([[1, 5, 2, 7, 0], [3, 3, 6, 0, 1]])
    for cond in (weighted(some(), 2, 3.0), weighted(some(), 1, 0)):
        whole = net(tokens, cond)
        logits, cache = net.prefill(cond)
        torch.testing.assert_close(logits, whole[:, 0])
        for i in range(4):
            torch.testing.assert_close(net.step(tokens[:, i], cache), whole[:, i + 1])
    assert (net(tokens, some()) - net(tokens, weighted(some(), 2, 3.0))).abs().max() > 1e-3


def test_conditions_of_different_lengths_and_masks_are_concatenated():
    """Padding stands before what follows the text, and hides itself."""
    one = replace(some(5), after_text=1)
    other = replace(weighted(some(3), 1, 2.0), after_text=1)
    both = one.cat(other)
    assert torch.equal(both.tokens[2:, [0, 1, 4]], other.tokens)
    assert torch.equal(both.mask[2:, [0, 1, 4]], other.mask)
    assert (both.mask[2:, 2:4] == -math.inf).all()
    assert torch.equal(both.mask[:2], log_weights(one.mask))
    assert torch.equal(other.cat(one).mask.roll(2, 0), both.mask)
    plain = one.cat(replace(some(3), after_text=1))
    assert plain.mask.dtype == torch.bool
    assert not plain.mask[2:, 2:4].any()


STAGES = {
    "prior": ["stage=prior"],
    "prior_ar": ["stage=prior_ar"],
    "decoder_sketch": ["stage=decoder_sketch", *SMALL],
    "decoder_text": ["stage=decoder_text", *SMALL],
}


@pytest.fixture(scope="module")
def stages(folder):
    """Stages with random weights, which read captions through their own encoders."""
    made = {}
    for name, overrides in STAGES.items():
        config = composed("train", [*TINY, *overrides, f"clip.path={folder / 'clip'}"])
        torch.manual_seed(0)
        made[name] = random_stage(built(config.stage))
        if name != "prior_ar":
            made[name].sampler = replace(made[name].sampler, steps=2)
    return made


def sampled(stage, texts, scale=1.0, **more):
    g = torch.Generator().manual_seed(5)
    z = torch.nn.functional.normalize(torch.randn(len(texts), 64, generator=g), dim=1)
    stage = copy.copy(stage)
    stage._modules = dict(stage._modules)
    stage.sampler = replace(stage.sampler, scale=scale)
    stage.weaker = more.pop("weaker", None)
    batch = {**asked(texts, **more), "sample": torch.arange(len(texts))}
    given = {} if stage.writes == "clip_image" else {"clip_image": z}
    with torch.inference_mode():
        return stage.sample({**batch, **given}, seed=3)


@pytest.mark.parametrize("name", STAGES)
def test_a_weight_changes_its_own_caption_alone_and_one_of_1_not_a_bit(stages, name):
    texts = [CAPTION, "a blue square", "a red circle"]
    plain = sampled(stages[name], texts)
    same = sampled(stages[name], ["a (red:1) circle above a blue square", *texts[1:]], weights=True)
    assert torch.equal(same, plain)
    found = sampled(
        stages[name], ["a (red:4) circle above a blue square", *texts[1:]], weights=True
    )
    torch.testing.assert_close(found[1:], plain[1:], atol=1e-5, rtol=0)
    assert (found[0] - plain[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", STAGES)
def test_a_larger_weight_is_more_attention(stages, name, monkeypatch):
    """The share of all attention that a phrase's tokens get, over the whole of sampling."""
    place, shares = slice(5, 7), []  # "a blue"
    original = attention.attended

    def share(q, k, v, mask=None):
        own = k.shape[2] - text if own_first else 0
        if mask is not None and mask.dtype != torch.bool:
            logits = q @ k.mT / q.shape[-1] ** 0.5 + mask
            mass = logits.softmax(3)[..., own + place.start : own + place.stop].sum(3)
            shares[-1].append(mass.mean().item())
        return original(q, k, v, mask)

    own_first = name.startswith("decoder")  # keys of the picture come before those of the text
    length = len(tokenize([CAPTION], 32)[0].nonzero())
    text = length + (4 if name == "decoder_sketch" else 0)
    monkeypatch.setattr(attention, "attended", share)
    for weight in (0, 0.3, 0.999, 2, 5, 10):
        shares.append([])
        sampled(stages[name], [f"a red circle above (a blue:{weight}) square"], weights=True)
    means = [sum(some) / len(some) for some in shares]
    assert all(a < b for a, b in pairwise(means)), means
    assert len({len(some) for some in shares}) == 1


def test_vectors_move_away_from_those_of_the_caption_without_the_phrase(stages, clip):
    stage, lacking = stages["decoder_text"], "a circle above a blue square"

    def vector(text):
        batch = stage.encoded({**asked([text], weights=True), "sample": torch.arange(1)})
        return stage.conditioner(batch).vector

    v, less = vector(CAPTION), vector(lacking)
    for weight in (0, 0.5, 3):
        found = vector(WEIGHED.format(weight))
        torch.testing.assert_close(found, less + weight * (v - less), atol=1e-5, rtol=1e-5)
    two = vector("a (red:0.5) circle above a (blue:2) square")
    other = vector("a red circle above a square")
    torch.testing.assert_close(two, v - 0.5 * (v - less) + (v - other), atol=1e-5, rtol=1e-5)

    def embedding(*texts):
        return phrases.encoded(clip, asked(texts, weights=True))["clip_text"]

    z, less = clip.text([CAPTION])["clip_text"], clip.text([lacking])["clip_text"]
    found = embedding(CAPTION, *(WEIGHED.format(w) for w in (0, 3)))
    assert torch.equal(found[:1], embedding(*3 * [CAPTION])[:1])
    torch.testing.assert_close(found[1:2], less, atol=1e-5, rtol=0)
    moved = torch.nn.functional.normalize(less + 3 * (z - less), dim=1)
    torch.testing.assert_close(found[2:], moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["prior", "prior_ar", "decoder_text"])
def test_guidance_away_from_the_caption_itself_is_none(stages, name):
    """Whatever the scale and whichever the network; and it is some away from another caption."""
    stage = stages[name]
    plain = sampled(stage, [CAPTION])
    for weaker in (None, copy.deepcopy(stage)):
        same = sampled(stage, [CAPTION], 3.0, negative=CAPTION, weaker=weaker)
        torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
        other = sampled(stage, [CAPTION], 3.0, negative="a square", weaker=weaker)
        assert (other - plain).abs().max() > 1e-3
    assert (sampled(stage, [CAPTION], 3.0) - plain).abs().max() > 1e-3
    assert torch.equal(sampled(stage, [CAPTION], 1.0, negative="a square"), plain)


def test_the_negative_branch_of_a_decoder_is_told_the_negative_caption_alone(stages):
    stage = stages["decoder_sketch"]
    given = {**asked([CAPTION], "a (blue:2) square", weights=True), "sample": torch.arange(1)}
    z = torch.nn.functional.normalize(torch.ones(1, 64), dim=1)
    given["clip_image"] = z
    net, cond = stage.weaker_on(given, stage.encoded(given), stage.net)
    batch = stage.encoded({**asked(["a (blue:2) square"], weights=True), "clip_image": z})
    expected = stage.conditioner(batch, without=["clip_image"])
    assert net is stage.net
    for port in ("vector", "tokens", "mask", "image"):
        assert torch.equal(getattr(cond, port), getattr(expected, port))
    assert not torch.equal(cond.mask, stage.conditioner.null(batch).mask)


@pytest.mark.parametrize("name", ["prior", "decoder_text"])
def test_weights_say_nothing_of_a_caption_that_the_empty_one_replaces(stages, name):
    stage = copy.deepcopy(stages[name])
    stage.conditioner.empty_caption = True
    plain, weighed = (
        stage.conditioner.null(stage.encoded({**asked([text], weights=True), **AN_IMAGE}))
        for text in (CAPTION, WEIGHED.format(3))
    )
    assert torch.equal(log_weights(weighed.mask), log_weights(plain.mask))
    for port in ("vector", "tokens"):
        if getattr(plain, port) is not None:
            assert torch.equal(getattr(weighed, port), getattr(plain, port))


@pytest.mark.parametrize("name", STAGES)
def test_a_negative_caption_of_any_length_does_not_reach_batch_mates(stages, name):
    texts = ["a red circle", CAPTION]
    together = sampled(
        stages[name], texts, 2.0, negative="a large yellow ring on a grey background"
    )
    alone = sampled(
        stages[name], texts[:1], 2.0, negative="a large yellow ring on a grey background"
    )
    torch.testing.assert_close(alone[0], together[0], atol=1e-4, rtol=0)


def test_best_of_ranks_by_the_caption_itself(stages, clip):
    stage = copy.copy(stages["prior"])
    stage.sampler = replace(stage.sampler, scale=2.0)
    batch = {**asked([CAPTION], "a star"), "sample": torch.arange(1)}
    with torch.inference_mode():
        drawn = [stage.sample(batch, 0, str(k)) for k in range(4)]
        best = max(drawn, key=lambda z: (z @ clip.text([CAPTION])["clip_text"].T).item())
        assert torch.equal(BestOf(stage, 4).sample(batch, 0), best)


def test_a_negative_caption_without_guidance_is_refused(stages):
    plain, negative = asked([CAPTION]), asked([CAPTION], "a star")
    guided = copy.copy(stages["prior"])
    guided.sampler = replace(guided.sampler, scale=2.0)
    for link in (stages["prior"], TextEmbedding(guided), Without(guided, ("caption",))):
        check_asked(Cascade([link]), plain)
        said = refused(lambda link=link: check_asked(Cascade([link]), negative))
        assert "no stage that reads captions is guided" in said
    check_asked(Cascade([BestOf(guided, 2), stages["decoder_text"]]), negative)
    unread = asked([CAPTION], "a st(ar:2)", weights=True)
    refused(lambda: check_asked(Cascade([guided]), unread), "within a word")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved cascade of one guided decoder."""
    folder = tmp_path_factory.mktemp("model")
    small = [*SMALL, "text.encoder.layers=1", "sampler.steps=2", "+sampler.scale=2.0"]
    config = composed("train", [*TINY, "stage=decoder_text", *small])
    torch.manual_seed(0)
    random_stage(built(config.stage)).export(folder / "decoder")
    saved(config, folder / "decoder" / "config.yaml")
    (folder / "cascade.yaml").write_text("stages:\n  decoder: {}\n")
    return folder


def test_the_commands_lead_away_and_weigh(model, tmp_path, capsys):
    def sample(name, *argv):
        out = tmp_path / f"{name}.png"
        assert main(["sample", "--model", str(model), "--out", str(out), "--overwrite", *argv]) == 0
        return out.read_bytes()

    plain = sample("plain", "a red circle")
    assert sample("one", "a (red:1) circle", "--weights") == plain
    bare, weighed = (sample("other", "a (red:9) circle", *o) for o in ([], ["--weights"]))
    led = sample("led", "a red circle", "--negative", "a star")
    assert len({plain, bare, weighed, led}) == 4

    (tmp_path / "prompts.txt").write_text("a (red:9) circle\na star\n")
    argv = ["generate", "--model", str(model), "--prompts", str(tmp_path / "prompts.txt")]
    argv += ["--out", str(tmp_path / "out"), "--weights", "--negative", "a star"]
    assert main(argv) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["negative"], manifest["weights"]) == ("a star", True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").open()]
    assert [row["caption"] for row in rows] == ["a red circle", "a star"]
    capsys.readouterr()
    assert main([*argv[:-1], "a moon"]) == 2
    assert "negative: a star -> a moon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["a red circle", "--negative", "a star", "--set", "decoder.scale=1"], "no stage that"),
        (["a red circle", "--negative", " "], "the negative caption is empty"),
        (["a (red) circle", "--weights"], "belongs to no (phrase:weight)"),
        (["a (r:2)ed circle", "--weights"], "within a word"),
        (["a star", "--negative", "a (red) circle", "--weights"], "belongs to no (phrase:weight)"),
    ],
)
def test_the_command_refuses(model, argv, says, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert main(["sample", "--model", str(model), "--out", str(out), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert not out.exists()

"""Drops, nulls, pools and the joining of parts; scales of embeddings."""

import pytest
import torch

from cascade.codecs import Embedding
from cascade.conditioning import Cond, Conditioner, LowRes, Sequence, Vector, mean
from cascade.config.compose import built, composed
from cascade.draws import Draws
from cascade.encoders.pooling import AttentionPool
from cascade.encoders.text import TextTransformer
from cascade.errors import UserError
from cascade.nets.sketch import Sketch


def batch(n=512):
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.randint(1, 8, (n, 1), generator=g)
    return {
        "sample": torch.arange(n),
        "clip_image": torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=1),
        "clip_text": torch.nn.functional.normalize(torch.randn(n, 8, generator=g), dim=1),
        "text": torch.randn(n, 7, 6, generator=g),
        "text_mask": mask,
        "image_4": torch.randn(n, 3, 4, 4, generator=g),
        "image_4_level": torch.rand(n, generator=g),
    }


@pytest.fixture
def conditioner():
    torch.manual_seed(0)
    embedders = {
        "clip": Vector("clip_image", 8, dim=16, width=12, tokens=4),
        "clip_text": Vector("clip_text", 8, width=12, tokens=1),
        "caption": Sequence(6, 12, dim=16),
        "low": LowRes(4, 16, 16),
    }
    return Conditioner(embedders, {"caption": 0.5, "clip_image": 0.1})


def dropped(conditioner, data, noise):
    """Which samples' CLIP tokens, CLIP text token and caption tokens are those of the null."""
    cond, null = conditioner(data, noise), conditioner.null(data)
    same = (cond.tokens == null.tokens).all(2)
    return same[:, :4].all(1), same[:, 4], (cond.mask == null.mask)[:, 5:].all(1) & same[:, 5]


def test_drop_rates_are_independent_and_joint_within_a_source(conditioner):
    data = batch(4000)
    clip, clip_text, text = dropped(conditioner, data, Draws(0, "drop", data["sample"]))
    assert torch.equal(clip_text, text)  # both stem from the caption: they fall together
    assert abs(clip.float().mean() - 0.1) < 0.02
    assert abs(text.float().mean() - 0.5) < 0.03
    assert abs((clip & text).float().mean() - 0.05) < 0.015


def test_drops_depend_on_the_sample_number_alone(conditioner):
    data = batch(64)
    whole = dropped(conditioner, data, Draws(3, "drop", data["sample"]))
    rows = torch.tensor([5, 60, 17])
    part = {k: v[rows] for k, v in data.items()}
    for a, b in zip(whole, dropped(conditioner, part, Draws(3, "drop", part["sample"]))):
        assert torch.equal(a[rows], b)


def test_null_keeps_the_picture_and_forgets_the_rest(conditioner):
    one, two = batch(4), batch(4)
    two["text"] = two["text"] + 1
    two["clip_image"] = two["clip_image"].roll(1, 0)
    a, b = conditioner.null(one), conditioner.null(two)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.vector, b.vector)
    two["image_4"] = two["image_4"] + 1
    assert not torch.equal(a.image, conditioner.null(two).image)


def test_without_drops_one_source_everywhere(conditioner):
    data = batch(8)
    cond, null = conditioner(data, without=["caption"]), conditioner.null(data)
    assert torch.equal(cond.tokens[:, 4:], null.tokens[:, 4:])
    assert not torch.equal(cond.tokens[:, :4], null.tokens[:, :4])


def test_a_sketch_is_one_more_picture_that_falls_with_the_tokens(conditioner):
    conditioner.sketch = Sketch(width=12, size=16, patch=2, head_channels=4)
    for p in conditioner.sketch.parameters():
        torch.nn.init.normal_(p, std=0.2)
    data = batch(2)
    cond, null = conditioner(data), conditioner.null(data)
    assert cond.image.shape == (2, 6, 16, 16)
    assert torch.equal(cond.image[:, :3], conditioner.sketch(cond.tokens, cond.mask))
    assert torch.equal(cond.image[:, 3:], null.image[:, 3:])
    assert (cond.sketch[0] - cond.sketch[1]).abs().max() > 1e-3
    assert torch.equal(null.sketch[0], null.sketch[1])


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_gets_a_gradient_whatever_is_dropped(conditioner, drop):
    conditioner.drop = {"caption": drop, "clip_image": drop}
    data = batch(4)
    cond = conditioner(data, Draws(0, "drop", data["sample"]))
    (cond.tokens.sum() + cond.vector.square().sum()).backward()
    assert all(p.grad is not None for p in conditioner.parameters())


def test_a_drop_of_what_is_not_read_is_refused():
    with pytest.raises(ValueError, match="clip_image"):
        Conditioner({"caption": Sequence(6, 12)}, {"clip_image": 0.1})


def test_cat_joins_along_the_batch(conditioner):
    data = batch(3)
    a, b = conditioner(data), conditioner.null(data)
    both = a.cat(b)
    for name in ("vector", "tokens", "mask", "image"):
        assert torch.equal(getattr(both, name)[3:], getattr(b, name))
    assert Cond().cat(Cond()) == Cond()


def test_the_batch_is_not_changed_in_place(conditioner):
    """DALLE2-pytorch scaled the caller's embedding in place, so a batch could be used once."""
    data = batch(4)
    before = {k: v.clone() for k, v in data.items()}
    conditioner(data, Draws(0, "drop", data["sample"]))
    assert all(torch.equal(before[k], v) for k, v in data.items())


def attention_pool(heads=2):
    torch.manual_seed(0)
    return AttentionPool(6, heads)


@pytest.mark.parametrize("pool", [None, mean, attention_pool()])
def test_a_pooled_vector_ignores_padding_and_falls_with_the_caption(pool):
    choice = {"pool": pool} if pool else {}
    caption = Conditioner({"caption": Sequence(6, 12, dim=16, **choice)}, {"caption": 0.5})
    data = batch(8)
    cond, null = caption(data), caption.null(data)
    assert (null.vector - null.vector[0]).abs().max() < 1e-6
    assert (cond.vector - null.vector).abs().amax(1).min() > 1e-2
    padded = {**data, "text": data["text"].masked_fill(~data["text_mask"][..., None], 9.0)}
    assert torch.equal(caption(padded).vector, cond.vector)


def test_the_default_vector_is_made_of_the_last_state_and_the_names_are_those_of_old_weights():
    caption, data = Sequence(6, 12, dim=16), batch(8)
    cond = caption(data, torch.ones(8, dtype=torch.bool))
    states = [x[m][-1] for x, m in zip(data["text"], data["text_mask"])]
    expected = caption.to_vector(caption.norm(torch.stack(states)))
    torch.testing.assert_close(cond.vector, expected)
    assert list(caption.state_dict()) == [
        "null",
        "norm.weight",
        "norm.bias",
        "to_tokens.weight",
        "to_tokens.bias",
        "to_vector.weight",
        "to_vector.bias",
    ]
    assert next(iter(Vector("clip_image", 8, dim=16).state_dict())) == "null"


def test_mean_pooling_is_the_mean_of_the_captions_states():
    data = batch(8)
    expected = torch.stack([x[m].mean(0) for x, m in zip(data["text"], data["text_mask"])])
    torch.testing.assert_close(mean(data["text"], data["text_mask"]), expected)


def test_attention_pooling_is_torchs_attention_of_the_mean_over_itself_and_the_states():
    pool, data = attention_pool(), batch(8)
    theirs = torch.nn.MultiheadAttention(6, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([pool.q.bias, pool.kv.bias]))
        theirs.out_proj.weight.copy_(torch.eye(6))
        theirs.out_proj.bias.zero_()
    for states, mask, found in zip(
        data["text"], data["text_mask"], pool(data["text"], data["text_mask"])
    ):
        whole = (states[mask].mean(0) + pool.query)[None]
        expected, _ = theirs(whole, *2 * [torch.cat([whole, states[mask]])])
        torch.testing.assert_close(found, expected[0])


def test_heads_that_do_not_divide_the_states_are_refused():
    with pytest.raises(UserError, match="5 heads do not divide text states of width 6"):
        AttentionPool(6, 5)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_every_parameter_of_a_pool_gets_a_gradient(drop):
    caption = Sequence(6, 12, dim=16, pool=attention_pool(), learned_null=False)
    conditioner, data = Conditioner({"caption": caption}, {"caption": drop}), batch(4)
    cond = conditioner(data, Draws(0, "drop", data["sample"]))
    (cond.tokens.sum() + cond.vector.square().sum()).backward()
    assert all(p.grad is not None for p in conditioner.parameters())


def test_a_zero_null_says_nothing_but_biases_and_is_not_saved():
    embedders = {
        "caption": Sequence(6, 12, dim=16, learned_null=False),
        "clip": Vector("clip_image", 8, dim=16, width=12, learned_null=False),
    }
    conditioner = Conditioner(embedders)
    null = conditioner.null(batch(2))
    assert not [name for name in conditioner.state_dict() if "null" in name]
    biases = embedders["caption"].to_tokens.bias, embedders["clip"].to_tokens.bias.view(4, 12)
    assert torch.equal(null.tokens[0], torch.cat([biases[0].expand(7, -1), biases[1]]))
    vector = embedders["caption"].to_vector.bias + embedders["clip"].to_vector.bias
    assert torch.equal(null.vector[0], vector)
    assert null.mask[0].tolist() == [True] + 6 * [False] + 4 * [True]


def test_the_size_of_text_states_does_not_matter():
    """They are normalised before anything reads them (Imagen, section 2.4)."""
    conditioner, data = Conditioner({"caption": Sequence(6, 12, dim=16)}), batch(4)
    large = {**data, "text": 5 * data["text"] + 3}
    one, other = conditioner(data), conditioner(large)
    torch.testing.assert_close(one.tokens, other.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.vector, other.vector, atol=1e-4, rtol=1e-4)


def test_a_text_transformer_of_another_width_is_refused():
    encoder = TextTransformer(width=8, layers=1, heads=2, length=5, vocabulary=9)
    with pytest.raises(UserError, match=r"text.size=6, .* 8 wide: set text.encoder.width=6"):
        Sequence(6, 12, encoder=encoder)
    assert Conditioner({"caption": Sequence(8, 12, encoder=encoder)}).sizes == {}


def test_a_conditioner_knows_the_sizes_that_it_expects(conditioner):
    assert conditioner.sizes == {"clip_image": 8, "clip_text": 8, "text": 6}


def unit(n, d):
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)


def test_embeddings_are_scaled_as_in_unclip_or_by_root_d(vectors):
    facts = vectors["clip_embedding_scale"]
    dims, root_dims = (512, 640, 768, 1280), (512, 768, 1024)
    scales = dict(zip(dims, facts["equivalent_scale_dim_512_640_768_1280"]))
    scales |= {facts["paper_dim"]: facts["paper_scale"]}
    roots = dict(
        zip(root_dims, facts["sqrt_dim_scale_used_by_DALLE2-pytorch_512_768_1024"], strict=True)
    )
    for deviation, expected in ((facts["target_std"], scales), (1.0, roots)):
        for d, scale in expected.items():
            codec, z = Embedding(d, deviation=deviation), unit(64, d)
            codec.fit([{"clip_image": z + 1}])
            x0 = codec.encode({"clip_image": z})
            torch.testing.assert_close(x0, scale * z)
            assert x0.square().mean().item() == pytest.approx(deviation**2)
            torch.testing.assert_close(codec.decode(x0 * 3), z)
    assert facts["target_std"] ** 2 == pytest.approx(facts["target_var"])


def test_embeddings_are_scaled_by_default_by_what_the_shards_hold():
    codec, z = Embedding(8), unit(500, 8) * torch.linspace(0.5, 2, 8) + 0.1
    codec.fit([{"clip_image": z[:200]}, {"clip_image": z[200:]}])
    x0 = codec.encode({"clip_image": z})
    torch.testing.assert_close(x0.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(x0.std(0), torch.ones(8))
    assert list(codec.state_dict()) == ["mean", "std"]
    with pytest.raises(UserError, match=r"clip.model.dim=8, .* 5 numbers: set clip.model.dim=5"):
        codec.fit([{"clip_image": unit(4, 5)}])


@pytest.mark.parametrize(
    ("choice", "pool"),
    [
        ("{_target_: cascade.encoders.pooling.AttentionPool, size: 96, heads: 4}", AttentionPool),
        ("{_target_: hydra.utils.get_method, path: cascade.conditioning.mean}", type(mean)),
    ],
)
def test_a_pool_is_a_choice_of_configuration(choice, pool):
    caption = "+stage.conditioner.embedders.caption"
    overrides = [f"{caption}.pool={choice}", f"{caption}.learned_null=false"]
    config = composed("train", ["stage=decoder_text", "data.path=none", *overrides])
    assert isinstance(built(config.stage.conditioner).embedders["caption"].pool, pool)

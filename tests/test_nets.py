"""What the architectures promise: causality, locality, and that nothing ignores its input."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cascade.conditioning import Cond
from cascade.diffusion.noise import LIMIT, cosine_table, linear_table
from cascade.errors import UserError
from cascade.nets.attention import Attention, CrossAttention, TransformerBlock
from cascade.nets.efficient_unet import EfficientUNet
from cascade.nets.layers import GroupNorm, Positions, Timestep, convolve_enlarged, sinusoids
from cascade.nets.prior import PriorTransformer
from cascade.nets.sketch import Sketch
from cascade.nets.unet import Block, Residual, UNet


def randomised(net):
    """Zero-initialised branches would hide what they are connected to."""
    torch.manual_seed(1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.5)
    return net.double().eval()


def prior():
    return randomised(PriorTransformer(size=8, width=16, layers=2, heads=2, context=5))


def prior_cond(b=3, n=6):
    g = torch.Generator().manual_seed(2)
    mask = torch.arange(n) < torch.tensor([[2], [5], [6]])[:b]
    return Cond(tokens=torch.randn(b, n, 16, generator=g).double(), mask=mask, after_text=1)


def test_prior_depends_on_x_with_and_without_text():
    """DALLE2-pytorch's unconditional branch did not see the noised embedding."""
    net, cond = prior(), prior_cond()
    null = replace(cond, tokens=0 * cond.tokens, mask=torch.arange(6).expand(3, -1) == 0)
    x = torch.randn(2, 3, 8).double()
    logsnr = torch.zeros(3).double()
    for c in (cond, null):
        assert (net(x[0], logsnr, c) - net(x[1], logsnr, c)).abs().max() > 1e-3


def test_prior_ignores_masked_tokens():
    net, cond = prior(), prior_cond()
    x, logsnr = torch.randn(3, 8).double(), torch.zeros(3).double()
    other = torch.where(cond.mask[..., None], cond.tokens, cond.tokens + 100)
    changed = replace(cond, tokens=other)
    torch.testing.assert_close(net(x, logsnr, cond), net(x, logsnr, changed))


def test_prior_is_causal():
    net, cond = prior(), prior_cond()
    seen = []
    net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = cond.tokens.clone().requires_grad_()
    net(torch.randn(3, 8).double(), torch.zeros(3).double(), replace(cond, tokens=tokens))
    (gradient,) = torch.autograd.grad(seen[0][:, 3].sum(), tokens)
    assert gradient[:, 4:].abs().max() == 0
    assert gradient[1:, :4].abs().amax((0, 2)).min() > 0


def unet(**more):
    options = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "embed": 16} | more
    return randomised(UNet(**options))


def efficient(**more):
    options = {"channels": 8, "multipliers": [1, 2], "blocks": [1, 2], "embed": 16}
    options |= {"attention": [1], "width": 12, "heads": 2} | more
    return randomised(EfficientUNet(**options))


@pytest.mark.parametrize("net", [unet(image_channels=3, patch=2), efficient()])
def test_without_self_attention_a_network_is_fully_convolutional(net):
    """Trained on crops, applied to whole pictures: away from borders, both agree."""
    for module in net.modules():  # statistics over the whole picture are not local
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
            module.activated = lambda x, *_, **__: torch.nn.functional.silu(x)
    x, image = torch.randn(2, 1, 3, 192, 16).double()
    tokens, mask = torch.randn(1, 3, 12).double(), torch.ones(1, 3).bool()
    logsnr, vector = torch.zeros(1).double(), torch.randn(1, 16).double()
    whole = net(x, logsnr, Cond(vector, tokens, mask, image))
    rows = slice(0, 128)
    part = net(x[..., rows, :], logsnr, Cond(vector, tokens, mask, image[..., rows, :]))
    torch.testing.assert_close(part[..., :16, :], whole[..., :16, :])
    assert (part[..., -4:, :] - whole[..., rows, :][..., -4:, :]).abs().max() > 1e-6


READS_ALL = {"attention": [1], "head_channels": 8, "width": 12, "image_channels": 3}


@pytest.mark.parametrize(
    "net",
    [
        unet(**READS_ALL),
        unet(**READS_ALL, cross=True, positions=False, strided=True, shift_only=True),
        efficient(),
        efficient(self_attention=True),
    ],
)
def test_a_network_reads_every_port(net):
    base = {
        "vector": torch.randn(2, 16).double(),
        "tokens": torch.randn(2, 5, 12).double(),
        "image": torch.randn(2, 3, 8, 8).double(),
    }
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    x, logsnr = torch.randn(2, 3, 8, 8).double(), torch.zeros(2).double()
    out = net(x, logsnr, Cond(**base, mask=mask))
    for name, value in base.items():
        changed = net(
            x, logsnr, Cond(**{**base, name: value + 0.5 * torch.randn_like(value)}, mask=mask)
        )
        assert (out - changed).abs().amax((1, 2, 3)).min() > 1e-6, name
    hidden = base["tokens"].clone()
    hidden[0, 3:] += 10
    again = net(x, logsnr, Cond(**{**base, "tokens": hidden}, mask=mask))
    torch.testing.assert_close(out, again)
    assert (out - net(x, logsnr + 1, Cond(**base, mask=mask))).abs().max() > 1e-6


def gradients(net, x, cond):
    torch.manual_seed(3)  # of dropout
    x = x.clone().requires_grad_()
    out = net.train()(x, torch.linspace(-1, 1, len(x)).double(), cond)
    (out * torch.arange(1, 1 + out[0].numel()).view(out[0].shape)).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return {"": x.grad, **grads}


@pytest.mark.parametrize("kind", ["unet", "efficient", "prior"])
def test_activation_checkpointing_changes_no_gradient(kind):
    if kind == "prior":
        net, x, cond = prior(), torch.randn(3, 8).double(), prior_cond()
    else:
        net = unet(**READS_ALL, dropout=0.3) if kind == "unet" else efficient(self_attention=True)
        tokens, mask = torch.randn(2, 5, 12).double(), torch.ones(2, 5).bool()
        x, image = torch.randn(2, 2, 3, 8, 8).double()
        cond = Cond(torch.randn(2, 16).double(), tokens, mask, image)
    plain = gradients(net, x, cond)
    net.checkpoint = True
    again = gradients(net, x, cond)
    assert plain.keys() == again.keys()
    assert len(plain) > 0.9 * len(list(net.parameters()))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def kept_maps(run, shape):
    """Storages that backward needs, beside parameters, in units of a picture of that shape."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values()) / (4 * torch.Size(shape).numel())


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_normalisation_with_silu_and_its_gradients_equal_the_formula(modulated, groups):
    torch.manual_seed(0)
    norm = randomised(GroupNorm(8, groups))
    x = (3 * torch.randn(2, 8, 3, 5).double() + 100).requires_grad_()
    modulation = torch.randn(2, 16).double().requires_grad_() if modulated else None
    inputs = [x, *norm.parameters()] + [modulation] * modulated

    def formula():
        if not modulated:
            return torch.nn.functional.silu(norm(x))
        scale, shift = modulation[:, :, None, None].chunk(2, 1)
        return torch.nn.functional.silu(norm(x) * (1 + scale) + shift)

    ours, weight = norm.activated(x, modulation), torch.randn(2, 8, 3, 5).double()
    torch.testing.assert_close(ours, formula())
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, formula()))):
        torch.testing.assert_close(a, b)
    single, picture = norm.float(), x.detach().float()
    torch.testing.assert_close(
        single.activated(picture), torch.nn.functional.silu(single(picture)), rtol=0, atol=1e-4
    )
    half = norm.activated(picture.bfloat16() - 100)  # under autocast
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm.activated(picture - 100), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize("activated", [False, True])
def test_a_large_mean_costs_a_normalisation_no_digits(activated, mean, memory_format):
    """Against float64; torch's own, channels-last on a CPU, is off by 1 and more at a mean of 1000.

    What the activated one computes at once is as near as float32 tells such numbers apart.
    """
    torch.manual_seed(0)
    x = (mean + torch.randn(2, 64, 16, 16)).contiguous(memory_format=memory_format)
    gradient, norm = torch.randn(2, 64, 16, 16), GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    found = []
    for dtype in (torch.float32, torch.float64):
        norm, x = norm.to(dtype), x.detach().to(dtype).requires_grad_()
        if dtype == torch.float32:
            out = norm.activated(x) if activated else norm(x)
        else:
            out = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
            out = F.silu(out) if activated else out
        parts = torch.autograd.grad(out, (x, norm.weight, norm.bias), gradient.to(dtype))
        found.append([out.detach().double(), *(p.double() for p in parts)])
    limit = 2e-6 + (1e-6 * mean if activated else 0)
    for ours, exact in zip(*found):
        assert (ours - exact).abs().max() < limit * exact.abs().max()


def test_of_a_block_four_pictures_are_kept():
    """Plain autograd keeps all of both normalisations, modulation and SiLUs: seven."""
    block, shape = Block(16, 16, 8), (2, 16, 16, 16)
    x, emb = torch.randn(shape, requires_grad=True), torch.randn(2, 8)
    assert 4 <= kept_maps(lambda: block(x, emb, Cond()), shape) < 4.2
    with torch.no_grad():  # what is done in place must not reach what was given
        before = x.clone()
        block(x, emb, Cond())
        assert torch.equal(x, before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_an_enlarged_picture(memory_format):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(2, 3, 4, 5).double().contiguous(memory_format=memory_format)
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2))
    torch.testing.assert_close(convolve_enlarged(conv, x), expected)


def test_ddpm_blocks_are_shifted_before_their_second_normalisation():
    torch.manual_seed(0)
    block = randomised(Block(8, 8, 4, shift_only=True))
    x, emb = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 4).double()
    h = block.conv_in(torch.nn.functional.silu(block.norm_in(x)))
    h = block.norm_out(h + block.modulation(emb)[:, :, None, None])
    expected = x + block.conv_out(torch.nn.functional.silu(h))
    torch.testing.assert_close(block(x, emb, Cond()), expected)


def test_a_learned_variance_is_a_second_half_of_channels():
    net = unet(learned_variance=True, patch=2)
    x, logsnr = torch.randn(2, 3, 8, 8).double(), torch.zeros(2).double()
    out = net(x, logsnr, Cond())
    assert out.shape == (2, 6, 8, 8)
    with torch.no_grad():  # the last channels of the last convolution, and nothing else
        net.conv_out.bias[12:] += 1
    torch.testing.assert_close(
        net(x, logsnr, Cond()) - out,
        torch.tensor([0, 1.0]).repeat_interleave(3).view(1, 6, 1, 1).expand_as(out).double(),
    )


@pytest.mark.parametrize(
    ("net", "factor"), [(unet(skip_scale=0.25), 0.25), (unet(), 1.0), (efficient(), 0.5**0.5)]
)
def test_skips_are_scaled(net, factor):
    made, read = [], []
    for module in net.down.modules():
        if isinstance(module, Block):
            module.register_forward_hook(lambda m, args, out: made.append(out))
    for module in net.up.modules():
        if isinstance(module, Block) and module.resample == 1:
            module.register_forward_hook(lambda m, args, out: read.append(args[0]))
    x = torch.randn(1, 3, 8, 8).double()
    tokens, mask = torch.randn(1, 2, 12).double(), torch.ones(1, 2).bool()
    image = x if net.image_channels else None
    net(x, torch.zeros(1).double(), Cond(tokens=tokens, mask=mask, image=image))
    skip = factor * made[-1]  # the last one made is the first one read
    torch.testing.assert_close(read[0][:, -skip.shape[1] :], skip)


def test_the_published_embedding_of_the_level(vectors):
    for t in (0, 10, 499):
        exact = vectors["timestep_embedding_cos_then_sin"][f"t{t}_dim8"]
        features = sinusoids(torch.tensor([t]).double(), 8)[0]
        torch.testing.assert_close(
            features, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("schedule", [cosine_table, linear_table])
def test_networks_are_told_the_index_of_the_level(schedule):
    level = Timestep(8, schedule)
    index = torch.tensor([0, 1, 10, 499, 998, 999])
    logsnr = schedule((index + 1).double() / 1000).clamp(-LIMIT, LIMIT).float()
    assert torch.equal(level(logsnr), sinusoids(index.float(), 8))
    between = level((logsnr[2:3] + schedule(torch.tensor([12 / 1000]))) / 2)
    torch.testing.assert_close(between, sinusoids(torch.tensor([10.5]), 8), rtol=0, atol=1e-3)
    beyond = level(torch.tensor([LIMIT, -LIMIT]))
    torch.testing.assert_close(beyond, sinusoids(torch.tensor([0.0, 999.0]), 8))
    assert level.state_dict() == {}


def test_positions_mean_the_same_at_every_size_and_tell_all_places_apart():
    positions = Positions(32)
    coarse, fine = positions(4, 6), positions(12, 18)
    torch.testing.assert_close(fine[:, 1::3, 1::3], coarse)  # the centres of the same cells
    flat = fine.flatten(1).T
    assert torch.pdist(flat).min() > 1e-2


def test_a_sketch_tells_each_place_something_else_of_the_tokens():
    sketch = randomised(Sketch(width=8, size=8, patch=2, head_channels=4))
    tokens = torch.randn(2, 4, 8).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    picture = sketch(tokens, mask)
    assert picture.shape == (2, 3, 8, 8)
    assert torch.pdist(picture[1].flatten(1).T).min() > 1e-3
    alone = sketch(tokens[:1, :2], mask[:1, :2])  # what is masked might as well be absent
    torch.testing.assert_close(picture[:1], alone)


@pytest.mark.parametrize(
    ("net", "numbers"), [(unet(), ["9", "2"]), (Residual(unet(patch=4)), ["12", "8"])]
)
def test_refuses_sides_that_the_network_does_not_divide(net, numbers):
    side = int(numbers[0])
    with pytest.raises(UserError, match=f"{side} px.* {numbers[1]}.*net.multipliers"):
        net(torch.randn(1, 3, side, 8).double(), torch.zeros(1).double(), Cond())
    assert net.divisor == int(numbers[1])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (unet, {"attention": [1], "head_channels": 12}, "16 .*head_channels=12: change net.head"),
        (unet, {"attention": [2]}, r"net.attention=\[2\], .*2 levels"),
        (unet, {"attention": [-1]}, r"net.attention=\[-1\]"),
        (unet, {"blocks": [1]}, r"net.blocks=\[1\] for the 2 levels of net.multipliers"),
        (unet, {"multipliers": []}, "0 levels"),
        (unet, {"norm": lambda c: GroupNorm(c, groups=3)}, "8 channels .* 3 groups"),
        (efficient, {"heads": 3}, "net.heads=3 do not divide 16"),
        (efficient, {"attention": [3]}, r"net.attention=\[3\]"),
        (TransformerBlock, {"width": 16, "heads": 3}, "3 heads do not divide a width of 16"),
        (Sketch, {"width": 8, "size": 9, "patch": 2, "head_channels": 4}, "9 px .*patch=2"),
        (Sketch, {"width": 8, "size": 8, "patch": 2, "head_channels": 3}, "head_channels=3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_when_built(make, options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_new_residual_network_gives_the_enlargement():
    net = Residual(UNet(channels=8, multipliers=[1], blocks=1, embed=16, image_channels=3))
    image = torch.randn(2, 3, 8, 8)
    out = net(torch.randn(2, 3, 8, 8), torch.zeros(2), Cond(image=image))
    torch.testing.assert_close(out, image)


def test_attention_over_joined_keys_equals_the_formula():
    torch.manual_seed(0)
    layer = Attention(8, head_channels=4, width=6).double()
    torch.nn.init.normal_(layer.out.weight)
    x, tokens = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 6).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    q, k, v = layer.qkv(x).chunk(3, 2)
    k2, v2 = layer.kv(tokens).chunk(2, 2)
    k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        logits = q[..., h] @ k[..., h].transpose(1, 2) / 2
        allowed = torch.cat([torch.ones(2, 3).bool(), mask], 1)[:, None]
        heads.append(logits.masked_fill(~allowed, -torch.inf).softmax(2) @ v[..., h])
    torch.testing.assert_close(layer(x, tokens, mask), layer.out(torch.cat(heads, 2)))


def test_attention_of_another_width_within_and_over_text_alone():
    torch.manual_seed(0)
    layer = CrossAttention(8, head_channels=4, width=6, inner=16).double()
    torch.nn.init.normal_(layer.out.weight)
    x, tokens = torch.randn(2, 3, 8).double(), torch.randn(2, 4, 6).double()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    q, (k, v) = layer.q(x), layer.kv(tokens).chunk(2, 2)
    heads = []
    for h in range(0, 16, 4):
        logits = q[..., h : h + 4] @ k[..., h : h + 4].transpose(1, 2) / 2
        weights = logits.masked_fill(~mask[:, None], -torch.inf).softmax(2)
        heads.append(weights @ v[..., h : h + 4])
    torch.testing.assert_close(layer(x, tokens, mask), layer.out(torch.cat(heads, 2)))
    assert Attention(8, head_channels=4, width=6, inner=16).heads == 4

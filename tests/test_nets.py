"""What the architectures promise: causality, locality, and that nothing ignores its input."""

import pytest
import torch

from cascade.conditioning import Cond
from cascade.nets.layers import Attention, Positions
from cascade.nets.prior import PriorTransformer
from cascade.nets.sketch import Sketch
from cascade.nets.unet import Residual, UNet


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
    return Cond(tokens=torch.randn(b, n, 16, generator=g).double(), mask=mask)


def test_prior_depends_on_x_with_and_without_text():
    """DALLE2-pytorch's unconditional branch did not see the noised embedding."""
    net, cond = prior(), prior_cond()
    null = Cond(tokens=torch.zeros_like(cond.tokens), mask=torch.arange(6).expand(3, -1) == 0)
    x = torch.randn(2, 3, 8).double()
    logsnr = torch.zeros(3).double()
    for c in (cond, null):
        assert (net(x[0], logsnr, c) - net(x[1], logsnr, c)).abs().max() > 1e-3


def test_prior_ignores_masked_tokens():
    net, cond = prior(), prior_cond()
    x, logsnr = torch.randn(3, 8).double(), torch.zeros(3).double()
    other = torch.where(cond.mask[..., None], cond.tokens, cond.tokens + 100)
    changed = Cond(tokens=other, mask=cond.mask)
    torch.testing.assert_close(net(x, logsnr, cond), net(x, logsnr, changed))


def test_prior_is_causal():
    net, cond = prior(), prior_cond()
    seen = []
    net.blocks[-1].register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = cond.tokens.clone().requires_grad_()
    net(torch.randn(3, 8).double(), torch.zeros(3).double(), Cond(tokens=tokens, mask=cond.mask))
    (gradient,) = torch.autograd.grad(seen[0][:, 3].sum(), tokens)
    assert gradient[:, 4:].abs().max() == 0
    assert gradient[1:, :4].abs().amax((0, 2)).min() > 0


def unet(**more):
    options = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "embed": 16} | more
    return randomised(UNet(**options))


def test_unet_without_attention_is_fully_convolutional():
    """Trained on crops, applied to whole pictures: away from borders, both agree."""
    net = unet(image_channels=3, patch=2)
    for module in net.modules():  # statistics over the whole picture are not local
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    x, image = torch.randn(2, 1, 3, 192, 16).double()
    logsnr, vector = torch.zeros(1).double(), torch.randn(1, 16).double()
    whole = net(x, logsnr, Cond(vector=vector, image=image))
    rows = slice(0, 128)
    part = net(x[..., rows, :], logsnr, Cond(vector=vector, image=image[..., rows, :]))
    torch.testing.assert_close(part[..., :16, :], whole[..., :16, :])


def test_unet_reads_every_port():
    net = unet(attention=[1], head_channels=8, width=12, image_channels=3)
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


def test_unet_refuses_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="multiples of 2"):
        unet()(torch.randn(1, 3, 9, 8).double(), torch.zeros(1).double(), Cond())


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

"""A caption's sample is its own, whoever shares its batch and however long their captions are.

Layers that start at zero are drawn at random here: they would hide what they are connected to.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade.conditioning import Cond
from cascade.config.compose import built, composed
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.encoders.text import FrozenT5, TextTransformer, Tokenizer, tokenize, trimmed
from cascade.nets.prior import Places, PriorTransformer
from cascade.pipeline import BestOf, Cascade
from cascade.stage import WEIGHTS
from tests.test_text import write_t5

CAPTIONS = [
    "a red circle",
    "a small blue square left of a large green triangle on a grey background",
    "square",
    "a large yellow ring above a red circle",
    "",
]
TINY = ["batch=4", "images=8", "grids=0", "data.path=none", "clip.path=none"]
SMALL = ["size=16", "net=unet_tiny", "net.channels=8", "net.embed=16", "net.width=16"]
SMALL += ["net.head_channels=8"]
SR = ["size=32", "low=16", "crop=null", "net.net.channels=8", "net.net.embed=16"]
STAGES = {
    "prior": ["stage=prior"],
    "prior without CLIP's text": ["stage=prior", "~stage.conditioner.embedders.clip_text"],
    "prior_ar": ["stage=prior_ar"],
    "decoder": ["stage=decoder", *SMALL],
    "decoder_sketch": ["stage=decoder_sketch", *SMALL],
    "decoder_text": ["stage=decoder_text", *SMALL, "text=clip_tiny"],
    "imagen": ["experiment=imagen_base64_tiny", "net.channels=16", "net.norm.groups=4"],
    "karlo": ["experiment=karlo_prior_tiny"],
    "sr256": ["stage=sr256", *SR],
    "sr256_text": ["experiment=imagen_sr256_tiny", "net.channels=16", "size=32", "crop=null"],
}
SOME = [[0], [2, 0], [0, 2, 3], [3, 1, 2, 0]]  # alone, first, last, between others


def randomised(stage):
    g = torch.Generator().manual_seed(1)
    for p in stage.parameters():
        if p.requires_grad:
            deviation = 0.02 if p.ndim < 2 else 0.7 / p[0].numel() ** 0.5
            p.data.add_(deviation * torch.randn(p.shape, generator=g))
    return stage.eval()


def fixed(stage, config, some):
    """A batch of some captions with the encoders' outputs given, trimmed as encoders trim them."""
    g = torch.Generator().manual_seed(2)
    n = len(CAPTIONS)
    sizes, batch = stage.conditioner.sizes, {"sample": torch.arange(n)}
    for size in (16, 32):
        batch[f"image_{size}"] = torch.rand(n, 3, size, size, generator=g) * 2 - 1
    dim = config.clip.model.dim
    for key in ("clip_image", "clip_text"):
        batch[key] = F.normalize(torch.randn(n, dim, generator=g), dim=1)
    batch = {k: v[some] for k, v in batch.items()}
    batch["caption"] = [CAPTIONS[i] for i in some]
    batch["tokens"] = trimmed(tokenize(batch["caption"], 32))
    lengths = torch.tensor([5, 14, 3, 8, 2])
    states = torch.randn(n, 14, sizes.get("text", 1), generator=g)
    batch["text_mask"] = (torch.arange(14) < lengths[:, None])[some, : lengths[some].max()]
    batch["text"] = states[some, : lengths[some].max()]  # with what encoders make of padding
    return batch


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_gives_each_caption_its_own(name):
    config = composed("train", [*TINY, *STAGES[name]])
    torch.manual_seed(0)
    stage = randomised(built(config.stage))
    stage.sampler = replace(stage.sampler, steps=2)
    whole = fixed(stage, config, list(range(5)))
    noise = {k: v for k, v in whole.items() if k != stage.writes}
    together, losses = stage.sample(noise, seed=3), stage.loss(whole)
    assert together.flatten(1).std(0).max() > 1e-3  # captions do differ
    for some in SOME:
        part = fixed(stage, config, some)
        torch.testing.assert_close(stage.loss(part), losses[some], atol=1e-5, rtol=1e-5)
        del part[stage.writes]
        found = stage.sample(part, seed=3)
        torch.testing.assert_close(found, together[some], atol=1e-5, rtol=0)


def test_what_follows_the_text_stands_behind_the_full_context():
    """The rows are those of Karlo's and Kandinsky's priors: the text's from 0, then `context`."""
    net = PriorTransformer(size=8, width=16, layers=1, heads=2, context=7)
    net.positions.data = torch.arange(11.0)[:, None].expand(11, 16).clone()
    for n in (1, 4, 7):
        cond = Cond(tokens=torch.zeros(2, n + 1, 16), after_text=1)
        assert net.places(net.positions, cond)[:, 0].tolist() == [*range(n), 7]
    bare = Cond(tokens=torch.zeros(2, 4, 16))
    assert net.places(net.positions, bare)[:, 0].tolist() == [0, 1, 2, 3]


def without_version(run):
    """Weights of a run as older versions wrote them: not a word of positions."""
    with safe_open(run / WEIGHTS, "pt") as file:
        about = file.metadata()
    weights = load_file(run / WEIGHTS)
    weights = {k: v for k, v in weights.items() if not k.endswith(Places.KEY)}
    save_file(weights, run / WEIGHTS, about)
    return weights


@pytest.mark.parametrize("name", ["prior", "prior_ar"])
def test_older_weights_keep_the_positions_that_they_were_trained_with(name, tmp_path, capsys):
    config = composed("train", [*TINY, *STAGES[name]])

    def stage():
        made = built(config.stage)
        made.encoders = ()
        return made

    new = randomised(stage())
    new.export(tmp_path)
    old_weights = without_version(tmp_path)
    old = stage()
    old.restore(tmp_path)
    assert "longest caption in its batch" in capsys.readouterr().out
    assert old.state_dict().keys() == old_weights.keys()  # exported, they stay old; so do hashes
    batch = fixed(old, config, [0, 1])
    cond = old.conditioner(batch)
    table = torch.arange(40.0)[:, None]
    assert old.net.places(table, cond)[:, 0].tolist() == list(range(15))  # right behind the longest
    old.export(tmp_path)
    again = stage()
    again.restore(tmp_path)
    assert not again.net.places.fixed
    again.load_state_dict(new.state_dict())
    assert again.net.places.fixed
    assert not again.note


def with_clip(folder):
    config = composed("train", [*TINY, "stage=clip"])
    torch.manual_seed(0)
    clip = config.clip.model
    save_clip(built(clip), built(clip).build(), folder / "clip")
    return f"clip.path={folder / 'clip'}"


@pytest.mark.parametrize("kind", ["clip", "t5", "trained"])
def test_an_encoder_reads_each_caption_by_itself(kind, tmp_path):
    if kind == "t5":
        encoder = FrozenT5(str(write_t5(tmp_path)))
    elif kind == "clip":
        with_clip(tmp_path)
        encoder = FrozenCLIP(str(tmp_path / "clip"))
    else:
        net = randomised(TextTransformer(width=32, layers=2, heads=4, length=32))
        tokenizer = Tokenizer(32)

        def encoder(batch):
            return dict(zip(("text", "text_mask"), net(tokenizer(batch)["tokens"])))

    with torch.no_grad():
        together = encoder({"caption": CAPTIONS})
        for some in SOME:
            found = encoder({"caption": [CAPTIONS[i] for i in some]})
            for row, i in enumerate(some):
                own, among = (
                    b["text"][k][b["text_mask"][k]] for b, k in ((found, row), (together, i))
                )
                torch.testing.assert_close(own, among, atol=1e-5, rtol=1e-5)
            if kind == "clip":
                unit = found["clip_text"]
                torch.testing.assert_close(unit, together["clip_text"][some], atol=1e-5, rtol=0)


def painted(cascade, captions, numbers, seed=0):
    batch = {"caption": captions, "sample": torch.tensor(numbers)}
    with torch.inference_mode():
        return cascade(batch, seed)


def test_a_whole_cascade_paints_each_caption_by_itself(tmp_path):
    """Best of four, too: whoever shares the batch, the same one is kept."""
    clip = with_clip(tmp_path)
    stages = []
    for name in ("prior", "decoder_sketch", "sr256"):
        torch.manual_seed(0)
        stage = randomised(built(composed("train", [*TINY, *STAGES[name], clip]).stage))
        stage.sampler = replace(stage.sampler, steps=3)
        stages.append(stage)
    cascade = Cascade([BestOf(stages[0], 4), *stages[1:]])
    together = painted(cascade, CAPTIONS[:4], [0, 1, 2, 3])
    for some in ([0], [2, 0], [2, 1, 3]):
        found = painted(cascade, [CAPTIONS[i] for i in some], some)
        for key in ("clip_image", "image_16", "image_32"):
            torch.testing.assert_close(found[key], together[key][some], atol=1e-3, rtol=0)

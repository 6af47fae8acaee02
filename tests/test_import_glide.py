"""GLIDE's base and upsampler, which no package holds.

The U-Net of the reference is diffusers'; its text transformer and its sampling loops are written
here and in `foreign.py`, from the published description.
"""

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.encoders.published.byte_pairs import BytePairs
from cascade.runs.run import Run
from tests.foreign import (
    SAMPLES,
    adm_names,
    ddim_loop,
    imported,
    noises,
    p_sample_loop,
    randomized,
    relative,
    schedule,
    spaced,
)

WIDTH, HEADS, LAYERS, LENGTH = 64, 2, 2, 12
CAPTIONS = ["A red circle", "lower it, lower it and then lower it again"]
MERGES = [("l", "o"), ("lo", "w"), ("Ġ", "r"), ("Ġr", "e"), ("i", "t"), ("Ġ", "it")]


class Text(nn.Module):
    """GLIDE's text transformer: pre-norm, exact GELU, no mask, learned rows for padding."""

    def __init__(self, vocabulary):
        super().__init__()
        self.words, self.out = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, 128)
        self.places = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.blank = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.last = nn.LayerNorm(WIDTH)

        def layer():
            sizes = {"ln_1": nn.LayerNorm(WIDTH), "q": nn.Linear(WIDTH, WIDTH)}
            sizes |= {"k": nn.Linear(WIDTH, WIDTH), "v": nn.Linear(WIDTH, WIDTH)}
            sizes |= {"proj": nn.Linear(WIDTH, WIDTH), "ln_2": nn.LayerNorm(WIDTH)}
            sizes |= {"fc": nn.Linear(WIDTH, 4 * WIDTH), "down": nn.Linear(4 * WIDTH, WIDTH)}
            return nn.ModuleDict(sizes)

        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, tokens, mask):
        x = torch.where(mask[..., None], self.words(tokens) + self.places, self.blank)
        for a in self.layers:
            y = a.ln_1(x)
            q, k, v = (a[n](y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
            weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            x = x + a.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + a.down(F.gelu(a.fc(a.ln_2(x))))
        x = self.last(x)
        return x, self.out(x[:, -1])

    def names(self):
        """As in GLIDE's files."""
        state = self.state_dict()
        out = {
            "token_embedding.weight": state["words.weight"],
            "positional_embedding": state["places"],
            "padding_embedding": state["blank"],
        }
        plain = {"final_ln": "last", "transformer_proj": "out"}
        for n in range(LAYERS):
            at = f"transformer.resblocks.{n}."
            for theirs, ours in (("ln_1", "ln_1"), ("ln_2", "ln_2"), ("attn.c_proj", "proj"),
                                 ("mlp.c_fc", "fc"), ("mlp.c_proj", "down")):  # fmt: skip
                plain[f"{at}{theirs}"] = f"layers.{n}.{ours}"
            for s in ("weight", "bias"):
                parts = [state[f"layers.{n}.{x}.{s}"].unflatten(0, (HEADS, -1)) for x in "qkv"]
                out[f"{at}attn.c_qkv.{s}"] = torch.cat(parts, 1).flatten(0, 1)
        for theirs, ours in plain.items():
            out |= {f"{theirs}.{s}": state[f"{ours}.{s}"] for s in ("weight", "bias")}
        return out


def vocabulary(folder):
    """GPT-2's two files, with all bytes, a few merges and the end of text."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *("".join(pair) for pair in MERGES), "<|endoftext|>"]
    numbers = {word: i for i, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "encoder.json.gz", "wt") as file:
        json.dump(numbers, file)
    with gzip.open(folder / "vocab.bpe.gz", "wt") as file:
        file.write("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return numbers


def encoded(captions, numbers):
    """Tokens and mask by the definition: the first merge of the list that applies, to the end."""
    rows, masks = [], []
    for caption in captions:
        found = []
        words = caption.lower().replace(",", " ,").split(" ")
        for i, word in enumerate(words):
            parts = [*("Ġ" if i and word != "," else ""), *word]
            for pair in MERGES:
                k = 0
                while k < len(parts) - 1:
                    if (parts[k], parts[k + 1]) == pair:
                        parts[k : k + 2] = ["".join(pair)]
                    k += 1
            found += [numbers[part] for part in parts]
        found = found[:LENGTH]
        rows.append(found + [len(numbers) - 1] * (LENGTH - len(found)))
        masks.append([True] * len(found) + [False] * (LENGTH - len(found)))
    return torch.tensor(rows), torch.tensor(masks)


def unet(inputs, size):
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=size, in_channels=inputs, out_channels=6, cross_attention_dim=WIDTH,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=16, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", block_out_channels=(32, 64), layers_per_block=1,
    )  # fmt: skip
    return randomized(net)


def made(kind, file, inputs, size, folder, *more):
    """The reference, and the stage that was imported from its file."""
    numbers = vocabulary(folder / "weights")
    net, text = unet(inputs, size), randomized(Text(len(numbers)), 1)
    state = adm_names(net.state_dict(), [1, 1], [False, True], [None, 4]) | text.names()
    torch.save(state, folder / "weights" / file)
    heads = ["net.head_channels=16", f"text.encoder.heads={HEADS}", f"size={size}", *more]
    stage = imported(kind, folder / "weights", folder / "run", *heads)

    def model(x, t, captions, picture=None):
        states, vector = text(*encoded(captions, numbers))
        inputs = x if picture is None else torch.cat([x, picture], 1)
        return net(inputs, t, states, vector).sample

    return model, stage


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return made("glide", "base.pt", 3, 8, tmp_path_factory.mktemp("base"), "sampler.steps=8")


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory):
    folder = tmp_path_factory.mktemp("up")
    return made("glide-upsampler", "upsample.pt", 6, 16, folder, "low=4")


def batch(**more):
    return {"caption": CAPTIONS, "sample": torch.tensor(SAMPLES), **more}


def test_tokens_are_byte_pairs(tmp_path):
    numbers = vocabulary(tmp_path)
    captions = [*CAPTIONS, "", "low"]
    rows, mask = encoded(captions, numbers)
    found = BytePairs(str(tmp_path), LENGTH).text(captions)["tokens"]
    assert torch.equal(found, rows)
    assert mask.any(1).tolist() == [True, True, False, True]
    assert found[3, 0] == numbers["low"]


@torch.no_grad()
def test_a_whole_run_of_the_base(base):
    """Guidance 3 away from the empty caption; 8 steps here, and 150 by default."""
    reference, stage = base
    given, x = stage.encoded(batch()), torch.randn(2, 3, 8, 8)
    logsnr = stage.process.schedule(torch.tensor([0.401]).double()).float().expand(2)
    for cond, captions in (
        (stage.conditioner(given), CAPTIONS),
        (stage.conditioner.null(given), ["", ""]),
    ):
        ours = stage.net(x, logsnr, cond)
        assert relative(ours, reference(x, 400, captions)) < 1e-5

    def model(x, t):
        own, v = reference(x, t, CAPTIONS).chunk(2, 1)
        null = reference(x, t, ["", ""])[:, :3]
        return null + 3.0 * (own - null), v

    bars, draw = schedule(DDPMScheduler()).alphas_cumprod, noises(1, "image_8")
    theirs = p_sample_loop(model, bars, spaced(8), draw, (2, 3, 8, 8))
    assert relative(stage.sample(batch(), seed=1), theirs.clamp(-1, 1)) < 1e-4


@torch.no_grad()
def test_a_whole_run_of_the_upsampler(upsampler):
    """fast27 from index 997, DDIM, the first noise times 0.997, the small picture in 8 bits."""
    reference, stage = upsampler
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    rounded = ((small + 1) * 127.5).round() / 127.5 - 1
    large = F.interpolate(rounded, (16, 16), mode="bilinear", align_corners=False)

    def model(x, t):
        return reference(x, t, CAPTIONS, large).chunk(2, 1)

    bars = schedule(DDPMScheduler(), linear=True).alphas_cumprod
    steps = [997, *spaced(10, 10, 3, 2, 2)[1:]]
    x = 0.997 * noises(1, "image_16")((2, 3, 16, 16))
    theirs = ddim_loop(model, bars, steps, x)
    ours = stage.sample(batch(image_4=small), seed=1)
    assert relative(ours, theirs.clamp(-1, 1)) < 1e-4


@pytest.mark.parametrize(
    ("experiment", "count", "steps"),
    [("glide_base64_released", 385_030_726, 150), ("glide_sr256_released", 398_361_286, 27)],
)
def test_the_published_size(experiment, count, steps):
    config = composed("train", [f"experiment={experiment}", "data.path=none"])
    assert config.sampler.steps == steps
    with torch.device("meta"):
        assert sum(p.numel() for p in built(config.stage).parameters()) == count


def test_the_other_network_and_missing_tokens_are_refused(base, tmp_path, capsys):
    net = unet(6, 16)
    state = adm_names(net.state_dict(), [1, 1], [False, True], [None, 4])
    torch.save(state, tmp_path / "base.pt")
    assert main(["import", "glide", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "reads 6 channels, and GLIDE's base reads 3" in capsys.readouterr().err
    with pytest.raises(Exception, match=r"holds no encoder\.json of GPT-2: put it there"):
        BytePairs(str(tmp_path), 12).text(["a"])


def test_it_leaves_with_its_byte_pairs(base, tmp_path):
    """The folder with a card needs no file of the machine that it came from."""
    _, stage = base
    run = Path(stage.encoders[0].folder).parent / "run"
    (tmp_path / "cascade.yaml").write_text(f"stages: {{base: {{run: {run}, steps: 2}}}}\n")
    out = tmp_path / "out"
    assert main(["export", "--model", str(tmp_path), "--out", str(out)]) == 0
    assert {path.name for path in (out / "byte_pairs").iterdir()} == {
        "encoder.json.gz", "vocab.bpe.gz",
    }  # fmt: skip
    assert "weights" not in (out / "base/config.yaml").read_text()
    again = Run(out / "base").load()
    assert again.encoders[0].folder == str(out / "base/../byte_pairs")
    assert again.encoders[0].hash == stage.encoders[0].hash


@pytest.mark.slow
def test_a_whole_cascade_paints_at_its_own_sizes(tmp_path, monkeypatch):
    """Both networks from one folder, to 256 px."""
    folder = tmp_path / "glide"
    numbers = vocabulary(folder)
    text = randomized(Text(len(numbers)), 1).names()
    for file, inputs in (("base.pt", 3), ("upsample.pt", 6)):
        state = adm_names(unet(inputs, 64).state_dict(), [1, 1], [False, True], [None, 4])
        torch.save(state | text, folder / file)
    heads = ["net.head_channels=16", f"text.encoder.heads={HEADS}"]
    model, out = tmp_path / "model", tmp_path / "out.png"
    assert main(["import", "glide", str(folder), "--out", str(model), *heads]) == 0
    few = [
        f"--set={name}.{one}" for name in ("base", "sr256") for one in ("sampler=ddim", "steps=2")
    ]
    assert main(["sample", "--model", str(model), CAPTIONS[0], "--out", str(out), *few]) == 0
    assert Image.open(out, formats=["PNG"]).size == (256, 256)

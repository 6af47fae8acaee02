"""Karlo's decoder and super-resolution, from both formats: diffusers' networks, step by step."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import scheduling_unclip
from PIL import Image

from cascade.cli import main
from cascade.config.compose import built, composed
from tests.foreign import (
    CAPTIONS,
    adm_names,
    batch,
    encoded,
    imported,
    noises,
    patched_noise,
    randomized,
    relative,
    schedule,
    small_clip,
)
from tests.test_clip_formats import openai_clip
from tests.test_import_priors import published

DIM, LENGTH, TEXT = 24, 20, 32
DECODER = "decoder-ckpt-step=01000000-of-01000000.ckpt"
SR = "improved-sr-ckpt-step=1.2M.ckpt"
SIZES = {"block_out_channels": (32, 64), "layers_per_block": 1}
PUBLISHED = [
    ("karlo_decoder_released", 893_318_086, 50),
    ("karlo_sr256_released", 2 * 691_579_523, 7),
]


@pytest.fixture(scope="module")
def networks():
    return decoder_of(DIM, 16)


def decoder_of(dim, head):
    """The decoder's network, and what projects its conditions.

    They have one width for CLIP's states and embeddings, as in ViT-L/14.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, cross_attention_dim=40,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=head, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", **SIZES,
    )  # fmt: skip
    text = UnCLIPTextProjModel(clip_embeddings_dim=dim, time_embed_dim=128, cross_attention_dim=40)
    return randomized(unet), randomized(text, 1)


@pytest.fixture(scope="module")
def upsamplers():
    torch.manual_seed(0)

    def network(seed):
        net = UNet2DModel(
            sample_size=16, in_channels=6, out_channels=3, add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2, **SIZES,
        )  # fmt: skip
        return randomized(net, seed)

    return network(2), network(3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip") / "clip", DIM, DIM, LENGTH)


def original_decoder(unet, text, folder, heads=4):
    """Karlo's checkpoint: ADM's names, the conditioner's projections, tokens interleaved."""
    own = adm_names(unet.state_dict(), [1, 1], [False, True], [None, heads])
    modules = {
        "clip_emb": "clip_image_embeddings_project_to_time_embeddings",
        "clip_tok_proj": "clip_extra_context_tokens_proj",
        "text_seq_proj.0": "encoder_hidden_states_proj",
        "text_seq_proj.1": "text_encoder_hidden_states_norm",
        "text_feat_proj": "embedding_proj",
    }
    state = text.state_dict()
    for theirs, ours in modules.items():
        own |= {f"{theirs}.{s}": state[f"{ours}.{s}"] for s in ("weight", "bias")}
    own["cf_param"] = state["learned_classifier_free_guidance_embeddings"]
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": {f"model.{k}": v for k, v in own.items()}}, folder / DECODER)
    return folder


@pytest.fixture(scope="module")
def decoder(networks, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    source = original_decoder(*networks, folder / "weights")
    more = [f"clip.path={clip}", "clip.checkpoint=null", "net.head_channels=16", "size=8"]
    more += ["sampler.steps=8"]
    return imported("karlo-decoder", source, folder / "run", *more)


def original_sr(upsamplers, folder):
    own = {}
    for prefix, net in zip(("model_first_steps", "model_last_step"), upsamplers):
        names = adm_names(net.state_dict(), [1, 1], [False, False], [None, None])
        own |= {f"{prefix}.{k}": v for k, v in names.items()}
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": own}, folder / SR)
    return folder


@pytest.fixture(scope="module")
def sr(upsamplers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sr")
    source = original_sr(upsamplers, folder / "weights")
    return imported("karlo-sr", source, folder / "run", "size=16", "low=4")


def with_image():
    generator = torch.Generator().manual_seed(7)
    return {**batch(), "clip_image": 3 * torch.randn(2, DIM, generator=generator)}


def conditions(text, clip):
    """Both branches, unconditional first, as diffusers stacks them."""
    pairs = zip(encoded(clip, ["", ""], LENGTH), encoded(clip, CAPTIONS, LENGTH))
    embedding, states, mask = (torch.cat(pair) for pair in pairs)
    tokens, vector = text(
        image_embeddings=with_image()["clip_image"], prompt_embeds=embedding,
        text_encoder_hidden_states=states, do_classifier_free_guidance=True,
    )  # fmt: skip
    return tokens, vector, F.pad(mask, (4, 0), value=True)


@torch.no_grad()
def test_a_single_call_of_the_decoder_is_diffusers(networks, decoder, clip):
    unet, text = networks
    x, t = torch.randn(2, 3, 8, 8), 400
    tokens, vector, mask = conditions(text, clip)
    theirs = unet(torch.cat([x, x]), t, tokens, vector, attention_mask=mask).sample
    given = decoder.encoded(with_image())
    logsnr = decoder.process.schedule(torch.tensor([(t + 1) / 1000]).double()).float().expand(2)
    null = decoder.net(x, logsnr, decoder.conditioner.null(given))
    own = decoder.net(x, logsnr, decoder.conditioner(given))
    assert relative(torch.cat([null, own]), theirs) < 1e-5
    assert relative(null, own) > 1e-2


@torch.no_grad()
def test_a_whole_run_of_the_decoder_is_karlos(networks, decoder, clip, monkeypatch):
    """Guidance 8 on eps, the conditional half's variance, x0 clamped to +-1.

    In 8 steps; Karlo's fast setting has 25, and 50 are the default.
    """
    unet, text = networks
    draw = noises(1, "image_8")
    patched_noise(monkeypatch, scheduling_unclip, draw)
    scheduler = schedule(scheduling_unclip.UnCLIPScheduler(variance_type="learned_range"))
    scheduler.set_timesteps(8)
    tokens, vector, mask = conditions(text, clip)
    x = draw((2, 3, 8, 8))
    for i, t in enumerate(scheduler.timesteps):
        out = unet(torch.cat([x, x]), t, tokens, vector, attention_mask=mask).sample
        (null, _), (own, variance) = (half.chunk(2, 1) for half in out.chunk(2))
        guided = torch.cat([null + 8.0 * (own - null), variance], 1)
        then = scheduler.timesteps[i + 1] if i < 7 else None
        x = scheduler.step(guided, t, x, prev_timestep=then).prev_sample.float()
    assert relative(decoder.sample(with_image(), seed=1), x.clamp(-1, 1)) < 1e-4


@torch.no_grad()
def test_a_whole_run_of_the_super_resolution_is_karlos(upsamplers, sr, monkeypatch):
    """Anti-aliased enlargement, 7 steps, and another network for the last one."""
    first, last = upsamplers
    small = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(8)) * 2 - 1
    draw = noises(1, "image_16")
    patched_noise(monkeypatch, scheduling_unclip, draw)
    scheduler = schedule(scheduling_unclip.UnCLIPScheduler())
    scheduler.set_timesteps(7)
    large = F.interpolate(small, size=[16, 16], mode="bicubic", antialias=True)
    x = draw((2, 3, 16, 16))
    for i, t in enumerate(scheduler.timesteps):
        out = (last if i == 6 else first)(torch.cat([x, large], 1), t).sample
        then = scheduler.timesteps[i + 1] if i < 6 else None
        x = scheduler.step(out, t, x, prev_timestep=then).prev_sample.float()
    ours = sr.sample({**batch(), "image_4": small}, seed=1)
    assert relative(ours, x.clamp(-1, 1)) < 1e-4


def test_a_single_call_of_the_super_resolution_is_diffusers(upsamplers, sr):
    x, low = torch.randn(2, 3, 16, 16), torch.rand(2, 3, 4, 4)
    large = F.interpolate(low, scale_factor=4, mode="bicubic", antialias=True)
    given = {**batch(), "image_4": low, "image_4_level": torch.zeros(2)}
    with torch.no_grad():
        cond = sr.conditioner(given)
        for t, net in ((0, upsamplers[1]), (1, upsamplers[0]), (999, upsamplers[0])):
            logsnr = sr.process.schedule(torch.tensor([(t + 1) / 1000]).double()).float()
            ours = sr.net(x, logsnr.expand(2), cond)
            assert relative(ours, net(torch.cat([x, large], 1), t).sample) < 1e-5


def test_folders_of_diffusers_hold_the_same(networks, upsamplers, decoder, sr, clip, tmp_path):
    pipeline = tmp_path / "karlo-v1-alpha"
    parts = dict(zip(("decoder", "text_proj"), networks))
    parts |= dict(zip(("super_res_first", "super_res_last"), upsamplers))
    for name, module in parts.items():
        module.save_pretrained(pipeline / name)
    (pipeline / "model_index.json").write_text("{}")
    of_clip = [f"clip.path={clip}", "clip.checkpoint=null"]
    for kind, stage, more in (("karlo-decoder", decoder, of_clip), ("karlo-sr", sr, ["low=4"])):
        loaded = imported(kind, pipeline, tmp_path / kind, *more)
        assert loaded.codec.size == stage.codec.size
        state = stage.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(("experiment", "count", "steps"), PUBLISHED)
def test_the_published_size(experiment, count, steps):
    config = composed("train", [f"experiment={experiment}", "data.path=none"])
    assert config.sampler.steps == steps
    with torch.device("meta"):
        assert sum(p.numel() for p in built(config.stage).parameters()) == count


@pytest.mark.slow
def test_the_authors_folder_paints_and_varies(upsamplers, tmp_path):
    """Three checkpoints, the statistics and OpenAI's archive of the CLIP, at their own sizes."""
    folder, model = tmp_path / "karlo", tmp_path / "model"
    prior = randomized(PriorTransformer(2, 64, 2, embedding_dim=64, num_embeddings=16))
    prior.clip_std.data.abs_()
    published(prior, folder)
    original_decoder(*decoder_of(64, 64), folder, heads=1)
    original_sr(upsamplers, folder)
    torch.jit.save(torch.jit.script(openai_clip(dim=64)), folder / "ViT-L-14.pt")
    assert {path.name for path in folder.iterdir()} == {
        *("prior-ckpt-step=01000000-of-01000000.ckpt", DECODER, SR),
        *("ViT-L-14_stats.th", "ViT-L-14.pt"),
    }
    assert main(["import", "karlo", str(folder), "--out", str(model)]) == 0
    few = [f"--set={name}.steps=2" for name in ("prior", "decoder", "sr256")]
    words = ["sample", "--model", str(model), CAPTIONS[0], "--out", str(tmp_path / "out.png")]
    assert main([*words, *few]) == 0
    picture = Image.open(tmp_path / "out.png", formats=["PNG"])
    assert picture.size == (256, 256)
    words = ["edit", "vary", "--model", str(model), "--picture", str(tmp_path / "out.png")]
    assert main([*words, "--n", "1", "--out", str(tmp_path / "varied.png"), *few]) == 0
    assert (tmp_path / "varied.png").exists()
    # Its folder with a card holds the CLIP as safetensors, and paints the same.
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "card")]) == 0
    words = ["sample", "--model", str(tmp_path / "card"), CAPTIONS[0]]
    assert main([*words, "--out", str(tmp_path / "again.png"), *few]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_blocks_of_stable_diffusion_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    source = tmp_path / "unet"
    UNet2DConditionModel(
        sample_size=16, cross_attention_dim=32, attention_head_dim=8, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).save_pretrained(source)  # fmt: skip
    assert main(["import", "karlo-decoder", str(source), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "has blocks CrossAttnDownBlock2D, which have no counterpart here" in error
    assert {path.name for path in tmp_path.iterdir()} == {"unet"}


def test_the_file_of_another_system_is_refused(upsamplers, tmp_path, capsys):
    source = original_sr(upsamplers, tmp_path / "weights") / SR
    assert main(["import", "karlo-decoder", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "lacks input_blocks.0.0.weight" in capsys.readouterr().err

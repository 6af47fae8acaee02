"""Priors of Karlo, Kandinsky and diffusers: read from files, they are diffusers' own, step by step.

`PriorTransformer` and `UnCLIPScheduler` of diffusers are the reference; its tables are set to
float64, as in the authors' code.
"""

import pytest
import torch
from diffusers import PriorTransformer
from diffusers.schedulers import scheduling_unclip
from safetensors.torch import save_file

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.runs.run import Run
from tests.foreign import (
    CAPTIONS,
    batch,
    encoded,
    imported,
    legacy,
    noises,
    patched_noise,
    randomized,
    relative,
    schedule,
    small_clip,
)

PRIOR = ["experiment=karlo_prior_released", "data.path=none"]
HEADS, LAYERS, DIM, TEXT, LENGTH = 2, 2, 24, 24, 20


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    net = randomized(PriorTransformer(HEADS, 16, LAYERS, embedding_dim=DIM, num_embeddings=LENGTH))
    with torch.no_grad():
        net.clip_std.abs_()
    return net


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip") / "clip", DIM, TEXT, LENGTH)


def karlo_names(state):
    """The names and layout of Karlo's checkpoint, from those of diffusers."""
    out = {
        "prd_emb": state["prd_embedding"],
        "positional_embedding": state["positional_embedding"],
    }
    modules = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "clip_img_proj": "proj_in",
        "text_enc_proj": "encoder_hidden_states_proj",
        "text_emb_proj": "embedding_proj",
        "final_ln": "norm_out",
        "out_proj": "proj_to_clip_embeddings",
    }
    for n in range(LAYERS):
        a, b = f"transformer.resblocks.{n}", f"transformer_blocks.{n}"
        modules |= {
            f"{a}.ln_1": f"{b}.norm1",
            f"{a}.ln_2": f"{b}.norm3",
            f"{a}.attn.c_proj": f"{b}.attn1.to_out.0",
            f"{a}.mlp.c_fc": f"{b}.ff.net.0.proj",
            f"{a}.mlp.c_proj": f"{b}.ff.net.2",
        }
        for suffix in ("weight", "bias"):
            parts = [state[f"{b}.attn1.to_{x}.{suffix}"] for x in "qkv"]
            out[f"{a}.attn.c_qkv.{suffix}"] = legacy(parts, HEADS)
    for theirs, ours in modules.items():
        out |= {f"{theirs}.{s}": state[f"{ours}.{s}"] for s in ("weight", "bias")}
    return {f"model.{k}": v.clone() for k, v in out.items()}


def published(prior, folder, wrapped=True):
    """Karlo's folder: a checkpoint with `state_dict`, and the statistics."""
    folder.mkdir(parents=True)
    state = prior.state_dict()
    own = karlo_names(state)
    name = "prior-ckpt-step=01000000-of-01000000.ckpt" if wrapped else "prior_fp16.ckpt"
    torch.save({"state_dict": own, "step": 7} if wrapped else own, folder / name)
    torch.save((state["clip_mean"][0], state["clip_std"][0]), folder / "ViT-L-14_stats.th")
    return folder


def read(kind, source, out, clip, *more):
    return imported(kind, source, out, f"clip.path={clip}", "clip.checkpoint=null", *more)


@pytest.fixture(scope="module")
def stage(prior, clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("karlo")
    source = published(prior, folder / "weights")
    return read("karlo-prior", source, folder / "run", clip, f"net.heads={HEADS}")


def conditions(clip, captions):
    return encoded(clip, captions, LENGTH)


def test_a_single_call_is_diffusers(prior, stage, clip):
    x, u = torch.randn(2, DIM), torch.tensor(400)
    embedding, text, mask = conditions(clip, CAPTIONS)
    assert (embedding.norm(dim=1) - 1).abs().min() > 0.5  # raw
    with torch.no_grad():
        theirs = prior(x, u, embedding, text, mask).predicted_image_embedding
        given = stage.encoded(batch())
        logsnr = stage.process.schedule(torch.tensor([0.401]).double())
        ours = stage.net(x, logsnr.float().expand(2), stage.conditioner(given))
        null = stage.net(x, logsnr.float().expand(2), stage.conditioner.null(given))
        of_empty = conditions(clip, ["", ""])
        without = prior(x, u, *of_empty).predicted_image_embedding
    assert relative(ours, theirs) < 1e-5
    assert relative(null, without) < 1e-5
    assert relative(null, theirs) > 1e-2


def reference(prior, clip, monkeypatch, steps=25, scale=4.0, limit=10.0):
    """Karlo's loop: guidance on x0, clamped at 10, on float64 tables."""
    draw = noises(1, "clip_image")
    patched_noise(monkeypatch, scheduling_unclip, draw)
    scheduler = scheduling_unclip.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=limit
    )
    schedule(scheduler)
    scheduler.set_timesteps(steps)
    cond = [torch.cat(pair) for pair in zip(conditions(clip, CAPTIONS), conditions(clip, ["", ""]))]
    x = draw((2, DIM))
    for i, t in enumerate(scheduler.timesteps):
        own, null = prior(torch.cat([x, x]), t, *cond).predicted_image_embedding.chunk(2)
        then = scheduler.timesteps[i + 1] if i + 1 < steps else None
        guided = null + scale * (own - null)
        x = scheduler.step(guided, t, x, prev_timestep=then).prev_sample.float()
    return prior.post_process_latents(x)


@torch.no_grad()
def test_a_whole_run_is_karlos(prior, stage, clip, monkeypatch):
    theirs = reference(prior, clip, monkeypatch)
    assert relative(stage.sample(batch(), seed=1), theirs) < 1e-4


def test_each_format_holds_the_same_prior(prior, stage, clip, tmp_path):
    prior.save_pretrained(tmp_path / "diffusers")
    prior.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    kandinsky = published(prior, tmp_path / "kandinsky", wrapped=False)
    sources = {
        "diffusers": tmp_path / "diffusers",
        "karlo-prior": tmp_path / "sharded",
        "kandinsky-prior": kandinsky,
    }
    for kind, source in sources.items():
        more = [f"net.heads={HEADS}"] if source == kandinsky else []
        run = tmp_path / f"{kind}.run"
        state = read(kind, source, run, clip, *more).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in stage.state_dict().items())
        # So whole runs are the same as well.
        assert Run(run).config.sampler == composed("train", PRIOR).sampler
        license = (run / "origin.json").read_text()
        assert ("Open RAIL" in license) == (kind == "karlo-prior")


def test_half_precision_is_widened(prior, stage, clip, tmp_path):
    (tmp_path / "half").mkdir()
    prior.save_config(tmp_path / "half")
    half = {k: v.half() for k, v in prior.state_dict().items()}
    save_file(half, tmp_path / "half/diffusion_pytorch_model.fp16.safetensors")
    loaded = read("diffusers", tmp_path / "half", tmp_path / "run", clip)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.net.query, stage.net.query.half().float())


def test_it_trains_on_and_drops_to_the_empty_caption(stage):
    """A dropped caption is the encoded empty one, and every parameter gets a gradient."""
    given = stage.encoded({**batch(), "clip_image": 3 * torch.randn(2, DIM)})
    loss = stage.loss(given)
    loss.mean().backward()
    assert all(p.grad is not None for p in stage.parameters())
    stage.zero_grad()
    dropped = stage.conditioner(given, without=["caption"])
    empty = stage.conditioner(stage.encoded(batch(["", ""])))
    n = empty.tokens.shape[1] - 1  # the text, before the CLIP embedding
    assert n == 2
    assert relative(dropped.tokens[:, :n], empty.tokens[:, :n]) < 1e-6
    assert relative(dropped.tokens[:, -1], empty.tokens[:, -1]) < 1e-6
    assert dropped.mask[:, :-1].sum(1).tolist() == [n, n]


def test_the_published_size():
    """1,022,028,544 parameters, and the statistics besides."""
    config = composed("train", ["experiment=karlo_prior_released", "data.path=none"])
    with torch.device("meta"):
        assert sum(p.numel() for p in built(config.stage).parameters()) == 1_022_028_544


def damaged(prior, folder, what):
    source = published(prior, folder)
    path = source / "prior-ckpt-step=01000000-of-01000000.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    if what == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
        return source
    if what == "lacks":
        del state["model.transformer.resblocks.0.mlp.c_fc.bias"]
    if what == "over":
        state["model.extra.weight"] = torch.zeros(1)
    if what == "stats":
        (source / "ViT-L-14_stats.th").unlink()
    if what == "other":
        state = {"conv.weight": torch.zeros(1)}
    torch.save({"state_dict": state, **({"code": print} if what == "code" else {})}, path)
    return source


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("lacks", "does not hold the weights of"),
        ("over", "holds extra.weight, which this network has no use for"),
        ("stats", "ViT-L-14_stats.th is missing"),
        ("other", "lacks positional_embedding, which a diffusion prior has"),
        ("cut", "it is cut short or damaged: fetch it again"),
        ("code", "it would run builtins.print"),
    ],
)
def test_bad_weights_are_one_line_and_leave_nothing(what, says, prior, clip, tmp_path, capsys):
    source, out = damaged(prior, tmp_path / "weights", what), tmp_path / "run"
    words = ["import", "karlo-prior", str(source), "--out", str(out), f"net.heads={HEADS}"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"weights"}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("shard", "which is not there: fetch it"),
        ("class", "is of a UNet2DModel, not of a PriorTransformer"),
        ("norm", "has norm_in_type=layer; only None can be imported"),
    ],
)
def test_bad_folders_of_diffusers_are_one_line(what, says, prior, tmp_path, capsys):
    source = tmp_path / "prior"
    prior.save_pretrained(source, max_shard_size="20KB")
    text = (source / "config.json").read_text()
    if what == "shard":
        next(source.glob("*00002*.safetensors")).unlink()
    elif what == "class":
        (source / "config.json").write_text(text.replace("PriorTransformer", "UNet2DModel"))
    else:
        text = text.replace('"norm_in_type": null', '"norm_in_type": "layer"')
        (source / "config.json").write_text(text)
    assert main(["import", "karlo-prior", str(source), "--out", str(tmp_path / "run")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""Imported networks train on: 20 steps from one equal those from a run that was written here."""

import io
import tarfile

import pytest
import torch
from diffusers import PriorTransformer
from safetensors.torch import load_file

from cascade.cli import main
from cascade.config.compose import saved
from cascade.data.scenes.generate import write_scenes
from cascade.interop import guided
from cascade.runs.run import Run
from cascade.stage import Stage
from tests import test_import_deepfloyd as of_if
from tests import test_import_diffusers as of_diffusers
from tests import test_import_glide as of_glide
from tests import test_import_guided as of_guided
from tests.foreign import randomized, small_clip
from tests.test_import_cascades import DIM, LENGTH, write_karlo
from tests.test_import_priors import published
from tests.test_text import write_t5

# By the folder of the source: what is imported from it, and how it is trained.
CROP = ["crop=null"]
GUIDED = ["net.head_channels=16"]


def prior_at(dim=DIM):
    torch.manual_seed(0)
    net = randomized(PriorTransformer(2, 16, 2, embedding_dim=dim, num_embeddings=LENGTH))
    net.clip_std.data.abs_().add_(1)
    return net


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scenes, the same with numbers of classes for captions, and embeddings of a small CLIP."""
    root = tmp_path_factory.mktemp("data")
    write_scenes(root / "scenes", "plain", "train", 24, 32, 0)
    (root / "classes").mkdir()
    for path in (root / "scenes").glob("*.tar"):
        with tarfile.open(path) as old, tarfile.open(root / "classes" / path.name, "w") as new:
            for i, member in enumerate(old):
                content = old.extractfile(member).read()
                content = str(i % 10).encode() if member.name.endswith(".txt") else content
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    clip = small_clip(root / "clip", DIM, DIM, LENGTH)
    assert main(["data", "precompute", str(root / "scenes"), "--clip", str(clip), "--raw"]) == 0
    return root


def karlo(root, data):
    return write_karlo(root / "karlo-v1-alpha"), [f"clip.path={data / 'clip'}"]


def kandinsky(root, data):
    more = [f"clip.path={data / 'clip'}", "clip.checkpoint=null", "net.heads=2"]
    return published(prior_at(), root / "kandinsky", wrapped=False), more


def glide(root, data):
    numbers = of_glide.vocabulary(root / "glide")
    text = randomized(of_glide.Text(len(numbers)), 1).names()
    for file, inputs, size in (("base.pt", 3, 8), ("upsample.pt", 6, 16)):
        state = of_glide.adm_names(
            of_glide.unet(inputs, size).state_dict(), [1, 1], [False, True], [None, 4]
        )
        torch.save(state | text, root / "glide" / file)
    return root / "glide", ["net.head_channels=16", f"text.encoder.heads={of_glide.HEADS}"]


def deepfloyd(root, data):
    (root / "t5").mkdir()
    write_t5(root / "t5")
    for second in (False, True):
        of_if.of_diffusers(second).save_pretrained(root / f"if-{1 + second}")
    of_text = [f"text.reader.path_or_name={root / 't5'}", f"text.reader.length={of_if.LENGTH}"]
    return root, [*of_text, "text.reader.bf16=false"]


def adm(root, data):
    net = of_guided.network(3, sample_size=8, attention_head_dim=16)
    of_guided.written(net, root / "64x64_diffusion.pt", 4, legacy=False)
    net = of_guided.network(6, sample_size=16, attention_head_dim=32)
    of_guided.written(net, root / "64_256_upsampler.pt", 2, legacy=True)
    return root, []


def of_classes(root, data):
    net = of_diffusers.network(**of_diffusers.KINDS["adm"])
    return of_diffusers.folder(net, root / "pipeline"), []


def prior_of_diffusers(root, data):
    prior_at().save_pretrained(root / "prior")
    return root / "prior", [f"clip.path={data / 'clip'}", "clip.checkpoint=null"]


SYSTEMS = {
    "Karlo's prior": (karlo, "karlo-prior", "", ["clip.checkpoint=null"]),
    "Karlo's decoder": (karlo, "karlo-decoder", "", ["clip.checkpoint=null"]),
    "Karlo's super-resolution": (karlo, "karlo-sr", "", CROP),
    "Kandinsky's prior": (kandinsky, "kandinsky-prior", "", []),
    "GLIDE's base": (glide, "glide", "base.pt", ["size=8"]),
    "GLIDE's upsampler": (glide, "glide-upsampler", "upsample.pt", ["size=16", "low=4", *CROP]),
    "IF's stage I": (deepfloyd, "if-1", "if-1", []),
    "IF's stage II": (deepfloyd, "if-2", "if-2", CROP),
    "guided-diffusion": (adm, "guided-diffusion", "64x64_diffusion.pt", []),
    "guided-diffusion's upsampler": (adm, "guided-diffusion", "64_256_upsampler.pt", CROP),
    "a U-Net of diffusers": (of_classes, "diffusers", "", []),
    "a prior of diffusers": (prior_of_diffusers, "diffusers", "", []),
}
FAST = ("Kandinsky's prior",)


@pytest.fixture
def sizes(monkeypatch):
    """guided-diffusion's published sizes, with those of the small networks."""
    facts = guided.Facts((8,), {"head_channels": 16}, legacy=False, linear=False)
    monkeypatch.setitem(guided.PUBLISHED, guided.Sizes(32, (1, 2), (1,)), facts)
    facts = guided.Facts((4, 16), {"heads": 2})
    monkeypatch.setitem(guided.PUBLISHED, guided.Sizes(32, (1, 2), (1,), 3), facts)


def tuned(start, run, data):
    """20 steps from the weights of another run; their losses."""
    losses, step = [], Stage.training_step

    def training_step(self, batch, number):
        losses.append(step(self, batch, number))
        return losses[-1]

    words = [f"start={start}", f"run={run}", f"data.path={data}", "images=80", "batch=4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "training_step", training_step)
        assert main(["train", *words, "warmup=4", "grids=0", "optim.lr=1e-3"]) == 0
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SYSTEMS],
)
def test_it_trains_on_as_a_native_one(name, data, sizes, tmp_path):
    write, kind, file, more = SYSTEMS[name]
    (tmp_path / "source").mkdir()
    source, of_source = write(tmp_path / "source", data)
    words = [] if kind == "karlo-sr" else of_source
    run = tmp_path / "imported"
    source = source / file if file else source
    assert main(["import", kind, str(source), "--out", str(run), *words, *more]) == 0
    native = tmp_path / "native"
    config = Run(run).config
    saved(config, native / "config.yaml")
    stage = Run(run).load()
    stage.export(native)
    captions = "classes" if "label" in stage.conditioner.embedders else "scenes"
    losses = {
        start.name: tuned(start, tmp_path / f"{start.name}-tuned", data / captions)
        for start in (run, native)
    }
    assert losses["imported"] == losses["native"]
    first, last = (sum(x) / 5 for x in (losses["native"][:5], losses["native"][-5:]))
    assert len(losses["native"]) == 20
    print(f"{name}: loss {first:.4f}, then {last:.4f}")
    assert last < first
    trained, begun = load_file(tmp_path / "imported-tuned/weights.safetensors"), stage.state_dict()
    assert sum(not torch.equal(trained[key], begun[key]) for key in begun) > len(begun) / 3

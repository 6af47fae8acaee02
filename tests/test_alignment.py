"""Alignment with a frozen encoder, against its definition, and as part of a training."""

import csv

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.encoders.clip import FrozenCLIP
from cascade.losses.alignment import Alignment, similar
from cascade.runs.run import Run
from tests.models import write_clip
from tests.small import SR

URN = ["alignment=urepa", "+alignment.hidden=16", "+alignment.layer=-3"]


def test_similarity_is_that_of_each_pair_of_vectors():
    random = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 5, 2, 3, generator=random) for _ in range(2))
    tokens, relations = similar(ours, theirs)
    for i in range(2):
        a, b = ours[i].flatten(1).T, theirs[i].flatten(1).T
        cosines = [F.cosine_similarity(x, y, dim=0) for x, y in zip(a, b)]
        assert tokens[i] == pytest.approx(1 - sum(cosines).item() / 6, rel=1e-5)
        pairs = [
            (F.cosine_similarity(a[j], a[k], dim=0) - F.cosine_similarity(b[j], b[k], dim=0)) ** 2
            for j in range(6)
            for k in range(6)
        ]
        assert relations[i] == pytest.approx(sum(pairs).item() / 36, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes, and a CLIP with random weights."""
    folder = tmp_path_factory.mktemp("alignment")
    write_scenes(folder / "shards", "plain", "train", 20, 32, seed=0, shard_size=10)
    write_clip(folder / "clip")
    return folder


def batch():
    random = torch.Generator().manual_seed(0)
    small, large = (torch.randn(3, 3, side, side, generator=random) for side in (8, 16))
    return {"image_8": small, "image_16": large.clamp(-1, 1), "sample": torch.arange(3)}


@pytest.mark.parametrize("layer", [-3, None])
def test_it_adds_the_distance_of_projected_states_to_what_the_teacher_sees(layer, folder):
    torch.manual_seed(0)
    stage = built(composed("train", [*SR, "data.path=none"]).stage)
    plain, teacher = stage.loss(batch()), FrozenCLIP(str(folder / "clip"))
    stage.attach("alignment", Alignment(teacher, "middle.0", layer, 0.7, 2.0, hidden=8))
    kept = []
    stage.net.net.middle[0].register_forward_hook(lambda *args: kept.append(args[-1]))
    with torch.no_grad():
        for p in stage.further.parameters():
            torch.nn.init.normal_(p)
    both = stage.loss(batch())
    picture = F.interpolate(batch()["image_16"], (32, 32), mode="bicubic", antialias=True)
    found = teacher._model.visual.forward_intermediates(picture.clamp(-1, 1))
    theirs = found["image_intermediates"][layer or 0]
    if layer is None:
        theirs = teacher.image(batch()["image_16"])[:, :, None, None]
    ours = stage.further["alignment"].project(kept[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    size = theirs.shape[2]
    assert ours.shape[2] == 8
    ours = ours.unflatten(2, (size, -1)).unflatten(4, (size, -1)).mean((3, 5))
    tokens, relations = similar(ours, theirs)
    assert (relations.max() > 1e-3) == (size > 1)
    torch.testing.assert_close(both - plain, 0.7 * (tokens + 2 * relations), rtol=1e-4, atol=1e-5)


def test_blocks_of_a_transformer_are_aligned_by_their_patches(folder):
    """Even those that are recomputed in the backward pass."""
    net = ["net=jit_tiny", "net.channels=16", "net.depth=2", "net.head_channels=8", "net.embed=16"]
    net += ["net.bottleneck=8", "net.patch=4", "+net.image_channels=3", "+net.checkpoint=true"]
    given = ["stage=sr256", "size=16", "low=8", "crop=null", *net, "data.path=none"]
    torch.manual_seed(0)
    stage = built(composed("train", given).stage)
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain, teacher = stage.loss(batch()), FrozenCLIP(str(folder / "clip"))
    stage.attach("alignment", Alignment(teacher, "blocks.0", -3, 1.0, 0.0, hidden=8))
    kept = []
    stage.net.blocks[0].register_forward_hook(lambda *args: kept.append(args[-1]))
    both = stage.loss(batch())
    theirs = teacher.patches(batch()["image_16"], -3)
    ours = stage.further["alignment"].project(kept[0]).mT.unflatten(2, (4, 4))
    tokens, _ = similar(ours, theirs)
    torch.testing.assert_close(both - plain, tokens, rtol=1e-4, atol=1e-5)
    both.mean().backward()
    assert all(p.grad is not None for p in stage.further.parameters())


def trained(folder, out, *more):
    given = [f"data.path={folder / 'shards'}", f"clip.path={folder / 'clip'}", f"run={out}"]
    return cli.main(["train", *SR, "images=80", *given, *more])


def test_a_training_logs_it_apart_and_the_sampled_model_lacks_it(folder, tmp_path):
    out = tmp_path / "run"
    assert trained(folder, out, *URN) == 0
    (row,) = csv.DictReader((out / "metrics.csv").open())
    assert 0 < float(row["alignment"]) < 0.5 * (2 + 3 * 4)
    kept = load_file(out / "weights.safetensors")
    assert {key.partition(".")[0] for key in kept} == {"conditioner", "net"}
    assert not list(Run(out).load().further)
    state = torch.load(Run(out).checkpoints()[-1].path / "state.pt", weights_only=True)
    assert any(key.startswith("further.alignment.project") for key in state["state_dict"])
    assert not any(key.startswith("further") for key in state["callbacks"]["EMA"]["average"])


@pytest.mark.slow
def test_it_is_continued_with_its_teacher_alone(folder, tmp_path, capfd):
    write_clip(tmp_path / "clip")
    given = [*URN, f"clip.path={tmp_path / 'clip'}"]
    assert trained(folder, tmp_path / "run", *given, "images=8") == 0
    assert trained(folder, tmp_path / "run", *given, "images=16") == 0
    write_clip(tmp_path / "clip", seed=1)
    assert trained(folder, tmp_path / "run", *given, "images=24") == 2
    assert "differs from the encoder that this run began with" in capfd.readouterr().err


@pytest.mark.slow
def test_a_training_in_which_it_is_off_is_the_same_training(folder, tmp_path):
    for name, more in (("without", []), ("off", [*URN, "alignment.until=0.0"])):
        assert trained(folder, tmp_path / name, *more) == 0
    without, off = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("without", "off")
    )
    assert off.keys() == without.keys()
    assert all(torch.equal(without[key], off[key]) for key in without)
    assert next(csv.DictReader((tmp_path / "off" / "metrics.csv").open()))["alignment"] == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["alignment.block=middle.7"], "the network's blocks are"),
        (["alignment.layer=-9"], "has the blocks -5 to -1"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message, folder, tmp_path, capfd):
    assert trained(folder, tmp_path / "run", *URN, *overrides) == 2
    assert message in capfd.readouterr().err


def test_a_module_that_samples_no_pictures_is_refused(folder, tmp_path, capfd):
    given = [f"data.path={folder / 'shards'}", f"run={tmp_path / 'run'}", "images=4", "batch=4"]
    given += [f"clip.path={folder / 'clip'}", *URN]
    assert cli.main(["train", "stage=clip", *given]) == 2
    assert "takes no further losses" in capfd.readouterr().err

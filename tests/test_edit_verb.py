"""`cascade edit` with small cascades of random networks: pixels, files and refusals."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.diffusion.solvers import ddim
from cascade.edit import inversion, operations
from cascade.edit.canvas import Canvas
from cascade.encoders.clip import Architecture, save_clip
from cascade.pipeline import BestOf, Cascade
from cascade.runs.editing import Work
from tests.test_batch_mates import randomised

CLIP = Architecture(32, 8, [1, 1, 1, 1], 8, 16, 1, 2, 32)
NETS = ["net.channels=8", "net.embed=16", "net.width=16", "net.head_channels=8"]


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    """Prior, decoder to 8 px with one halving, super-resolution to 32 px."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(CLIP, CLIP.build(), folder)
    common = [
        "data.path=none",
        f"clip.path={folder}",
        "clip.model.dim=8",
        "clip.model.text_width=16",
    ]
    asked = {
        "prior": ["stage=prior", "net.width=16", "net.layers=1", "net.heads=2"],
        "decoder": ["stage=decoder", "size=8", "net=unet_tiny", *NETS],
        "sr": ["stage=sr256", "size=32", "low=8", "crop=null", "net.net.channels=8"],
    }
    stages = []
    for options in asked.values():
        config = composed("train", [*common, *options])
        stage = randomised(built(config.stage))
        stage.sampler = replace(stage.sampler, steps=2)
        stages.append(stage)
    return Cascade([BestOf(stages[0]), *stages[1:]])


@pytest.fixture
def here(tmp_path, monkeypatch, cascade):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cascade.verbs.edit.load_cascade", lambda *_: cascade)
    for name, (h, w) in {"a": (48, 48), "b": (48, 48), "wide": (40, 100)}.items():
        Image.fromarray(noise(h, w, ord(name[0]))).save(f"{name}.png")
    return tmp_path


def noise(h, w, seed):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def edit(kind, *options, picture=("a.png",), out="out.png"):
    pictures = ["--picture", *picture]
    return main(["edit", kind, "--model", "m", *pictures, "--out", out, *options])


def pixels(path):
    return np.asarray(Image.open(path, formats=["PNG"]))


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("vary", [], (32, 32)),
        ("vary", ["--eta", "0", "--steps", "3", "--n", "2"], (88, 48)),
        ("change", ["--to", "a blue circle", "--steps", "3", "--frames", "3"], (128, 48)),
        ("image", ["--caption", "a blue circle", "--strength", "0.5"], (32, 32)),
        ("inpaint", ["--caption", "a star", "--box", "4,6,20,10", "--jumps", "2"], (48, 48)),
        ("outpaint", ["--caption", "a star", "--right", "30", "--jumps", "1"], (78, 48)),
    ],
)
def test_each_kind_writes_a_picture(here, kind, options, size):
    assert edit(kind, *options) == 0
    assert Image.open("out.png", formats=["PNG"]).size == size


def test_negative_captions_and_weights_reach_edits(here):
    rest = ["--eta", "1", "--steps", "2", "--scale", "2", "--overwrite"]

    def painted(caption, *more):
        assert edit("vary", "--caption", caption, *more, *rest) == 0
        return pixels("out.png")

    plain = painted("a red star")
    assert np.array_equal(painted("a (red:1) star", "--weights"), plain)
    assert not np.array_equal(painted("a (red:5) star", "--weights"), plain)
    assert not np.array_equal(painted("a red star", "--negative", "a blue circle"), plain)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("vary", ["--negative", "a star"], "--negative goes with a caption"),
        ("vary", ["--weights"], "--weights goes with a caption"),
        ("vary", ["--caption", "a", "--negative", "b", "--eta", "0"], "add --scale 2"),
        ("image", ["--caption", "a", "--negative", "b"], "no stage that reads captions is guided"),
        ("image", ["--caption", "a (b star", "--weights"], r"\( belongs to no"),
    ],
)
def test_negative_captions_and_weights_without_effect_are_refused(
    here, kind, options, says, capsys
):
    assert edit(kind, *options) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (here / "out.png").exists()


@pytest.mark.parametrize("kind", ["vary", "outpaint"])
def test_a_checker_refuses_captions_and_blackens_edits(here, kind, cascade, capsys):
    clip = cascade.stages[0].stage.encoders[0].name
    options = {"vary": [], "outpaint": ["--right", "30", "--jumps", "1"]}[kind]
    for key, code in (("prompt", 2), ("picture", 0)):
        (here / "c.yaml").write_text(f"clip: {clip}\nconcepts: [{{text: a star, {key}: -0.999}}]")
        found = edit(kind, "--caption", "a star", "--checker", "c.yaml", *options)
        assert found == code
    assert "1 of 1 pictures match" in capsys.readouterr().out
    assert pixels("out.png").max() == 0


def test_noise_that_was_drawn_is_removed_at_the_end(cascade):
    """The last step returns the network's estimate of where the others end."""
    stage = cascade.stages[1]
    batch = {"caption": ["a star"], "sample": torch.tensor([3]), "x_T": torch.randn(1, 3, 8, 8)}
    batch["clip_image"] = torch.nn.functional.normalize(torch.randn(1, 8), dim=1)
    asked = stage.asked(batch, 0, without=("caption",))

    @torch.no_grad()
    def denoise(x, logsnr):
        return stage.process.denoise(asked.net, x, logsnr, asked.cond)

    levels = inversion.levels(3)
    end = ddim(denoise, batch["x_T"], levels)
    for drawn, expected in ((False, end), (True, denoise(end, levels[-1]).x0)):
        made = inversion.decoded(stage, batch, 0, steps=3, drawn=drawn)
        torch.testing.assert_close(made, stage.codec.decode(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("noise_of", ["slerp", "fixed"])
def test_a_path_is_a_strip_or_an_animation(here, noise_of):
    options = ["--noise", noise_of, "--frames", "3", "--steps", "2"]
    assert edit("interpolate", *options, picture=("a.png", "b.png")) == 0
    assert Image.open("out.png", formats=["PNG"]).size == (128, 48)
    assert edit("interpolate", *options, picture=("a.png", "b.png"), out="out.webp") == 0
    shown = Image.open("out.webp", formats=["WEBP"])
    assert shown.size == (32, 32)
    frames = []  # every 120 ms, as the file holds equal pictures in a row once
    for i in range(shown.n_frames):
        shown.seek(i)
        shown.load()
        frames += [np.asarray(shown.convert("RGB"))] * (shown.info["duration"] // 120)
    strip = pixels("out.png")[8:40]
    columns = [strip[:, 8 + 40 * i : 40 + 40 * i] for i in range(3)]
    assert all(np.array_equal(*pair) for pair in zip(frames, columns, strict=True))  # lossless


def test_reconstruction_takes_its_axes_from_shards(here, cascade):
    write_scenes(here / "shards", "plain", "train", 12, 16, 0)
    write_scenes(here / "shards", "plain", "val", 2, 16, 0)
    clip = cascade.stages[0].stage.encoders[0].name
    assert main(["data", "precompute", "shards", "--clip", clip]) == 0
    assert edit("reconstruct", "--data", "shards", "--components", "1", "8") == 0
    assert Image.open("out.png", formats=["PNG"]).size == (88, 48)


def test_what_is_not_repainted_stays_bit_for_bit_upright_at_its_own_size(here):
    turned = Image.fromarray(noise(40, 100, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    turned.save("turned.png", exif=exif)
    upright = np.rot90(noise(40, 100, 1), -1)
    assert (
        edit("inpaint", "--caption", "a star", "--box", "4,40,20,10", picture=("turned.png",)) == 0
    )
    out = pixels("out.png")
    assert out.shape == (100, 40, 3)
    changed = (out != upright).any(2)
    assert changed[40:50, 4:24].mean() > 0.9
    changed[40:50, 4:24] = False
    assert not changed.any()


def test_what_is_enlarged_contains_the_picture(here):
    sides = ["--left", "5", "--right", "160", "--top", "3", "--jumps", "1"]
    assert edit("outpaint", "--caption", "a star", *sides, picture=("wide.png",)) == 0
    out = pixels("out.png")
    assert out.shape == (43, 265, 3)
    assert np.array_equal(out[3:, 5:105], noise(40, 100, ord("w")))
    assert out[:, 105:].std() > 1


def test_a_batch_of_any_size_gives_the_same_pictures(here, cascade):
    """Draws are the same to a bit; pixels may be rounded differently by one level."""
    canvases = [Canvas.known(noise(48, 48, i)) for i in range(3)]
    for canvas in canvases:
        canvas.unknown[10:30, 20:40] = True
    texts = ["a star", "a red circle", "a blue square above a green heart"]
    whole = Work(cascade, canvases, texts, n=2, seed=5, size=16)
    z = {"clip_image": whole.embedded()[1]["clip_image"]}
    for size in (1, 4):
        part = replace(whole, size=size)
        pairs = zip(part.repainted(False, 2), whole.repainted(False, 2))
        assert max(abs(a.astype(int) - b).max() for a, b in pairs) <= 1
        found = part.rows(operations.vary, z)
        torch.testing.assert_close(found, whole.rows(operations.vary, z), atol=1e-3, rtol=0)


BOX = ["--caption", "a star", "--box", "0,0,9,9"]


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("inpaint", ["--caption", "a star"], "give --mask FILE, or --box"),
        (
            "inpaint",
            ["--caption", "a star", "--mask", "wide.png"],
            "100 x 40 pixels, the picture 48",
        ),
        ("inpaint", ["--caption", "a star", "--mask", "black.png"], "nothing would be repainted"),
        ("inpaint", ["--caption", "a star", "--box", "0,0,48,48"], "all would be repainted"),
        ("inpaint", ["--caption", "a star", "--box", "40,0,9,9"], "leaves the picture of 48 x 48"),
        ("inpaint", [*BOX, "--picture", "wide.png"], "add --fit pad"),
        ("inpaint", [*BOX, "--picture", "none.png"], "cannot read none.png"),
        ("inpaint", [*BOX, "--picture", "broken.png"], "broken picture"),
        ("inpaint", [*BOX, "--picture", "huge.png"], "huge picture"),
        ("inpaint", [*BOX, "--out", "there.png"], "there.png exists"),
        ("inpaint", [*BOX, "--out", "out.jpg"], "inpaint writes .png"),
        ("inpaint", [*BOX, "--jumps", "0"], "--jumps 0"),
        ("outpaint", ["--caption", "a star"], "give --left"),
        ("outpaint", ["--caption", "a star", "--left", "9000000"], "at most 50,000,000"),
        ("image", ["--caption", "a star", "--strength", "1.5"], "--strength 1.5"),
        ("image", ["--caption", "a star " * 40], "longer than the 32 tokens"),
        ("image", ["--caption", " "], "empty"),
        ("change", ["--to", "a star", "--share", "-0.1"], "--share -0.1"),
        ("interpolate", [], "two pictures or more"),
        ("reconstruct", ["--data", "shards"], "shards has no embeddings"),
        ("vary", ["--refine", "3"], "no effect without --eta"),
    ],
)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(here, capsys, kind, options, words):
    Image.new("L", (48, 48)).save("black.png")
    if "huge.png" in options:
        Image.new("1", (9000, 6000)).save("huge.png")
    (here / "broken.png").write_bytes(pixels("a.png").tobytes()[:99])
    (here / "there.png").write_bytes(b"mine")
    before = sorted(here.iterdir())
    assert edit(kind, *options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(here.iterdir()) == before
    assert (here / "there.png").read_bytes() == b"mine"


def test_a_cascade_without_embeddings_cannot_vary(here, cascade, monkeypatch, capsys):
    config = composed("train", ["data.path=none", "stage=decoder_text", "text=clip_tiny", "size=8"])
    bare = Cascade([built(config.stage)])
    monkeypatch.setattr("cascade.verbs.edit.load_cascade", lambda *_: bare)
    monkeypatch.setattr("cascade.verbs.edit.check_context", lambda *_: None)
    assert edit("vary") == 2
    assert "reads no CLIP embedding" in capsys.readouterr().err

"""What an independent writer wrote is read equal or refused: weights, statistics, pictures."""

import io
import math
from shutil import rmtree

import hypothesis.strategies as st
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.encoders.weights import check_tensors, fault, reading, tensors_of
from cascade.errors import UserError
from cascade.eval.metrics.statistics import Moments
from cascade.formats import rgb
from cascade.formats.kinds import kind_of
from cascade.formats.rgb import BadSample
from tests.drawn import BROKEN, damage, holds, or_refused
from tests.test_clip_sizes import VIT
from tests.test_rgb import on_white, stored

# Weights

KEYS = st.sampled_from(["w", "a.weight", "a.bias", "é", "b.0"])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
TENSORS = st.dictionaries(KEYS, SHAPES, min_size=1)
KINDS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def made(shapes, kind):
    return {
        key: torch.arange(math.prod(shape)).reshape(shape).to(kind) for key, shape in shapes.items()
    }


def save(tensors, path):
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def known(path):
    with reading([path], "a network"):
        return tensors_of([path])


@holds(60, TENSORS, KINDS, st.sampled_from([".safetensors", ".pt"]), TENSORS)
def test_weights_fit_or_the_key_that_does_not_is_named(folder, shapes, kind, ending, other):
    path = folder / f"a{ending}"
    save(made(shapes, kind), path)
    theirs = known(path)
    assert {key: tuple(x.shape) for key, x in theirs.items()} == shapes
    if ending == ".pt":
        expected = made(shapes, torch.float32)
        assert all(torch.equal(x.float(), expected[key]) for key, x in theirs.items())
    check_tensors(made(shapes, torch.float32), theirs, str(path), "it")
    odd = {key for key in shapes.keys() | other.keys() if shapes.get(key) != other.get(key)}
    if odd:
        with pytest.raises(UserError) as caught:
            check_tensors(made(other, torch.float32), theirs, str(path), "it")
        assert any(key in str(caught.value) for key in odd)


@holds(150, st.sampled_from([".safetensors", ".pt"]), st.data())
def test_damaged_weights_are_weights_or_refused(folder, ending, data):
    path = folder / f"a{ending}"
    save(made({"a": (2, 3), "b": ()}, torch.float32), path)
    whole = path.read_bytes()
    damaged = data.draw(
        damage(whole) | st.binary(max_size=40) | st.binary().map(whole[:30].__add__)
    )
    path.write_bytes(damaged)
    kind_of(path)
    fault(path)
    found = or_refused(known, path)
    assert found is BROKEN or len(damaged) >= len(whole) or ending == ".pt"
    if whole.startswith(damaged) and damaged != whole:
        assert found is BROKEN


@holds(3, KINDS, st.sampled_from(["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]))
def test_a_clip_of_any_precision_is_read_equal(folder, kind, name):
    model = open_clip.CLIP(**VIT.model_config())
    state = {key: x.to(kind) for key, x in model.state_dict().items()}
    rmtree(folder / "clip", ignore_errors=True)
    save_clip(VIT, model, folder / "clip")
    (folder / "clip/open_clip_model.safetensors").unlink()
    save(state, folder / "clip" / name)
    found = FrozenCLIP(str(folder / "clip"))._model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(x, state[key].float()) for key, x in found.items())


# Statistics


@st.composite
def moments(draw):
    d = draw(st.integers(1, 4))
    root = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(d, d))
    kind = draw(st.sampled_from(["f8", "f4", "f2", ">f8", "i4", "c16"]))
    arrays = {"mu": root[0].astype(kind), "sigma": (root @ root.T).astype(kind)}
    arrays |= draw(st.sampled_from([{}, {"n": 5}, {"n": np.array([5])}, {"extractor": "x"}]))
    wrong = draw(st.sampled_from(["", "", "nan", "shape", "asymmetric", "object"]))
    if wrong == "nan":
        arrays["sigma"] = arrays["sigma"] * np.nan
    elif wrong == "shape":
        arrays["mu"] = arrays["sigma"]
    elif wrong == "asymmetric":
        arrays["sigma"] = arrays["sigma"] + np.triu(np.ones((d, d)), 1)
    elif wrong == "object":
        arrays["mu"] = arrays["mu"].astype(object)
    if d == 1 and wrong == "asymmetric":
        wrong = ""
    return arrays, wrong or (kind if kind in ("i4", "c16") else "")


@holds(50, moments())
def test_statistics_are_read_equal_or_refused(folder, given):
    arrays, wrong = given
    np.savez(folder / "a.npz", **arrays)
    found = or_refused(Moments.load, folder / "a.npz")
    if wrong:
        assert found is BROKEN
        return
    np.testing.assert_array_equal(found.mean, arrays["mu"].astype("f8"))
    np.testing.assert_allclose(found.cov, arrays["sigma"].astype("f8"), rtol=1e-5, atol=1e-5)
    assert found.n == (5 if "n" in arrays else None)


def _npz():
    file = io.BytesIO()
    np.savez_compressed(file, mu=np.zeros(2), sigma=np.eye(2), n=np.array(9))
    return file.getvalue()


@holds(200, damage(_npz()) | st.binary(max_size=64) | st.binary().map(lambda x: b"PK\3\4" + x))
def test_damaged_statistics_are_refused_or_as_they_were(folder, data):
    (folder / "a.npz").write_bytes(data)
    kind_of(folder / "a.npz")
    found = or_refused(Moments.load, folder / "a.npz")
    if found is not BROKEN:
        assert found.mean.tolist() == [0, 0]
        assert found.cov.tolist() == [[1, 0], [0, 1]]


# Pictures

WRITERS = {  # Pillow's modes that each format keeps without loss
    "PNG": ("L", "LA", "RGB", "RGBA", "P", "1", "I;16"),
    "TIFF": ("L", "LA", "RGB", "RGBA", "P", "1", "I;16", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("L", "RGB", "P", "1"),
    "GIF": ("L", "P"),
    "PPM": ("L", "RGB", "1", "I;16"),
}
TURNABLE = ("PNG", "TIFF", "WEBP")


@st.composite
def pictures(draw):
    """A format, the rows of an upright picture, its mode, and the right 8-bit RGB of it."""
    form = draw(st.sampled_from(list(WRITERS)))
    mode = draw(st.sampled_from(WRITERS[form]))
    h, w, noise = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32))
    rng = np.random.default_rng(noise)
    bands = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode)
    if mode == "I;16":
        x = rng.integers(0, 2**16, (h, w)).astype(np.uint16)
        return form, mode, x, None, np.round(x / 257)[..., None].repeat(3, -1)
    if mode == "1":
        x = rng.random((h, w)) > 0.5
        return form, mode, x, None, 255 * x[..., None].repeat(3, -1)
    x = rng.integers(0, 256, (h, w, bands) if bands else (h, w)).astype(np.uint8)
    if mode == "P":
        palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        return form, mode, x, palette, palette[x]
    if mode == "L":
        return form, mode, x, None, x[..., None].repeat(3, -1)
    if mode == "CMYK":
        c, k = x[..., :3].astype(float), x[..., 3:].astype(float)
        return form, mode, x, None, (255 - c) * (255 - k) / 255
    if mode == "RGB":
        return form, mode, x, None, x
    return form, mode, x, None, on_white(x[..., :-1].astype(float), x[..., -1])


def saved(form, mode, x, palette, turn):
    bands = [Image.fromarray(band) for band in np.moveaxis(x, -1, 0)] if mode == "CMYK" else []
    image = Image.merge(mode, bands) if bands else Image.fromarray(x)
    if palette is not None:
        image.putpalette(palette.tobytes())
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    if turn is not None and form in TURNABLE:
        exif = Image.Exif()
        exif[0x0112] = turn
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@holds(150, pictures(), st.none() | st.integers(1, 8), st.none() | st.integers(1, 8))
def test_a_picture_of_any_mode_is_its_upright_colours(folder, picture, turn, stated):
    form, mode, x, palette, expected = picture
    turns = form in TURNABLE
    own = turn if turns and turn is not None else (stated or 1 if form != "TIFF" else 1)
    data = saved(form, mode, stored(x, own), palette, turn)
    found = rgb.picture(data, rgb.CONVERTIBLE, stated)
    assert found.shape == (*x.shape[:2], 3)
    assert np.abs(found - np.broadcast_to(expected, found.shape)).max() <= 1


SEEDS = [
    saved(form, mode, np.zeros((9, 7, *((bands,) if bands else ())), kind), None, 6)
    for form, mode, bands, kind in [
        ("PNG", "RGB", 3, "u1"),
        ("PNG", "I;16", 0, "u2"),
        ("TIFF", "RGBA", 4, "u1"),
        ("WEBP", "RGB", 3, "u1"),
        ("BMP", "L", 0, "u1"),
        ("GIF", "L", 0, "u1"),
        ("PPM", "L", 0, "u1"),
        ("JPEG", "RGB", 3, "u1"),
        ("JPEG2000", "RGB", 3, "u1"),
        ("AVIF", "RGB", 3, "u1"),
    ]
]


@holds(
    400,
    st.sampled_from(SEEDS).flatmap(damage)
    | st.sampled_from(SEEDS).flatmap(lambda x: st.binary().map(lambda y: x[:12] + y))
    | st.binary(),
)
def test_damaged_pictures_are_pictures_or_bad_samples(folder, data):
    try:
        found = rgb.picture(data, rgb.CONVERTIBLE)
    except BadSample:
        return
    assert (found.dtype, found.shape[2]) == (np.uint8, 3)

"""Precomputed rows: what the encoder gives, each sample's own, made once by many, refused if not.

The encoders are random, with large weights, so that what they make of two samples differs.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from hashlib import sha256

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade import cli
from cascade.config.compose import built, composed
from cascade.data import embeddings as module
from cascade.data.embeddings import Embeddings, Manifest, padded, write_embeddings
from cascade.data.loading import loader
from cascade.data.precompute import (
    about_captions,
    about_pictures,
    caption_rows,
    picture_rows,
    precompute,
)
from cascade.data.shards import Shards
from cascade.data.transforms import BadSample, Pictures, decode
from cascade.encoders.clip import Architecture, FrozenCLIP, save_clip
from cascade.encoders.text import FrozenT5
from cascade.errors import UserError
from cascade.training.compatibility import verify
from tests.test_text import write_t5

FIELDS = ("txt", "long_caption")
MIXED = dict.fromkeys(FIELDS, 0.5)
WORDS = ["red", "green", "blue", "square", "circle", "small", "large", "left"]
LACKS = {"txt": ("000010", "000011"), "long_caption": ("000011", "000012")}


def large(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def write_clip(folder, seed=0):
    architecture = Architecture(16, 8, 1, 16, 16, 1, 2, length=12, patch=8)
    model = architecture.build()
    large(model, seed)
    save_clip(architecture, model, folder)
    return folder


def members(i, key):
    file = io.BytesIO()
    noise = torch.rand(16, 20, 3, generator=torch.Generator().manual_seed(i)) * 255
    Image.fromarray(noise.byte().numpy()).save(file, "PNG")
    short = " ".join(WORDS[(i + j) % 8] for j in range(1 + i % 5))
    fields = {"long_caption": f"a {short} on a grey square number {i}"}
    yield f"{key}.png", file.getvalue()
    if key not in LACKS["txt"]:
        yield f"{key}.txt", f" {short}\n".encode()
    yield f"{key}.json", json.dumps({} if key in LACKS["long_caption"] else fields).encode()


def write_shards(folder):
    """Three tars of eight samples; of the second some have one caption only, and one has none."""
    for s in range(3):
        with tarfile.open(folder / f"train-{s:05d}.tar", "w") as tar:
            for i in range(8):
                for name, data in members(8 * s + i, f"{s:05d}{i}"):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards, encoders, and the folders of what these make of those."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("data", "clip", "t5"):
        (folder / name).mkdir()
    write_shards(folder / "data")
    write_clip(folder / "clip")
    write_t5(folder / "t5")
    common = ["data", "precompute", str(folder / "data"), "--captions", ",".join(FIELDS)]
    clip, t5 = str(folder / "clip"), str(folder / "t5")
    assert cli.main([*common, "--clip", clip, "--text", t5, "--length", "20"]) == 0
    assert cli.main([*common, "--text", clip, "--text-out", str(folder / "states")]) == 0
    return folder


def stores(made):
    return {name: Embeddings(made / "data" / name) for name in ("embeddings", "text")}


def shards(made, sizes=(), **options):
    return Shards(
        made / "data", Pictures(tuple(sizes)), captions=MIXED, max_skip_fraction=1.0, **options
    )


def alone(encoder, caption):
    """What the encoder makes of one caption: nothing is padded."""
    found = encoder.text([caption])
    return {key: rows[0] for key, rows in found.items() if key in encoder.sizes}


def each(made, captions, sizes=()):
    data = Shards(
        made / "data", Pictures(tuple(sizes)), captions=captions, max_skip_fraction=1.0, block=1
    )
    for tar, count in enumerate(data.corpus.counts):
        for place in range(count):
            try:
                yield data.item(tar, place, 0)
            except BadSample:
                continue


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("field", FIELDS)
def test_captions_rows_are_the_encoders_own_and_of_true_length(made, kind, field):
    encoder = {"t5": FrozenT5(str(made / "t5"), 20), "clip": FrozenCLIP(str(made / "clip"))}[kind]
    store = Embeddings(made / "data" / "text" if kind == "t5" else made / "states")
    lengths = set()
    for item in each(made, {field: 1.0}):
        row = store.row(*item["key"].split("/"), field)
        expected = alone(encoder, item["caption"])
        assert row.keys() == expected.keys()
        assert row["text"].dtype == torch.bfloat16
        torch.testing.assert_close(row["text"].float(), expected["text"], rtol=0.01, atol=0.01)
        if kind == "clip":
            torch.testing.assert_close(row["clip_text"], expected["clip_text"])
            assert row["clip_text"].norm() == pytest.approx(1)
        lengths.add(len(row["text"]))
    assert len(lengths) >= 3
    assert max(lengths) <= {"t5": 20, "clip": 12}[kind]


def test_pictures_rows_are_of_the_whole_centre_square(made):
    clip, store = FrozenCLIP(str(made / "clip")), Embeddings(made / "data" / "embeddings")
    data = shards(made)
    for tar, count in enumerate(data.corpus.counts):
        for place in range(count):
            opened = data.corpus[tar]
            if opened.key(place) in LACKS["txt"] and opened.key(place) in LACKS["long_caption"]:
                continue
            pixels = torch.from_numpy(decode(opened.read(place, "picture"), 16)).permute(2, 0, 1)
            row = store.row(opened.shard, opened.key(place))
            assert row.keys() == {"clip_image"}
            expected = clip.image(pixels[None] / 127.5 - 1)[0]
            torch.testing.assert_close(row["clip_image"], expected)


def test_the_manifest_says_what_made_the_rows(made):
    text, clip, pictures = (
        Embeddings(path).about
        for path in (made / "data/text", made / "states", made / "data/embeddings")
    )
    assert text.hash == FrozenT5(str(made / "t5")).hash
    assert (text.sizes, text.length, text.captions) == ({"text": 16}, 20, list(FIELDS))
    assert clip.dtypes == {"text": "bfloat16", "clip_text": "float32"}
    assert (clip.unit_norm, clip.length, clip.sizes["clip_text"]) == (["clip_text"], 12, 8)
    assert pictures.hash == clip.hash == FrozenCLIP(str(made / "clip")).hash
    assert (pictures.captions, pictures.unit_norm, pictures.length) == ([], ["clip_image"], None)


def test_a_caption_that_is_not_there_has_no_row(made):
    """A sample with one caption has that one's row; a sample with none has none at all."""
    for store in (Embeddings(made / "data/text"), Embeddings(made / "states")):
        for field, other in (FIELDS, FIELDS[::-1]):
            (only,) = set(LACKS[field]) - set(LACKS[other])
            with pytest.raises(BadSample, match="no embedding"):
                store.row("train-00001", only, field)
            assert len(store.row("train-00001", only, other)["text"]) > 1
    for store in (Embeddings(made / "data/text"), Embeddings(made / "data/embeddings")):
        with pytest.raises(BadSample, match="no embedding"):
            store.row("train-00001", "000011", "txt")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_has_the_rows_of_the_captions_drawn_for_it(made, workers):
    t5 = FrozenT5(str(made / "t5"), 20)
    data = shards(made, embeddings={"text": Embeddings(made / "data/text")})
    drawn = 0
    for batch in loader(data, 6, batches=8, workers=workers):
        online = t5.text(batch["caption"])
        assert torch.equal(batch["text_mask"], online["text_mask"])
        states = torch.where(batch["text_mask"][..., None], online["text"], 0)
        torch.testing.assert_close(batch["text"].float(), states, rtol=0.01, atol=0.01)
        drawn += sum(caption.startswith("a ") for caption in batch["caption"])
    assert 8 < drawn < 40


class Lengths(FrozenT5):
    """An encoder whose states say how long the caption is."""

    sizes = {"text": 1}

    def __call__(self, batch):
        text = torch.tensor([[[float(len(caption))]] for caption in batch["caption"]])
        return {"text": text, "text_mask": torch.ones(text.shape[:2], dtype=torch.bool)}


@pytest.mark.parametrize(
    ("several", "expected"), [(None, [4, 3]), ("first", [2, 1]), ("all", [4, 3])]
)
def test_rows_are_of_the_captions_that_are_chosen(several, expected, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, text in (("a", b"12\n3"), ("b", b"1\n2")):
            for end, data in (("jpg", b"unread"), ("txt", text)):
                info = tarfile.TarInfo(f"{key}.{end}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    keys, rows = caption_rows(tmp_path / "0.tar", Lengths("none"), ["txt"], several=several)
    assert (keys, rows["txt/text"].flatten().tolist()) == (["a", "b"], expected)


def test_rows_are_padded_to_the_longest_of_the_batch():
    states = [torch.ones(n, 2) * n for n in (3, 1, 2)]
    batch = padded(states)
    assert batch["text"][:, :, 0].tolist() == [[3, 3, 3], [1, 0, 0], [2, 2, 0]]
    assert batch["text_mask"].tolist() == [[True] * 3, [True, False, False], [True, True, False]]


def stage(made):
    """A small text decoder in which the caption matters from the first step."""
    reader = [f"text.reader.path_or_name={made / 't5'}", "+text.reader.length=20", "text.size=16"]
    net = ["net.channels=8", "net.embed=16", "net.width=16", "net.head_channels=8", "net.blocks=1"]
    config = composed(
        "train", ["stage=decoder_text", "text=t5_small", "size=16", "data.path=x", *reader, *net]
    )
    torch.manual_seed(0)
    module = built(config.stage)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def losses(module, batches):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for batch in batches:
        loss = module.loss(module.encoded(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def test_training_with_rows_equals_training_with_the_encoder(made, monkeypatch):
    """To bfloat16's precision; and the encoder is not run where there are rows."""
    online = [*losses(stage(made), loader(shards(made, [16]), 8, batches=5))]
    data = shards(made, [16], embeddings={"text": Embeddings(made / "data/text")})
    foreign = [{**b, "text": b["text"].flip(0)} for b in loader(data, 8, batches=5)]
    monkeypatch.setattr(FrozenT5, "text", lambda *_: pytest.fail("the encoder was run"))
    rows = [*losses(stage(made), loader(data, 8, batches=5))]
    assert rows == pytest.approx(online, rel=1e-4)
    others = losses(stage(made), foreign)  # the same rows under other captions
    assert max(abs(other / own - 1) for own, other in zip(online, others)) > 5e-3


def put(folder, shard="train-00000", keys=("a", "b"), hash="0" * 16, **tensors):
    named = {name.replace("__", "/").replace("_at", ".offsets"): t for name, t in tensors.items()}
    about = {"keys": json.dumps(list(keys)), "hash": hash}
    folder.mkdir(exist_ok=True)
    save_file(named, folder / f"{shard}.safetensors", about)
    return Embeddings(folder)


def about(**changes):
    return Manifest("e", "0" * 16, {"clip_image": 2, "text": 2}, {}, **changes)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("words", "tensors"),
    [
        ("3 rows of clip_image for 2 keys", {"clip_image": torch.zeros(3, 2)}),
        ("rows of 3 numbers of clip_image, .* says 2", {"clip_image": torch.zeros(2, 3)}),
        ("another encoder", {"clip_image": torch.zeros(2, 2), "hash": "1" * 16}),
        ("2 rows of clip_image for 1 keys", {"clip_image": torch.zeros(2, 2), "keys": "aa"}),
        ("-1 rows", {"txt__text": torch.zeros(4, 2), "txt__text_at": torch.tensor([0, 3, 2])}),
        ("-1 rows", {"txt__text": torch.zeros(4, 2), "txt__text_at": torch.tensor([0, 3, 5])}),
        ("1 rows", {"txt__text": torch.zeros(4, 2), "txt__text_at": torch.tensor([0, 4])}),
        ("no rows for captions of txt", {"x__clip_text": torch.zeros(2, 2)}),
    ],
)
def test_a_file_that_does_not_agree_with_itself_is_refused(tmp_path, words, tensors):
    about().write(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        put(tmp_path, **tensors).row("train-00000", "a")
    assert "\n" not in str(caught.value)
    assert "cascade data precompute" in str(caught.value)


def test_half_files_and_pickles_are_refused_and_leftovers_not_seen(tmp_path):
    whole = put(tmp_path, clip_image=torch.ones(2, 2)).folder / "train-00000.safetensors"
    data = whole.read_bytes()
    for broken in (b"", data[:7], data[:50], data[:-1], pickle.dumps(Bomb()), b"\xff" * 500):
        whole.write_bytes(broken)
        with pytest.raises(UserError, match="missing or broken: run") as caught:
            Embeddings(tmp_path).row("train-00000", "a")
        assert "\n" not in str(caught.value)
    whole.rename(tmp_path / ".train-00000.safetensors.node.1.part")
    with pytest.raises(UserError, match="lacks 1 of 1 shards, such as train-00000: run"):
        Embeddings(tmp_path).require(["train-00000"])


@pytest.mark.parametrize(
    "text", ["{", "null", "[]", "{}", '{"encoder": "e"}', '{"sizes": 1, "hash": 2}']
)
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(
        UserError, match=r"manifest.json is damaged or old: remove .*, then run"
    ) as caught:
        _ = Embeddings(tmp_path).about
    assert "\n" not in str(caught.value)
    assert Embeddings(tmp_path / "none").about is None


def test_shards_are_counted_without_being_opened(tmp_path, monkeypatch):
    names = [f"{n:05d}" for n in range(1000)]
    for name in names:
        os.mknod(tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(module, "safe_open", lambda *_, **__: pytest.fail("a file was opened"))
    Embeddings(tmp_path).require(names)
    with pytest.raises(UserError, match="lacks 2 of 1002 shards, such as x: run"):
        Embeddings(tmp_path).require([*names, "x", "y"])


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    for n in range(4):
        store = put(tmp_path, str(n), clip_image=torch.full((2, 2), n))
    for n in (0, 1, 2, 0, 3, 2):
        assert store.row(str(n), "b")["clip_image"].tolist() == [n, n]
        assert len(store._files) <= 2
    assert list(store._files) == ["3", "2"]
    assert pickle.loads(pickle.dumps(store)).row("1", "a")["clip_image"].tolist() == [1, 1]


def test_what_is_written_is_whole_or_refused(tmp_path):
    ragged = {"txt/text": torch.ones(5, 2), "txt/text.offsets": torch.tensor([0, 2, 5])}
    write_embeddings(tmp_path, "s", ["a", "b"], ragged, {})
    assert len(Embeddings(tmp_path).row("s", "b")["text"]) == 3
    for keys in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="one for each row"):
            write_embeddings(tmp_path, "s", keys, ragged, {})


def test_a_folder_that_an_earlier_version_began_goes_on_as_it_named_its_encoder(made, tmp_path):
    data, out, folder = tmp_path / "data", tmp_path / "out", made / "clip"
    shutil.copytree(made / "data", data)
    clip, name = FrozenCLIP(str(folder)), next(data.glob("*.tar")).stem
    rows = partial(picture_rows, clip=clip, captions=FIELDS)
    old = sha256((folder / "open_clip_model.safetensors").read_bytes()).hexdigest()[:16]
    for noted, goes_on in ((str(folder), True), ("ViT-B-32", False)):
        shutil.rmtree(out, ignore_errors=True)
        replace(about_pictures(clip), hash=old, encoder=noted).write(out)
        if not goes_on:
            with pytest.raises(UserError, match=r"recorded by a version .*: choose another folder"):
                about_pictures(clip, out)
            continue
        precompute(data, out, about_pictures(clip, out), rows)
        keys = json.loads(safe_open(out / f"{name}.safetensors", "pt").metadata()["keys"])
        assert Embeddings(out).row(name, keys[0])["clip_image"].norm() == pytest.approx(1, abs=1e-5)
        assert Embeddings(out).about.hash == old


def test_a_folder_of_another_encoder_or_other_captions_is_not_mixed(made, tmp_path):
    clip = FrozenCLIP(str(write_clip(tmp_path, seed=1)))
    t5 = FrozenT5(str(made / "t5"), 20)
    rows = partial(picture_rows, clip=clip, captions=FIELDS)
    with pytest.raises(UserError, match=f"with hash=.*, not {clip.hash}: choose another folder"):
        precompute(made / "data", made / "data/embeddings", about_pictures(clip), rows)
    rows = partial(caption_rows, encoder=t5, captions=["txt"])
    with pytest.raises(UserError, match=r"captions=\['txt', 'long_caption'\], not \['txt'\]"):
        precompute(made / "data", made / "data/text", about_captions(t5, ["txt"]), rows)


def test_verification_passes_what_the_encoders_made(made):
    t5, clip = FrozenT5(str(made / "t5"), 20), FrozenCLIP(str(made / "clip"))
    held = stores(made)
    seen = []

    def data(count, sizes):
        seen.append(list(sizes))
        return shards(made, [16], embeddings=held).preview(count, sizes)

    verify(data, held.values(), [t5], clip, count=20)
    verify(data, [held["text"]], [t5], FrozenCLIP("nowhere"))
    verify(data, [held["embeddings"]], [t5], FrozenCLIP("nowhere"))
    verify(data, [], [t5], clip)
    assert seen == [[16], []]
    assert "_model" not in vars(t5)
    assert "_model" not in vars(clip)


def shuffled(folder, out):
    """The same rows under each other's keys, as if joined by their order."""
    out.mkdir()
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        with module.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        keys = json.loads(metadata["keys"])
        metadata["keys"] = json.dumps([*keys[1:], keys[0]])
        save_file(tensors, out / path.name, metadata)
    (out / "manifest.json").write_text((folder / "manifest.json").read_text())
    return Embeddings(out)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("embeddings", r"clip_image of train-0000\d/0000\d+ does not match .*clip: "
         r"cosine -?[\d.]+, not above 0.999; run"),
        ("text", r"text of train-0000\d/0000\d+ does not match .*t5: "
         r"(cosine -?[\d.]+, not above 0.999|\d+ tokens, not \d+); run"),
    ],
)  # fmt: skip
def test_shuffled_rows_are_refused_with_the_sample_and_both_numbers(made, tmp_path, kind, words):
    held = {kind: shuffled(made / "data" / kind, tmp_path / "shuffled")}
    t5, clip = FrozenT5(str(made / "t5"), 20), FrozenCLIP(str(made / "clip"))
    preview = shards(made, [16], embeddings=held).preview
    with pytest.raises(UserError, match=words) as caught:
        verify(preview, held.values(), [t5], clip)
    assert "\n" not in str(caught.value)

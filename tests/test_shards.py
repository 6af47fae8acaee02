"""Claims about the reader: one global order, right pairs whatever is damaged, losses counted."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from cascade.data import items
from cascade.data import shards as module
from cascade.data.embeddings import Embeddings, write_embeddings
from cascade.data.loading import collate, loader
from cascade.data.order import sample_numbers
from cascade.data.precompute import _captioned_picture, made_of
from cascade.data.shards import Shards
from cascade.data.stream import Stream
from cascade.data.tars.index import scan
from cascade.data.transforms import Pictures
from cascade.errors import UserError

SMALL = Pictures((8,))


def picture(i, form="JPEG", mode="RGB"):
    """A picture that says which sample it belongs to."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (10 * i, 255 - 10 * i, 0)).convert(mode).save(file, form, quality=95)
    return file.getvalue()


def number(x):
    return round(float((x[0].mean() + 1) * 12.75))


def sample(key, i):
    fields = {"key": key, "long_caption": f"long {i}", "scene": {"objects": [i]}}
    return [
        (f"{key}.jpg", picture(i)),
        (f"{key}.txt", str(i).encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(shards, numbers):
    return [shards[n]["key"] for n in numbers]


def assert_paired(shards):
    """Every item of an epoch has its own picture."""
    for n in range(len(shards)):
        item = shards[n]
        assert number(item["image_8"]) == int(item["caption"]), item["key"]


@pytest.fixture
def folder(tmp_path):
    """Two shards of twelve samples."""
    for s in range(2):
        members = [m for i in range(12) for m in sample(f"{s:05d}{i:04d}", 12 * s + i)]
        write(tmp_path / f"train-{s:05d}.tar", members)
    return tmp_path


def test_each_sample_comes_once_an_epoch_in_an_order_of_the_seed(folder):
    shards = Shards(folder, SMALL, seed=1)
    first, second = keys(shards, range(24)), keys(shards, range(24, 48))
    assert len(set(first)) == 24
    assert set(first) == set(second)
    assert first != second
    assert first == keys(Shards(folder, SMALL, seed=1), range(24))
    assert first != keys(Shards(folder, SMALL, seed=2), range(24))
    assert keys(Shards(folder, SMALL, shuffle=False), range(48)) == 2 * sorted(first)
    assert_paired(shards)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_world_size(world):
    ranks = [iter(sample_numbers(8 // world, r, world, start=16)) for r in range(world)]
    blocks = [[n for rank in ranks for n in next(rank)] for _ in range(5)]
    assert blocks == [list(range(n, n + 8)) for n in range(16, 56, 8)]


def test_a_sample_does_not_depend_on_batch_start_or_workers(folder):
    captions = {"txt": 0.5, "long_caption": 0.5}
    shards = Shards(folder, Pictures((16, 8), crop=8), captions=captions, json_fields=("scene",))
    for batch, start, workers in ((3, 0, 0), (8, 10, 0), (5, 20, 2)):
        for got in loader(shards, batch, start=start, batches=3, workers=workers):
            want = collate([shards[n] for n in got["sample"].tolist()])
            assert got.keys() == want.keys()
            for key, value in want.items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(got[key], value), key
    assert got["image_16"].shape == (5, 3, 8, 8)
    assert got["image_8"].shape == (5, 3, 4, 4)
    assert got["scene"][0] == {"objects": [int(got["caption"][0].split()[-1])]}


def test_each_epoch_crops_anew(tmp_path):
    file = io.BytesIO()
    Image.linear_gradient("L").resize((16, 16)).rotate(30).save(file, "PNG")
    write(tmp_path / "0.tar", [("a.png", file.getvalue()), ("a.txt", b"a gradient")])
    shards = Shards(tmp_path, Pictures((16,), crop=8))
    assert len({shards[n]["image_16"].numpy().tobytes() for n in range(200)}) > 60  # of 81


def test_caption_fields_are_drawn_at_their_rates_and_stand_in_for_each_other(folder):
    shards = Shards(folder, Pictures(()), captions={"txt": 1.0, "long_caption": 3.0})
    long = sum(shards[n]["caption"].startswith("long") for n in range(960))
    assert abs(long / 960 - 0.75) < 4 * (0.75 * 0.25 / 960) ** 0.5
    only = Shards(folder, Pictures(()), captions={"txt": 1.0, "absent": 99.0})
    assert all(only[n]["caption"].isdigit() for n in range(24))
    with pytest.raises(UserError, match="24 no caption"):
        Shards(folder, SMALL, captions={"absent": 1.0})[0]


def captioned(path, texts, fields=()):
    """A tar of pictures with these bytes as texts, and as JSON where there are any."""
    members = []
    for i, text in enumerate(texts):
        members += [(f"{i:04d}.jpg", picture(i)), (f"{i:04d}.txt", text)]
        members += [(f"{i:04d}.json", fields[i])] if fields else []
    return write(path, members)


def test_a_caption_in_an_unknown_encoding_is_a_bad_one_and_named(tmp_path):
    text = "Übung über café"
    known = [text.encode(e) for e in ("utf-8", "utf-8-sig", "utf-16")]
    other = [text.encode("cp1252"), text.encode("utf-16-le"), "привет".encode("cp1251")]
    captioned(tmp_path / "a.tar", known + other)
    shards = Shards(tmp_path, Pictures(()), shuffle=False)
    assert [shards[n]["caption"] for n in range(3)] == [text] * 3
    reasons = [skip.reason for skip in shards[3]["skipped"]]
    assert [r.split(":")[0] for r in reasons] == [
        "caption is not UTF-8, perhaps CP1252",
        "caption is not UTF-8, perhaps UTF-16LE without a mark",
        "caption is not UTF-8, perhaps GB18030, SHIFT_JIS or CP1251, by its language",
    ]
    assert reasons[0].endswith("iconv -f CP1252 -t UTF-8")
    with pytest.raises(UserError, match=r"3 are bad .*iconv -f CP1252 -t UTF-8"):
        shards.check(1)


def test_a_json_in_an_unknown_encoding_is_a_bad_one_too(tmp_path):
    fields = json.dumps({"long": "Übung"}, ensure_ascii=False)
    coded = [fields.encode(encoding) for encoding in ("utf-8-sig", "utf-16", "cp1252")]
    captioned(tmp_path / "a.tar", [b"a"] * 4, [*coded, rb'{"long": "half \ud83d"}'])
    shards = Shards(tmp_path, Pictures(()), shuffle=False, captions={"long": 1.0})
    assert [shards[n]["caption"] for n in (0, 1, 3)] == ["Übung", "Übung", "half ?"]
    assert shards[2]["skipped"][0].reason.startswith("JSON is not UTF-8, perhaps CP1252")


LISTS = ["a0", "b0", "c0", " ", 3], ["a1", "b1"], ["a2"], "a3"


@pytest.fixture
def lists(tmp_path):
    """Four samples with several captions, in a list in the JSON and in lines of the txt."""
    texts = [b"a0\r\nb0\n\nc0\n", "a1\u2028\nb1".encode(), b"a2\n", b"a3"]
    captioned(tmp_path / "a.tar", texts, [json.dumps({"all": f}).encode() for f in LISTS])
    return tmp_path


@pytest.mark.parametrize("field", ["all", "txt"])
def test_which_of_several_captions_is_taken_is_a_choice(lists, field):
    def of(several):
        shards = Shards(lists, Pictures(()), shuffle=False, captions={field: 1.0}, several=several)
        return [shards[n]["caption"] for n in range(4)]

    assert of("first") == ["a0", "a1", "a2", "a3"]
    assert of("all") == ["a0 b0 c0", "a1 b1", "a2", "a3"]
    shards = Shards(lists, Pictures(()), captions={field: 1.0}, several="drawn")
    counts = Counter(shards[n]["caption"] for n in range(1200))  # 300 epochs
    assert counts.keys() == {"a0", "b0", "c0", "a1", "b1", "a2", "a3"}
    for name, count in counts.items():
        share = {"0": 1 / 3, "1": 1 / 2, "2": 1, "3": 1}[name[1]]
        assert abs(count / 300 - share) <= 4 * (share * (1 - share) / 300) ** 0.5
    again = Shards(lists, Pictures(()), captions={field: 1.0}, several="drawn")
    assert [again[n]["caption"] for n in range(40)] == [shards[n]["caption"] for n in range(40)]
    with pytest.raises(UserError, match="several=each: choose first, drawn or all"):
        of("each")


def test_nobody_chooses_among_several_captions_unasked(lists, caplog):
    """A text is one caption, as ever; a list is none, and both are said."""
    shards = Shards(lists, Pictures(()), shuffle=False)
    assert shards[0]["caption"] == "a0\r\nb0\n\nc0"
    shards.check(1)
    assert "2 of 4 samples that were checked have several lines in their txt" in caplog.text
    both = Shards(lists, Pictures(()), shuffle=False, captions={"all": 0.9, "txt": 0.1})
    assert both[0]["caption"] == "a0\r\nb0\n\nc0"
    both.check(1)
    assert "2 of 4 samples that were checked have a list of captions in all" in caplog.text
    alone = Shards(lists, Pictures(()), shuffle=False, captions={"all": 1.0})
    assert [alone[n]["caption"] for n in (2, 3)] == ["a2", "a3"]
    reason = "captions in a list: choose +data.several=first, drawn or all"
    assert [skip.reason for skip in alone[0]["skipped"]] == [reason] * 2


def test_draws_of_fields_are_those_of_before(folder):
    """Of one-line texts nothing changes, whatever is chosen for several: a rule of its own."""
    rates = {"txt": 0.35, "long_caption": 0.65}
    for several in (None, "first", "drawn", "all"):
        shards = Shards(folder, Pictures(()), seed=5, captions=rates, several=several)
        for n in range(60):
            stream = np.random.default_rng([5, zlib.crc32(b"caption"), n])
            long = stream.choice(2, p=[0.35, 0.65])
            assert shards[n]["caption"].startswith("long") == bool(long)


def test_of_a_cut_tar_the_whole_samples_stay(tmp_path, caplog):
    members = [m for i in range(6) for m in sample(f"{i:04d}", i)]
    data = write(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        infos = tar.getmembers()
    jpg, txt, fields = infos[12:15]  # of the fifth sample
    end = infos[-1].offset_data + 512  # of the last member
    for cut, whole in (
        (jpg.offset_data + 7, 4),
        (txt.offset + 100, 4),
        (txt.offset_data, 4),
        (fields.offset_data + 3, 4),
        (fields.offset_data + 512, 4),  # at a boundary: whole, but nobody can know
        (jpg.offset, 3),
        (end, 5),
        (infos[1].offset_data, 0),
        (100, 0),
        (0, 0),
    ):
        (tmp_path / "cut").mkdir(exist_ok=True)
        (tmp_path / "cut" / "a.tar").write_bytes(data[:cut])
        caplog.clear()
        if not whole:
            with pytest.raises(UserError, match=r"no usable sample \(1 cut short\)"):
                Shards(tmp_path / "cut", SMALL)
            continue
        shards = Shards(tmp_path / "cut", SMALL)
        assert len(shards) == whole, cut
        assert shards.skipped == {"cut short": 1}
        assert f"cut short after {whole} samples" in caplog.text
        assert_paired(shards)
    (tmp_path / "cut" / "a.tar").write_bytes(data[: end + 512])
    assert Shards(tmp_path / "cut", SMALL).skipped == {}


def test_a_tar_with_a_damaged_header_counts_as_cut(tmp_path):
    path = write(tmp_path / "a.tar", [m for i in range(6) for m in sample(f"{i:04d}", i)])
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[10].offset  # txt of the fourth sample
    data = bytearray(path.read_bytes())
    data[offset : offset + 512] = b"?" * 512
    path.write_bytes(data)
    shards = Shards(tmp_path, SMALL)
    assert len(shards) == 3
    assert shards.skipped == {"cut short": 1}
    assert_paired(shards)


def huge():
    body = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunk = b"\0\0\0\r" + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\1IDAT"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


DOT = io.BytesIO()
Image.new("RGB", (1, 1)).save(DOT, "PNG")


def test_a_damaged_corpus_loses_exactly_its_bad_samples(tmp_path):
    members = [
        *sample("a0", 0),
        ("a1.jpg", b"<html>404</html>"),
        ("a1.txt", b"1"),
        ("a2.jpg", picture(2, mode="CMYK")),  # good
        ("a2.txt", b"2"),
        ("a3.png", DOT.getvalue()),
        ("a3.txt", b"3"),
        ("a4.png", huge()),
        ("a4.txt", b"4"),
        ("a5.jpg", picture(5)),  # no caption
        ("a6.jpg", picture(6)),
        ("a6.txt", b""),
        ("a7.jpg", picture(7)),
        ("a7.txt", b" \n"),
        ("a8.txt", b"8"),  # no picture
        ("a8.pyd", pickle.dumps(Bomb())),
        ("a0.jpg", picture(9)),  # a0 again
        ("a0.txt", b"9"),
        ("a9.jpg", picture(10)),  # twice in a row: whose is the caption?
        ("a9.jpg", picture(11)),
        ("a9.txt", b"11"),
        ("._b0.jpg", b"left by a Mac"),
        *sample("b0", 12),
    ]
    write(tmp_path / "00000.tar", members)
    with pytest.raises(UserError, match=r"6 of 13 samples are left out .*max_skip_fraction"):
        Shards(tmp_path, SMALL)
    shards = Shards(tmp_path, SMALL, seed=3, max_skip_fraction=1.0)
    assert shards.skipped == {"no caption": 3, "no picture": 1, "duplicate key": 2}
    tar = shards.corpus[0]
    assert [tar.key(i) for i in range(7)] == ["a0", "a1", "a2", "a3", "a4", "a7", "b0"]
    assert_paired(shards)
    items = [shards[n] for n in range(7)]
    assert {i["key"] for i in items} == {f"00000/{k}" for k in ("a0", "a2", "b0")}
    # Each bad sample is met at its own place, and by every item that it pushes to the next.
    order = [tar.key(place) for _, place in shards.order.places(0)]
    bad = {"a1": "broken picture", "a3": "picture too small", "a4": "huge picture"}
    bad["a7"] = "no caption"
    for n, item in enumerate(items):
        ring = order[n:] + order[:n]
        until = ring.index(item["key"].split("/")[1])
        assert item["skipped"] == [(n, f"00000/{key}", bad[key]) for key in ring[:until]]
        assert item["sample"] == n
    together = collate(items)["skipped"]
    assert together == [skip for item in items for skip in item["skipped"]]
    assert {skip.key: skip.reason for skip in together} == {f"00000/{k}": r for k, r in bad.items()}


def test_png_webp_capitals_folders_and_what_webdataset_writes(tmp_path):
    with wds.TarWriter(str(tmp_path / "00000.tar")) as tar:
        for i, form in enumerate(("png", "webp", "jpeg")):
            coded = picture(i, form)
            tar.write({"__key__": f"x/{i}", form: coded, "txt": str(i), "json": {"scene": None}})
    write(tmp_path / "00001.tar", [("B.JPG", picture(3)), ("B.Txt", b"3"), ("C.png", b"")])
    shards = Shards(tmp_path, SMALL, shuffle=False, json_fields=("scene", "absent"))
    assert keys(shards, range(4)) == ["00000/x/0", "00000/x/1", "00000/x/2", "00001/B"]
    assert shards[0]["scene"] is shards[3]["absent"] is None
    assert_paired(shards)


def test_a_split_is_chosen_by_name(folder):
    write(folder / "val-00000.tar", sample("v", 3))
    assert len(Shards(folder, SMALL)) == 24
    assert len(Shards(folder, SMALL, split="val")) == 1
    assert len(Shards(str(folder / "train-*1.tar"), SMALL)) == 12
    assert len(Shards([folder / "val-00000.tar"], SMALL)) == 1
    with pytest.raises(UserError, match=r"no test-\*.tar: choose a split of \['train', 'val'\]"):
        Shards(folder, SMALL, split="test")


def test_folders_without_data_are_refused_in_one_line(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing", str(tmp_path / "*.zip"), []):
        with pytest.raises(UserError, match=r"no \.tar is there"):
            Shards(path, SMALL)
    with pytest.raises(UserError, match=r"cannot read .*gone\.tar: No such file"):
        Shards([tmp_path / "gone.tar"], SMALL)
    other = write(tmp_path / "empty" / "train-00000.tar", sample("x", 1))
    with pytest.raises(UserError, match="two shards are called train-00000"):
        Shards([folder / "train-00000.tar", other], SMALL)


def embedded(folder, out, lacking=()):
    for tar in folder.glob("*.tar"):
        index = scan(tar)
        names = [index.key(row) for row in range(len(index.ends))]
        names = [name for name in names if name not in lacking]
        np.random.default_rng(0).shuffle(names)
        rows = torch.tensor([[float(k[:5]), float(k[5:])] for k in names])
        half = {"clip_image": rows, "tokens": rows[:, None].half()}
        write_embeddings(out, tar.stem, names, half, {"encoder": "test"})
    return Embeddings(out)


def test_embeddings_are_joined_by_key_whatever_their_order(folder, tmp_path):
    shards = Shards(folder, SMALL, embeddings={"clip": embedded(folder, tmp_path / "clip")})
    for workers in (0, 2):
        (batch,) = loader(shards, 24, batches=1, workers=workers)
        want = [[float(k[-9:-4]), float(k[-4:])] for k in batch["key"]]
        assert batch["clip_image"].tolist() == want
        assert batch["tokens"].shape == (24, 1, 2)
        assert batch["tokens"].dtype == torch.float16
    assert len(list((tmp_path / "clip").iterdir())) == 2  # no temporary file stays


def test_states_of_unequal_length_are_padded(folder, tmp_path):
    for tar in folder.glob("*.tar"):
        index = scan(tar)
        keys = [index.key(row) for row in range(12)]
        lengths = torch.tensor([0, *(1 + int(key[-1]) % 3 for key in keys)]).cumsum(0)
        rows = {"txt/text": torch.ones(int(lengths[-1]), 4), "txt/text.offsets": lengths}
        write_embeddings(tmp_path / "text", tar.stem, keys, rows, {})
    shards = Shards(folder, SMALL, embeddings={"text": Embeddings(tmp_path / "text")})
    (batch,) = loader(shards, 24, batches=1)
    assert batch["text"].shape == (24, 3, 4)
    assert batch["text_mask"].sum(1).tolist() == [1 + int(key[-1]) % 3 for key in batch["key"]]
    assert torch.equal(batch["text"], batch["text_mask"][..., None].expand(24, 3, 4).float())


def test_a_sample_without_embedding_is_a_bad_one_and_the_order_stays(folder, tmp_path):
    store = embedded(folder, tmp_path / "clip", lacking=["000010003"])
    whole, shards = Shards(folder, SMALL), Shards(folder, SMALL, embeddings={"clip": store})
    (batch,) = loader(shards, 24, batches=1)
    (skip,) = batch["skipped"]
    assert (skip.key, skip.reason) == ("train-00001/000010003", "no embedding")
    expected = keys(whole, range(24))
    assert expected[skip.sample] == skip.key
    expected[skip.sample] = expected[(skip.sample + 1) % 24]
    assert batch["key"] == expected


def test_missing_or_unsafe_embeddings_name_the_command(folder, tmp_path):
    command = "`cascade data precompute`"
    with pytest.raises(UserError, match=f"lacks 2 of 2 shards, such as train-00000: run {command}"):
        Shards(folder, SMALL, embeddings={"clip": Embeddings(tmp_path / "missing")})
    embedded(folder, tmp_path / "clip")
    path = tmp_path / "clip" / "train-00000.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=f"missing or broken: run {command}"):
        Embeddings(tmp_path / "clip").row("train-00000", "000000000")
    with pytest.raises(ValueError, match="one for each row"):
        write_embeddings(tmp_path, "x", ["a", "b"], {"clip_image": torch.zeros(3, 2)}, {})


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_decodes_once_for_all_workers(folder, workers, monkeypatch):
    plain = [Shards(folder, SMALL)[n] for n in range(48)]
    shards = Shards(folder, SMALL, cache=True)
    list(loader(shards, 12, batches=2, workers=workers))
    monkeypatch.setattr(items, "decode", lambda *_: pytest.fail("decoded again"))
    for n in range(48):
        assert torch.equal(shards[n]["image_8"], plain[n]["image_8"])
        assert shards[n]["key"] == plain[n]["key"]


def test_a_set_too_large_for_the_cache_is_read_as_before(folder, monkeypatch, caplog):
    monkeypatch.setattr(module, "CACHE_BYTES", 1000)
    assert_paired(Shards(folder, SMALL, cache=True))
    assert "24 pictures of 8 px" in caplog.text


# What img2dataset says of a picture

TURNS = {
    "Horizontal (normal)": lambda x: x,
    "Mirrored horizontal": np.fliplr,
    "Rotated 180": lambda x: np.rot90(x, 2),
    "Mirrored vertical": np.flipud,
    "Mirrored horizontal then rotated 90 CCW": lambda x: np.rot90(np.fliplr(x), 1),
    "Rotated 90 CW": lambda x: np.rot90(x, -1),
    "Mirrored horizontal then rotated 90 CW": lambda x: np.rot90(np.fliplr(x), -1),
    "Rotated 90 CCW": lambda x: np.rot90(x, 1),
}


def saved(pixels, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def test_a_picture_is_turned_as_its_json_says_and_never_twice(tmp_path):
    """img2dataset drops the EXIF of what it encodes, and keeps it, in exifread's words, in JSON."""
    stored = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    own, words = saved(stored, exif=exif), [*TURNS, "Rotated 90 CW", "Rotated 90 CW", "nonsense"]
    members, right = [], [turn(stored) for turn in TURNS.values()]
    right += [np.rot90(stored, -1), stored, stored, stored]
    for n, word in enumerate([*words, None]):
        about = json.dumps({"Thumbnail Orientation": "Rotated 180", "Image Orientation": word})
        fields = json.dumps(
            {"exif": about if word != "nonsense" else 7, "note": "Image Orientation"}
        )
        exif[0x0112] = 1  # "as it is": the file says so itself
        data = own if n == 8 else saved(stored, exif=exif) if n == 9 else saved(stored)
        fields = fields if word else '{"exif": "Image Orientation'
        members += [
            (f"{n:02d}.png", data),
            (f"{n:02d}.txt", b"x"),
            (f"{n:02d}.json", fields.encode()),
        ]
    tar = write(tmp_path / "00000.tar", members)
    for cache in (False, True):
        shards = Shards(tmp_path, SMALL, shuffle=False, cache=cache)
        for n, picture in enumerate(right):
            found = (shards[n]["image_8"].permute(1, 2, 0).numpy() + 1) * 127.5
            assert np.abs(found - picture).max() < 0.5, (n, words[n : n + 1])
    streamed = list(Stream(str(tar), SMALL, False, shuffle=False).items(range(len(right))))
    make = partial(_captioned_picture, captions=["txt"], size=8)
    seen = [one for batch in made_of(tar, {"txt"}, make) for one in batch]
    for n, item in enumerate(streamed):
        assert torch.equal(item["image_8"], shards[n]["image_8"])
        assert torch.equal(seen[n][1], shards[n]["image_8"])


def test_nearly_white_pictures_are_warned_of_before_a_training(tmp_path, caplog):
    white = np.full((8, 8, 3), 255, np.uint8)
    pictures = [saved(white) if n in (2, 5) else picture(n) for n in range(8)]
    members = [
        m for n, data in enumerate(pictures) for m in ((f"{n}.png", data), (f"{n}.txt", b"x"))
    ]
    write(tmp_path / "00000.tar", members)
    Shards(tmp_path, SMALL).check(4)
    assert "2 of 8 pictures are nearly all white, such as 00000/2" in caplog.text

"""Claims about packing: what goes in comes out, what cannot is named, splits never meet."""

import csv
import errno
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from cascade.cli import main
from cascade.data import listing
from cascade.data import pack as module
from cascade.data.listing import columns, rows_of_table, table, texts_beside, usable
from cascade.data.pack import Row, fitted, held_out, pack
from cascade.data.shards import Shards
from cascade.data.transforms import BadSample, Pictures
from cascade.errors import UserError

SMALL = Pictures((8,))


def picture(i, form="JPEG", size=(24, 16), **options):
    """A file that is unlike that of any other number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(256, size=(*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Thirty pictures and a CSV of their captions."""
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    with (tmp_path / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "long_caption"])
        for i in range(30):
            name = f"below/{i}.v2.jpg" if i % 3 else f"{i}.png"
            form = "JPEG" if i % 3 else "PNG"
            (tmp_path / "pictures" / name).write_bytes(picture(i, form))
            writer.writerow([name, f" picture, number\n{i} ", f"long “{i}”" if i % 2 else ""])
    return tmp_path


def packed(folder, *options, captions="list.csv", out="out"):
    given = ["--captions", str(folder / captions)] if captions else []
    argv = ["data", "pack", str(folder / out), "--pictures", str(folder / "pictures"), *given]
    return main([*argv, *options])


def members(path):
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def samples(folder, split="*", out="out"):
    """Key, picture, caption and JSON of all samples."""
    found = []
    for path in sorted((folder / out).glob(f"{split}-*.tar")):
        files = members(path)
        for key in dict.fromkeys(name.split(".")[0] for name in files):
            own = {n.split(".", 1)[1]: files[n] for n in files if n.startswith(key)}
            fields = json.loads(own.pop("json"))
            found.append((key, own.pop("txt").decode(), fields, own))
    return found


def test_pictures_are_copied_byte_for_byte_with_their_captions(folder, capsys):
    assert packed(folder, "--val", "6", "--per-shard", "10") == 0
    assert "holds 30 pictures; 0 were left out" in capsys.readouterr().out
    names = sorted(path.name for path in (folder / "out").glob("*.tar"))
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"]
    found = samples(folder)
    assert sorted(key for key, *_ in found) == [f"{n:09d}" for n in range(30)]
    for key, caption, fields, own in found:
        i = int(fields["file"].split("/")[-1].split(".")[0])
        assert own == {fields["file"][-3:]: picture(i, "JPEG" if i % 3 else "PNG")}
        assert caption == fields["caption"] == f"picture, number {i}"
        assert fields.get("long_caption") == (f"long “{i}”" if i % 2 else None)
        assert fields["key"] == key
        assert (fields["width"], fields["height"]) == (24, 16)
    train, val = Shards(folder / "out", SMALL), Shards(folder / "out", SMALL, split="val")
    assert (len(train), len(val)) == (24, 6)


def test_splits_are_disjoint_and_the_order_is_one_of_the_seed(folder):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert packed(folder, "--val", "0.2", "--seed", str(seed), out=out) == 0
    for name in ("train-00000.tar", "val-00000.tar"):
        a, b, c = ((folder / out / name).read_bytes() for out in "abc")
        assert a == b != c
    train, val = ({f["file"] for _, _, f, _ in samples(folder, s, "a")} for s in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (24, 6, 0)
    listed = [row["file_name"] for row in table(folder / "list.csv")]
    assert [f["file"] for _, _, f, _ in samples(folder, "train", "a")] != listed[:24]


def test_what_cannot_be_packed_is_counted_by_reason_with_an_example(folder, monkeypatch, capsys):
    inside = folder / "pictures"
    (inside / "html.jpg").write_bytes(b"<html>404</html>")
    (inside / "cut.jpg").write_bytes(picture(50)[:-300])
    (inside / "twin.jpg").write_bytes(picture(1))
    (inside / "huge.png").write_bytes(picture(51, "PNG", (60, 60)))
    (inside / "alone.png").write_bytes(picture(52, "PNG"))
    (inside / "long.png").write_bytes(picture(55, "PNG"))
    (inside / "a.gif").write_bytes(picture(53, "GIF"))
    (folder / "private.png").write_bytes(picture(54, "PNG"))
    (inside / "link").mkdir()
    rows = ["html.jpg", "cut.jpg", "twin.jpg", "huge.png", "gone.jpg", "0.png", "./0.png", "a.gif"]
    rows += ["../private.png", str(folder / "private.png"), "link", "\0", ""]
    with (folder / "list.csv").open("a") as file:
        file.writelines(f'"{name}",a caption,\n' for name in rows)
        file.write("alone.png, ,\n")
        file.write(f"long.png,{'x' * 20},{'y' * 21}\n")
    monkeypatch.setitem(module.LIMITS, "picture", 8000)
    monkeypatch.setattr(listing, "MAX_CAPTIONS", 40)
    assert packed(folder, "--val", "0") == 0
    shown = capsys.readouterr().out
    want = {
        "broken picture": ["a.gif", "cut.jpg", "html.jpg"],
        "huge picture": ["huge.png"],
        "duplicate": ["./0.png", "0.png", "twin.jpg"],
        "missing file": ["", "\0", "gone.jpg", "link"],
        "outside of the folder": ["../private.png", str(folder / "private.png")],
        "no caption": ["alone.png"],
        "huge caption": ["long.png"],
    }
    for reason, names in want.items():
        (line,) = [line for line in shown.splitlines() if reason in line]
        assert f" {len(names)} " in line
    assert "holds 30 pictures; 15 were left out" in shown
    stats = json.loads((folder / "out" / "train-00000_stats.json").read_text())
    assert stats["pictures"] == 30
    late = {reason: sorted(names) for reason, names in stats["refused"].items()}
    assert late == {reason: want[reason] for reason in ("broken picture", "huge picture")}
    assert len(Shards(folder / "out", SMALL)) == 30


def test_an_interrupted_call_goes_on_and_writes_only_what_is_missing(folder, monkeypatch, capsys):
    (folder / "pictures" / "0.png").write_bytes(b"no picture")
    options = ("--val", "5", "--per-shard", "5")
    assert packed(folder, *options, out="whole") == 0
    first = capsys.readouterr().out
    wrote, fit = [], module.fitted

    def interrupted(data, short):
        wrote.append(data)
        if len(wrote) == 12:
            raise KeyboardInterrupt
        return fit(data, short)

    monkeypatch.setattr(module, "_AHEAD", 1)
    monkeypatch.setattr(module, "fitted", interrupted)
    assert packed(folder, *options) == 130
    names = sorted(path.name for path in (folder / "out").iterdir())
    assert [n for n in names if n.endswith(".tar")] == ["train-00000.tar", "val-00000.tar"]
    before = {n: (folder / "out" / n).stat().st_mtime_ns for n in names}
    del wrote[:]

    def watched(data, short):
        wrote.append(data)
        return fit(data, short)

    monkeypatch.setattr(module, "fitted", watched)
    assert packed(folder, *options) == 0
    assert len(wrote) == 20
    assert {n: (folder / "out" / n).stat().st_mtime_ns for n in names} == before
    assert packed(folder, *options) == 0
    assert len(wrote) == 20
    again = capsys.readouterr().out.splitlines()[-1]
    assert again.split(" holds ")[1] == first.splitlines()[-1].split(" holds ")[1]
    for path in (folder / "whole").iterdir():
        assert (folder / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((folder / "out").iterdir())) == len(list((folder / "whole").iterdir()))


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(folder, monkeypatch, capsys):
    assert packed(folder, "--per-shard", "10", out="whole") == 0
    fit, made = module.fitted, []

    def full(data, short):
        made.append(data)
        if len(made) == 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        return fit(data, short)

    monkeypatch.setattr(module, "_made", lambda row, short: full(row.path.read_bytes(), short))
    assert packed(folder, "--per-shard", "10") == 2
    assert "cannot write to" in (error := capsys.readouterr().err.strip().splitlines()[-1])
    assert "No space left on device" in error
    left = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert left.items() < {p.name: p.read_bytes() for p in (folder / "whole").iterdir()}.items()


def test_another_list_or_choice_is_refused_and_nothing_is_overwritten(folder, capsys):
    assert packed(folder) == 0
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    (folder / "shorter.csv").write_text("file,text\n0.png,nothing\n3.png,nothing else\n")
    for options, captions, says in (
        (("--val", "5"), "list.csv", "another val"),
        (("--seed", "5"), "list.csv", "another seed"),
        (("--size", "8"), "list.csv", "another size"),
        (("--val", "1"), "shorter.csv", "another pictures and another list"),
    ):
        assert packed(folder, *options, captions=captions) == 2
        assert says in capsys.readouterr().err
    (folder / "pictures" / "0.png").write_bytes(picture(99, "PNG") + b"longer")
    assert packed(folder) == 2
    assert "another list: choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / "out").iterdir()} == before
    shutil.copytree(folder / "out", folder / "theirs", ignore=lambda *_: {"pack.json"})
    assert packed(folder, out="theirs") == 2
    assert "holds other shards" in capsys.readouterr().err


def test_larger_pictures_become_smaller_and_smaller_ones_stay(tmp_path):
    assert fitted(picture(0), 16) == fitted(picture(0)) == ("jpg", picture(0), (24, 16), (24, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    for form, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        got = fitted(picture(1, form, (60, 40), exif=exif), 20)
        assert (got.extension, got.size, got.original) == (extension, (20, 30), (60, 40))
        image = Image.open(io.BytesIO(got.data))
        assert (image.format, image.size, image.mode) == (form, (20, 30), "RGB")
        assert image.getexif().get(0x0112, 1) == 1
    file = io.BytesIO()
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(file, "PNG")
    clear = Image.open(io.BytesIO(fitted(file.getvalue(), 20).data))
    assert np.asarray(clear).min() == 255  # laid on white
    with pytest.raises(BadSample, match="broken picture"):
        fitted(picture(1)[:-200], 8)


def test_without_a_list_the_text_beside_a_picture_is_its_caption(folder, capsys):
    for i in range(0, 30, 3):
        (folder / "pictures" / f"{i}.txt").write_text(f"\ufeffbeside\n {i}\n", encoding="utf-8")
    (folder / "pictures" / "0.txt").write_bytes(b"\xff\xfe")
    assert packed(folder, "--val", "0", captions=None) == 0
    assert "holds 9 pictures; 21 were left out" in capsys.readouterr().out
    for _, caption, fields, _ in samples(folder):
        assert caption == fields["caption"] == f"beside {fields['file'][:-4]}"
    assert [name for name, _ in texts_beside(folder / "pictures")][:2] == ["0.png", "12.png"]


def test_csv_tsv_and_jsonl_are_one_table(folder):
    rows = table(folder / "list.csv")
    assert len(rows) == 30
    with (folder / "list.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([rows[0].keys(), *(r.values() for r in rows)])
    lines = [json.dumps(row) for row in rows]
    (folder / "list.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert table(folder / "list.tsv") == table(folder / "list.jsonl") == rows
    (folder / "odd.jsonl").write_text('{"file": "a", "text": "half \\ud800"}\n{"file": 3}\n')
    odd = list(rows_of_table(table(folder / "odd.jsonl"), "file", ["text"]))
    assert odd == [("a", {"text": "half ?"}), ("3", {})]


def test_parquet_is_a_table_too(folder):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = table(folder / "list.csv")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "list.parquet")
    assert table(folder / "list.parquet") == rows


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (folder / "list.parquet").write_bytes(b"PAR1")
    assert packed(folder, captions="list.parquet") == 2
    error = capsys.readouterr().err
    assert "pip install cascade-diffusion[parquet]" in error
    assert error.count("\n") == 1


def test_columns_are_found_by_common_names_or_given():
    def of(names, *given):
        return columns([dict.fromkeys(names.split(), "x")], *given)

    assert of("file_name text") == ("file_name", ["text"])
    assert of("id Image Caption long_caption score") == ("Image", ["Caption", "long_caption"])
    assert of("path caption_1 caption_2 context text_color") == ("path", ["caption_1", "caption_2"])
    assert of("a b c", "c", ["b", "a"]) == ("c", ["b", "a"])
    assert columns([{"file": "x"}, {"file": "y", "prompt": "z"}]) == ("file", ["prompt"])
    for names, given, says in (
        ("url caption", (), "no column for a file among url, caption"),
        ("file mood", (), "no column for a caption among file, mood"),
        ("file caption", ("name",), "no column for name"),
        ("file caption", (None, ["caption", "b"]), "no column for b"),
    ):
        with pytest.raises(UserError, match=says):
            of(names, *given)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("list.xlsx", b"", "ends in .csv, .tsv, .jsonl, .parquet"),
        ("list.csv", None, "cannot read"),
        ("list.csv", b"file,caption\n", "no rows"),
        ("list.csv", b"file,caption\na.jpg,red, green\n", "line 2 has 3 fields, the header 2"),
        ("list.csv", b'file,caption\na.jpg,"red" "green"\n', "damaged"),
        ("list.csv", b'file,caption\na.jpg,"red\nb.jpg,green\n', "damaged"),
        ("list.csv", "file,caption\na.jpg,Übung\n".encode("latin-1"), "not UTF-8"),
        ("list.jsonl", b'{"file": "a"}\n{"file": \n', "line 2"),
        ("list.jsonl", b'["a"]\n', "line 1 is not an object"),
        ("list.csv", b"file,caption\ngone.jpg,a\n", "no picture to pack: 1 were left out"),
        ("list.csv", b"file,key_caption,key\n0.png,a,b\n", None),
    ],
)
def test_a_bad_list_is_refused_in_one_line(folder, capsys, name, data, says):
    (folder / name).unlink(missing_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
    code = packed(folder, "--val", "0", captions=name)
    error = capsys.readouterr().err.strip().splitlines()
    assert code == (2 if says else 0)
    assert not says or says in error[-1]
    assert not (folder / "out").exists() or not says


def test_how_many_are_held_out_is_a_number_or_a_share(tmp_path):
    assert [held_out(v, 200) for v in ("0", "7", "0.01", "0.0", "0.501")] == [0, 7, 2, 0, 101]
    assert held_out("0.01", 20) == 1
    for val in ("200", "-1", "1.0", "-0.1", "many", "0.x"):
        with pytest.raises(UserError, match="below 200 or a share"):
            held_out(val, 200)
    row = Row("a.png", tmp_path / "a.png", 1, {"key": "a caption"})
    with pytest.raises(UserError, match="called key, as a field of ours"):
        pack([row], tmp_path / "out", 0, None, 10, 0)


def test_rows_of_equal_size_are_compared_by_content(tmp_path):
    for name, data in (("a.png", b"12"), ("b.png", b"34"), ("c.png", b"12"), ("d.png", b"567")):
        (tmp_path / name).write_bytes(data)
    seen = []
    named = [(f"{n}.png", {"text": n}) for n in "abcd"]
    rows, refused = usable(tmp_path, named, lambda *counts: seen.append(counts))
    assert [row.name for row in rows] == ["a.png", "b.png", "d.png"]
    assert refused == {"duplicate": ["c.png"]}
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def write(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_what_img2dataset_wrote_is_read_as_it_is(tmp_path):
    """Shards without a split's name; rows that could not be fetched are in the parquet alone."""

    def key(i):
        return f"{i // 8:05d}/{i // 8:05d}{i % 8:04d}"

    for shard in range(2):
        files = {}
        for index in range(0, 8, 1 + shard):  # of the second shard each other row failed
            i = 8 * shard + index
            name = key(i)[6:]
            fields = {"key": name, "caption": f"number {i}", "status": "success", "url": "http://x"}
            files[f"{name}.jpg"] = picture(i)
            files[f"{name}.json"] = json.dumps({**fields, "error_message": None}).encode()
            files[f"{name}.txt"] = f"number {i}".encode()
        write(tmp_path / f"{shard:05d}.tar", files)
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1 keys of all rows PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text('{"count": 8, "successes": 4}')
    for split in ("train", "all"):
        shards = Shards(tmp_path, SMALL, split=split, shuffle=False, json_fields=("status",))
        items = [shards[n] for n in range(len(shards))]
        want = [i for i in range(16) if i < 8 or i % 2 == 0]
        assert [item["caption"] for item in items] == [f"number {i}" for i in want]
        assert [item["key"] for item in items] == [key(i) for i in want]
        for item, i in zip(items, want):
            pixels = SMALL(picture(i), np.random.default_rng())["image_8"]
            assert (item["image_8"] == pixels).all()
            assert item["status"] == "success"
    fields = Shards(tmp_path, SMALL, captions={"caption": 1.0})
    assert {fields[n]["caption"] for n in range(12)} == {f"number {i}" for i in want}

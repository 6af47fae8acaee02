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
from cascade.data.shards import Shards
from cascade.data.tars import listing
from cascade.data.tars import pack as module
from cascade.data.tars.listing import captioned_by_files, usable
from cascade.data.tars.pack import Row, fitted, held_out, pack
from cascade.data.transforms import BadSample, Pictures
from cascade.errors import UserError
from cascade.formats.tables import columns, rows_of_table, table

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


BOTH = ("--caption-columns", "caption,long_caption")


def packed(folder, *options, captions="list.csv", out="out", columns=BOTH):
    given = ["--captions", str(folder / captions), *columns] if captions else []
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
        "broken picture": ["cut.jpg", "html.jpg"],
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
    assert "holds 31 pictures; 14 were left out" in shown
    stats = json.loads((folder / "out" / "train-00000_stats.json").read_text())
    assert stats["pictures"] == 31
    late = {reason: sorted(names) for reason, names in stats["refused"].items()}
    assert late == {reason: want[reason] for reason in ("broken picture", "huge picture")}
    assert len(Shards(folder / "out", SMALL)) == 31


def frames(form):
    file = io.BytesIO()
    one, *more = [Image.fromarray(np.full((9, 9), 60 * i, np.uint8)) for i in range(3)]
    one.save(file, form, save_all=True, append_images=more)
    return file.getvalue()


def test_every_picture_of_a_folder_is_packed_or_named(tmp_path, capsys):
    same = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "JFIF": "JPEG", "png": "PNG"}
    made_png = {"bmp": "BMP", "dib": "BMP", "tif": "TIFF", "TIFF": "TIFF", "ppm": "PPM"}
    made_png |= {"jp2": "JPEG2000", "": "BMP"}
    (tmp_path / "pictures").mkdir()
    files = {f"{end}1.{end}": picture(n, form) for n, (end, form) in enumerate(same.items())}
    for n, (end, form) in enumerate(made_png.items()):
        files[f"{n}.{end}".rstrip(".")] = picture(50 + n, form)
    files |= {"a.gif": frames("GIF"), "b.tif": frames("TIFF"), "c.nef": picture(62, "TIFF")}
    files |= {
        "d.svg": b"<svg/>",
        "e.bin": b"\0\0\0\x18ftypheic\0\0\0\0",
        "one.gif": picture(9, "GIF"),
    }
    files |= {"f.avif": picture(60, "AVIF"), "w.webp": picture(61, "WEBP")}
    for name, data in files.items():
        (tmp_path / "pictures" / name).write_bytes(data)
        (tmp_path / "pictures" / name).with_suffix(".txt").write_text(name)
    for name in ("Thumbs.db", ".DS_Store", "._jpg1.jpg", "notes.md"):
        (tmp_path / "pictures" / name).write_bytes(b"\0\5\x16\7 no picture")
    assert packed(tmp_path, "--val", "0", captions=None) == 0
    shown = capsys.readouterr().out
    assert f"holds {len(files) - 5} pictures; 5 were left out" in shown
    for reason, count in (("several pictures", 2), ("format that is not read", 3)):
        (line,) = [line for line in shown.splitlines() if reason in line]
        assert f" {count} " in line
    found = {fields["file"]: own for _, _, fields, own in samples(tmp_path)}
    for name, own in found.items():
        ((extension, data),) = own.items()
        if extension == "png" and not name.endswith("png"):
            with Image.open(io.BytesIO(files[name])) as image:
                want = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), want)
        else:
            assert data == files[name]
            assert extension == {"w.webp": "webp", "png1.png": "png"}.get(name, "jpg")
    assert len(Shards(tmp_path / "out", SMALL)) == len(found)


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

    monkeypatch.setattr(module, "made", lambda row, short: full(row.path.read_bytes(), short))
    assert packed(folder, "--per-shard", "10") == 2
    assert "cannot write to" in (error := capsys.readouterr().err.strip().splitlines()[-1])
    assert "No space left on device" in error
    left = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert left.items() < {p.name: p.read_bytes() for p in (folder / "whole").iterdir()}.items()


def test_another_list_or_choice_is_refused_and_nothing_is_overwritten(folder, capsys):
    assert packed(folder) == 0
    before = {path: path.read_bytes() for path in (folder / "out").iterdir()}
    (folder / "shorter.csv").write_text("file,text\n0.png,nothing\n3.png,nothing else\n")
    for options, captions, given, says in (
        (("--val", "5"), "list.csv", BOTH, "another val"),
        (("--seed", "5"), "list.csv", BOTH, "another seed"),
        (("--size", "8"), "list.csv", BOTH, "another size"),
        (("--val", "1"), "shorter.csv", (), "another pictures and another list"),
        ((), "list.csv", (*BOTH[:1], "caption"), "give the --caption-columns that it was made"),
    ):
        assert packed(folder, *options, captions=captions, columns=given) == 2
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
    (folder / "pictures" / "0.txt").write_bytes("beside\n 0".encode("utf-16"))
    (folder / "pictures" / "3.txt").write_bytes("Übung".encode("cp1252"))
    (folder / "pictures" / "6.txt").write_bytes(b"\xff\xfe")
    assert packed(folder, "--val", "0", captions=None) == 0
    said = capsys.readouterr().out
    assert "8 texts have several lines" in said
    assert "holds 8 pictures; 22 were left out" in said
    assert "caption is not UTF-8, perhaps CP1252" in " ".join(said.split())
    for _, caption, fields, _ in samples(folder):
        assert caption == fields["caption"] == f"beside {fields['file'][:-4]}"
    assert [name for name, _ in captioned_by_files(folder / "pictures")][:2] == ["0.png", "12.png"]
    assert packed(folder, "--val", "0", "--lines", captions=None, out="lines") == 0
    for _, caption, fields, _ in samples(folder, out="lines"):
        assert (caption, fields["caption"]) == ("beside", ["beside", fields["file"][:-4]])


def test_csv_tsv_and_jsonl_are_one_table(folder):
    rows = table(folder / "list.csv")
    assert len(rows) == 30
    with (folder / "list.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([rows[0].keys(), *(r.values() for r in rows)])
    lines = [json.dumps(row) for row in rows]
    (folder / "list.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    assert table(folder / "list.tsv") == table(folder / "list.jsonl") == rows
    (folder / "empty.tsv").write_text('file\n""\n')  # so a CSV writer has an empty value
    assert table(folder / "empty.tsv") == [{"file": ""}]
    (folder / "odd.jsonl").write_text('{"file": "a", "text": "half \\ud800"}\n{"file": 3}\n')
    odd = list(rows_of_table(table(folder / "odd.jsonl"), "file", ["text"]))
    assert odd == [("a", {"text": "half ?"}), ("3", {})]


def test_parquet_is_a_table_too(folder):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = table(folder / "list.csv")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "list.parquet")
    assert table(folder / "list.parquet") == rows


@pytest.fixture
def hub(tmp_path):
    """Two files as `datasets` writes them: structs of bytes and path, in row groups of four."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    (tmp_path / "data").mkdir()
    for part in range(2):
        numbers = range(10 * part, 10 * part + 10)
        images = [
            {"bytes": picture(n, "PNG" if n % 3 else "JPEG"), "path": f"{n}.x"} for n in numbers
        ]
        images[3]["path"] = None
        images[4] = None
        images[5] = {"bytes": None, "path": "beside.png"}
        columns = {"image": pyarrow.array(images, kind), "text": [f"number {n}" for n in numbers]}
        columns["mask"] = [[{"bytes": b"x" * 9}]] * 10
        file = tmp_path / "data" / f"train-{part:05d}-of-00002.parquet"
        parquet.write_table(pyarrow.table(columns), file, row_group_size=4)
    (tmp_path / "data" / "beside.png").write_bytes(picture(99, "PNG"))
    return tmp_path


@pytest.mark.parametrize("name", ["data", "data/train-00000-of-00002.parquet"])
def test_pictures_that_lie_in_parquet_are_packed(hub, name, monkeypatch, capsys):
    monkeypatch.setattr("cascade.formats.parquet._ROWS", 3)
    count = 20 if name == "data" else 10
    assert (
        main(["data", "pack", str(hub / "out"), "--captions", str(hub / name), "--val", "2"]) == 0
    )
    shown = capsys.readouterr().out
    lost = count // 10 + (count == 20)  # a row without a picture each, and one picture twice
    assert f"holds {count - lost} pictures; {lost} were left out" in shown
    assert "bytes" not in shown
    found = samples(hub)
    assert len(found) == count - lost
    for _, caption, fields, own in found:
        n = int(caption.split()[1])
        data = picture(n, "PNG" if n % 3 else "JPEG") if n % 10 != 5 else picture(99, "PNG")
        assert own == {"png" if n % 3 or n == 15 else "jpg": data}
        if n % 10 not in (3, 5):
            assert fields["file"] == f"{n}.x"
    assert not [path for path in hub.iterdir() if path.name not in ("data", "out")]


def test_of_two_columns_of_pictures_one_is_named(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    columns = {"photo": [picture(0)], "sketch": [picture(1)], "caption": ["one"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    (tmp_path / "pictures").mkdir()
    assert packed(tmp_path, "--val", "0", captions="list.parquet", columns=()) == 2
    assert "columns photo, sketch hold pictures: choose one" in capsys.readouterr().err
    own = ["--val", "0", "--file-column", "sketch"]
    assert packed(tmp_path, *own, captions="list.parquet", columns=()) == 0
    ((_, caption, fields, own),) = samples(tmp_path)
    assert (caption, own, fields["file"]) == ("one", {"jpg": picture(1)}, "list.parquet: row 1")


PARTS = [[("a.png", ["one", "two"]), ("b.png", ["one"])], [("c.png", []), ("d.png", ["three"])]]


@pytest.fixture
def parts(tmp_path):
    """Parts of one table as Hugging Face writes them, with a list of captions in each row."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    (tmp_path / "data").mkdir()
    for i, rows in enumerate(PARTS):
        found = [{"file_name": name, "captions": texts} for name, texts in rows]
        schema = pyarrow.schema(
            [("file_name", pyarrow.string()), ("captions", pyarrow.list_(pyarrow.string()))]
        )
        path = tmp_path / "data" / f"train-{i:05d}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(found, schema), path)
    return tmp_path / "data"


def test_parts_of_a_parquet_table_are_one_table(parts):
    want = [{"file_name": name, "captions": texts} for rows in PARTS for name, texts in rows]
    assert table(parts) == table(parts / "train-*.parquet") == want
    assert table(parts / "train-00001-of-00002.parquet") == want[2:]
    found = list(rows_of_table(want, *columns(want)))
    assert [texts for _, texts in found] == [
        {"captions": ["one", "two"]},
        {"captions": "one"},
        {},
        {"captions": "three"},
    ]
    shutil.copy(parts / "train-00000-of-00002.parquet", parts / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="tables of test and train: give one of them"):
        table(parts)
    (parts / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 parts: fetch part 0"):
        table(parts / "train-*")
    with pytest.raises(UserError, match="has no table"):
        table(parts / "val-*")
    (odd := parts / "a[1].csv").write_text("file,caption\na.png,a\n")  # a name, and no pattern
    assert table(odd) == [{"file": "a.png", "caption": "a"}]


def test_pictures_in_a_column_are_never_printed(folder, capsys):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    rows = [{"image": {"bytes": bytes(2**20), "path": f"{i}.png"}, "text": "a"} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "list.parquet")
    with pytest.raises(UserError, match="no column for image among text") as caught:
        columns(table(folder / "list.parquet"), "image")
    assert len(str(caught.value)) < 500
    (folder / "list.csv").write_text(f"caption,file\n0.png,{'red ' * 10_000}\n")
    assert packed(folder, columns=()) == 2
    assert sum(map(len, capsys.readouterr())) < 4000
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    parquet.write_table(twice, folder / "list.parquet")
    with pytest.raises(UserError, match="two columns are called text"):
        table(folder / "list.parquet")


def test_several_captions_of_a_picture_stay_apart(folder, capsys):
    rows = [{"file": f"{i}.png", "text": [f"first {i}", f"second\n{i}"]} for i in range(0, 30, 3)]
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert packed(folder, "--val", "0", captions="list.jsonl", columns=()) == 0
    assert "'+data.captions={text: 1}' +data.several=drawn" in capsys.readouterr().out
    for _, caption, fields, _ in samples(folder):
        i = fields["file"][:-4]
        assert caption == fields["caption"] == f"first {i}"
        assert fields["text"] == [f"first {i}", f"second {i}"]
    shards = Shards(folder / "out", SMALL, captions={"text": 1.0}, several="drawn")
    assert {shards[n]["caption"].split()[0] for n in range(40)} == {"first", "second"}


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (folder / "list.parquet").write_bytes(b"PAR1")
    assert packed(folder, captions="list.parquet", columns=()) == 2
    error = capsys.readouterr().err
    assert "pip install cascade-diffusion[parquet]" in error
    assert error.count("\n") == 1


def test_columns_are_found_by_common_names_or_given():
    def of(names, *given):
        return columns([dict.fromkeys(names.split(), "x")], *given)

    assert of("file_name text") == ("file_name", ["text"])
    assert of("id Image Caption context text_color score") == ("Image", ["Caption"])
    assert of("a b c", "c", ["b", "a"]) == ("c", ["b", "a"])
    assert columns([{"file": "x"}, {"file": "y", "prompt": "z"}]) == ("file", ["prompt"])
    # Sets as they are published: LAION, DiffusionDB, a set of prompts, one with flags and numbers.
    assert of("URL TEXT image_path WIDTH similarity") == ("image_path", ["TEXT"])
    assert of("image_name prompt part_id seed cfg", "image_name") == ("image_name", ["prompt"])
    assert of("file caption num_captions has_text negative_prompt") == ("file", ["caption"])
    assert of("file caption re_caption llava_caption caption_2") == ("file", ["caption"])
    flags = [{"file": "a", "text": True, "caption": "x", "title": 3}]
    assert columns(flags) == ("file", ["caption"])
    assert columns([{"file": "a", "captions": ["x", "y"]}]) == ("file", ["captions"])
    for names, given, says in (
        ("file num_captions has_text negative_prompt", (), "no column for a caption among"),
        ("file caption long_caption", (), "columns caption, long_caption may all hold captions"),
        ("file Title text description", (), "columns Title, text, description may all"),
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
        ("list.csv", "file,caption\na.jpg,Übung\n".encode("latin-1"), "line 2: not UTF-8"),
        ("list.jsonl", b'{"file": "a"}\n{"file": \n', "line 2"),
        ("list.jsonl", b'["a"]\n', "line 1 is not an object"),
        ("list.csv", b"file,caption\ngone.jpg,a\n", "no picture to pack: 1 were left out"),
        ("list.csv", b"file,text,text\n0.png,a,b\n", "two columns are called text"),
        ("list.tsv", b'file\ttext\n0.png\t"red\ngreen\tblue"\n', "quotes has a line break"),
        ("list.tsv", b"file\ttext\ttext\n0.png\ta\tb\n", "two columns are called text"),
        (
            "list.jsonl",
            b'{"file": "0.png", "text": "a", "text": "b"}',
            "two columns are called text",
        ),
        (
            "list.csv",
            b"file,prompt,text\n0.png,a,b\n",
            "columns prompt, text may all hold captions",
        ),
        ("list.csv", b"file,caption,,\n0.png,a,,\n", None),  # as spreadsheets write it
        ("list.csv", "\ufefffile,caption\n0.png,Übung\n".encode("utf-16-le"), None),
        ("list.csv", b"file,text,key\n0.png,a,b\n", None),
    ],
)
def test_a_bad_list_is_refused_in_one_line(folder, capsys, name, data, says):
    (folder / name).unlink(missing_ok=True)
    if data is not None:
        (folder / name).write_bytes(data)
    code = packed(folder, "--val", "0", captions=name, columns=())
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
    with pytest.raises(UserError, match="called key, a reserved name"):
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

"""Whatever an independent writer wrote is read equal or refused, whatever kind of file it is."""

import csv
import io
import json
import math
import re
from shutil import rmtree

import hypothesis.strategies as st
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file

from cascade.data import rgb, tables
from cascade.data.rgb import BadSample
from cascade.encoders.clip import FrozenCLIP, save_clip
from cascade.encoders.weights import check_tensors, fault, reading, tensors_of
from cascade.errors import UserError
from cascade.eval import captions, prompts
from cascade.eval.generation import Job
from cascade.eval.statistics import Moments
from cascade.kinds import kind_of
from cascade.texts import BadText, decoded, lines, one_line, read
from cascade.verbs.overrides import assigned
from tests.drawn import BROKEN, PLAIN, TEXT, damage, holds, or_refused
from tests.test_clip_sizes import VIT
from tests.test_rgb import on_white, stored

# Texts

MARKED = ["utf-8", "utf-8-sig", "utf-16", "utf-16-be mark"]
OTHERS = ["cp1252", "latin-1", "shift_jis", "utf-32", "utf-16-le", "utf-16-be", "gb18030"]


def encoded(text, codec):
    mark = b"\xfe\xff" if codec.endswith("mark") else b""
    return mark + text.encode(codec.removesuffix(" mark"), errors="ignore")


@holds(300, TEXT, st.sampled_from(MARKED + OTHERS))
def test_text_of_any_codec_is_read_equal_or_refused(folder, text, codec):
    data = encoded(text, codec)
    assume(codec != "utf-8" or not text.startswith("\ufeff"))
    try:
        found = decoded(data)
    except BadText:
        assert codec in OTHERS or "\0" in text
        return
    if codec in MARKED or found != text:
        assert found == (text if codec in MARKED else data.decode("utf-8"))


@holds(100, st.binary())
def test_any_bytes_are_text_or_refused(folder, data):
    (folder / "a.txt").write_bytes(data)
    found = or_refused(read, folder / "a.txt")
    assert (
        found is BROKEN
        or found.encode("utf-8-sig") in (data, b"\xef\xbb\xbf" + data)
        or data[:2] in (b"\xff\xfe", b"\xfe\xff")
    )


@holds(100, st.lists(TEXT.filter(lambda x: "\n" not in x and x[-1:] != "\r")), st.booleans())
def test_lines_are_what_line_feeds_part(folder, texts, carriage):
    end = "\r\n" if carriage else "\n"
    assert lines("".join(text + end for text in texts)) == texts
    assert lines(end.join(texts)) == (texts if texts and texts[-1] else texts[:-1])


@holds(100, st.text(st.characters()))
def test_one_line_has_the_words(folder, text):
    line = one_line(text)
    assert one_line(line) == line
    line.encode()
    words = [w.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for w in text.split()]
    if "\ufffd" not in "".join(words):
        assert line == " ".join(words)


# Tables

HEADER = st.lists(PLAIN.filter(lambda x: x.strip("\"'")), min_size=1, max_size=4, unique=True)


@st.composite
def written(draw, values=TEXT):
    names = draw(HEADER)
    row = st.tuples(*[values] * len(names))
    rows = draw(st.lists(row, min_size=1, max_size=5))
    return names, [dict(zip(names, row)) for row in rows]


def by_csv(path, names, rows, codec="utf-8", **options):
    with open(path, "w", newline="", encoding=codec) as file:
        out = csv.writer(file, **options)
        out.writerows([names, *(row.values() for row in rows)])


@holds(
    100,
    written(),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from([",", "\t"]),
)
def test_a_table_of_the_csv_module_is_read_equal(folder, table, codec, end, quoting, delimiter):
    names, rows = table
    path = folder / ("a.csv" if delimiter == "," else "a.tsv")
    options = {"lineterminator": end, "quoting": quoting, "delimiter": delimiter}
    by_csv(path, names, rows, codec, **options)
    values = "".join(v for row in rows for v in row.values())
    assume("\r" not in values or end == "\r\n" or quoting == csv.QUOTE_ALL)  # not put into quotes
    found = or_refused(tables.table, path)
    odd = "\0" in values or "\0" in "".join(names) or (delimiter == "\t" and "\n" in values)
    assert found == rows or (found is BROKEN and odd)


@holds(100, written(TEXT.filter(lambda x: not set("\t\n\r") & set(x))))
def test_a_table_with_tabs_is_read_equal(folder, table):
    names, rows = table
    text = [names, *(row.values() for row in rows)]
    assume(not names[0].startswith('"') and not any(map("".__eq__, map("".join, text))))
    (folder / "a.tsv").write_text("".join("\t".join(row) + "\n" for row in text), newline="")
    found = or_refused(tables.table, folder / "a.tsv")
    fields = [field for row in text for field in row]
    if any("\0" in f or f.startswith('"') for f in fields):
        assume(not any(f[:1] == f[-1:] == '"' and '""' in f for f in fields))
        assert found in (rows, BROKEN)
    else:
        assert found == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=5,
)


@holds(100, written(JSON), st.booleans())
def test_a_table_of_json_lines_is_read_equal(folder, table, ascii):
    text = "".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in table[1])
    (folder / "a.jsonl").write_text(text, newline="")
    assert or_refused(tables.table, folder / "a.jsonl") in (table[1], BROKEN if "\0" in text else 0)


@holds(
    20, written(TEXT | st.none()) | written(st.integers(-(2**62), 2**62)) | written(st.lists(TEXT))
)
def test_a_table_of_parquet_is_read_equal(folder, table):
    pyarrow.parquet.write_table(pa.Table.from_pylist(table[1]), folder / "a.parquet", 2)
    assert tables.table(folder / "a.parquet") == table[1]


@holds(25, written(), st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), st.integers(0, 3))
def test_two_columns_of_one_name_are_refused(folder, table, ending, place):
    names, rows = table
    names = [*names[:place], names[-1], *names[place:]]
    values = [[row[name] for name in names] for row in rows]
    path = folder / f"a{ending}"
    if ending == ".parquet":
        columns = [pa.array(column) for column in zip(*values)]
        pyarrow.parquet.write_table(pa.Table.from_arrays(columns, names), path)
    elif ending == ".jsonl":
        pairs = (
            ", ".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in zip(names, row))
            for row in values
        )
        path.write_text("".join(f"{{{row}}}\n" for row in pairs))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter="\t" if ending == ".tsv" else ",").writerows(
                [names, *values]
            )
    assert or_refused(tables.table, path) is BROKEN


# Prompts and captions

CAPTION = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\r\0"), min_size=1
)
CAPTION = (CAPTION | PLAIN).filter(one_line)
IDS = st.text(st.sampled_from("abc01._-é/ "), min_size=1).filter(lambda x: x.strip() == x)
PAIRS = st.dictionaries(IDS.filter(lambda x: " " not in x), CAPTION, min_size=1, max_size=4)


@holds(100, PAIRS, st.sampled_from(list(tables.READERS)))
def test_prompts_and_captions_are_read_of_the_same_files(folder, pairs, ending):
    path = folder / f"a{ending}"
    rows = [{"id": name, "caption": text} for name, text in pairs.items()]
    if ending == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".txt":
        path.write_text("".join(f"{name}\t{text}\n" for name, text in pairs.items()), newline="")
    else:
        by_csv(path, ["id", "caption"], rows, delimiter="\t" if ending == ".tsv" else ",")
    expected = [one_line(text) for text in pairs.values()]
    read_prompts, found = prompts.read(path), captions.rows_of(path)
    assert [prompt.text for prompt in read_prompts] == expected
    assert [prompt.fields["id"] for prompt in read_prompts] == list(pairs)
    assert [row["caption"] for row in found] == expected
    assert [row["id"] for row in found] == list(pairs)


@holds(
    30, st.lists(TEXT.filter(one_line), min_size=1, max_size=4), st.integers(1, 3), st.booleans()
)
def test_what_is_generated_keeps_ids_and_captions(folder, texts, count, own):
    given = [prompts.Prompt(t, {"id": f"p{i}"} if own else {}) for i, t in enumerate(texts)]
    job = Job(folder / "out", given, prompts.Plain(), count)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in job.rows))
    found = captions.rows_of(folder / "captions.jsonl")
    assert found == job.rows
    assert [row["id"] for row in found] == [name for names in job.ids for name in names]
    assert [row["caption"] for row in found] == [one_line(t) for t in texts for _ in range(count)]


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


# Overrides


@holds(
    300,
    st.text(
        st.sampled_from("ab\\'\"${},=[]()#%&;:~ \té1_0.e|<>!*?^@+-/")
        | st.characters(exclude_categories=["Cs"])
        # `${` is refused, and ??? is OmegaConf's word for what is not given.
    ).filter(lambda x: not re.search(r"[\n\r\0]|\$\{|^\?\?\?$", x)),
)
def test_a_value_that_is_quoted_comes_back(folder, text):
    parser = OverridesParser.create()
    for value in (text, [text, "b"], [text, text]):
        given = parser.parse_override(assigned("key", value)).value()
        assert OmegaConf.create({"key": given})["key"] == value


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

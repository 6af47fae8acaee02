"""What an independent writer wrote is read equal or refused: texts, tables, prompts, overrides."""

import csv
import json
import re

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.parquet
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume
from omegaconf import OmegaConf

from cascade.config.overrides import assigned
from cascade.eval.pictures import captions, prompts
from cascade.eval.pictures.generation import Job
from cascade.formats import tables
from cascade.formats.texts import BadText, decoded, lines, one_line, read
from tests.drawn import BROKEN, PLAIN, TEXT, holds, or_refused

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
    from_prompts, found = prompts.read_prompts(path), captions.rows_of(path)
    assert [prompt.text for prompt in from_prompts] == expected
    assert [prompt.fields["id"] for prompt in from_prompts] == list(pairs)
    assert [row["caption"] for row in found] == expected
    assert [row["id"] for row in found] == list(pairs)


@holds(
    30, st.lists(TEXT.filter(one_line), min_size=1, max_size=4), st.integers(1, 3), st.booleans()
)
def test_what_is_generated_keeps_ids_and_captions(folder, texts, count, own):
    given = [prompts.Prompt(t, {"id": f"p{i}"} if own else {}) for i, t in enumerate(texts)]
    job = Job(folder / "out", given, prompts.LAYOUTS["plain"], count)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in job.rows))
    found = captions.rows_of(folder / "captions.jsonl")
    assert found == job.rows
    assert [row["id"] for row in found] == [name for names in job.ids for name in names]
    assert [row["caption"] for row in found] == [one_line(t) for t in texts for _ in range(count)]


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

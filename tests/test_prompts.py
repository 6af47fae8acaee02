"""Prompt files in the formats that they are published in, and layouts read as scorers read them."""

import csv
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from cascade.eval.pictures import captions
from cascade.eval.pictures.prompts import (
    LAYOUTS,
    Prompt,
    hash_of,
    read_prompts,
)
from tests.hostile import refused

META = [
    {
        "tag": "single_object",
        "include": [{"class": "cow", "count": 1}],
        "prompt": "a photo of a cow",
    },
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
]
FILES = {
    "metadata.jsonl": "".join(json.dumps(row) + "\n" for row in META),
    "PartiPrompts.tsv": "Prompt\tCategory\tChallenge\tNote\n"
    '"G I G G L E" in paint\tIllustrations\tWriting & Symbols\t\n'
    "a cow, a cup\tAnimals\tBasic\tof two\n",
    "drawbench.csv": 'Prompts,Category\nA red car.,Colors\n"A pear, and ""a"" cup.",Conflicting\n',
    "color_val.txt": "a red bench\na green bench and a red cow\n\n",
}
EXPECTED = {
    "metadata.jsonl": [
        ("a photo of a cow", {"tag": "single_object"}),
        ("a photo of two cups", {"tag": "counting"}),
    ],
    "PartiPrompts.tsv": [
        ('"G I G G L E" in paint', {"Category": "Illustrations", "Challenge": "Writing & Symbols"}),
        ("a cow, a cup", {"Category": "Animals", "Challenge": "Basic"}),
    ],
    "drawbench.csv": [
        ("A red car.", {"Category": "Colors"}),
        ('A pear, and "a" cup.', {"Category": "Conflicting"}),
    ],
    "color_val.txt": [("a red bench", {}), ("a green bench and a red cow", {})],
}


@pytest.mark.parametrize("name", FILES)
def test_published_formats_are_read_with_their_categories(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    prompts = read_prompts(tmp_path / name)
    assert [(prompt.text, prompt.categories) for prompt in prompts] == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "\n\n", "no prompt"),
        ("a.tsv", "Name\tCategory\na\tb\n", "no column of prompts"),
        ("a.tsv", "Prompt\tCategory\na\n", "line 2"),
        ("a.csv", "Prompts,Category\n ,b\n", "prompt 1 is empty"),
        ("a.jsonl", "{", "damaged"),
        ("a.txt", None, "cannot read"),
        ("a.png", "a\n", "ends in"),
        ("a.txt", "a red bench\na green cow\tkept apart\n", "line 1 is not an id, a tab and"),
        ("a.txt", "p0\ta\tb\n", "line 1 is not an id, a tab and"),
        ("a.txt", "a red bench\ta note\n", "'a red bench' before a tab is not a unique id"),
        ("a.txt", "p0\ta\np0\tb\n", "'p0' before a tab is not a unique id"),
        ("a.csv", "prompt,text\na,b\n", "columns text and prompt: keep one"),
        ("a.csv", "num_prompts,has_text\n1,b\n", "no column of prompts"),
    ],
)
def test_bad_prompt_files_are_refused(name, text, words, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(lambda: read_prompts(tmp_path / name), words)


def written(name, prompts):
    """A file of prompts with ids, by nobody's reader's rules but those of its form."""
    rows = [{"id": f"p{i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if name.endswith(".csv"):
        file = io.StringIO(newline="")
        csv.DictWriter(file, rows[0]).writerows([dict.fromkeys(rows[0]), *rows])
        return f"id,caption\n{file.getvalue().partition(chr(10))[2]}"
    header = "" if name.endswith(".txt") else "id\tcaption\n"
    return header + "".join(f"{row['id']}\t{row['caption']}\n" for row in rows)


@pytest.mark.parametrize("name", ["a.txt", "a.tsv", "a.csv", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_prompts_stay_whole_and_both_commands_read_them_alike(name, encoding, tmp_path):
    """With what `str.splitlines` takes for an end of a line in each of them; white space is one."""
    between = "\v\f\x1c\x1d\x1e\x85\u2028\u2029" if name != "a.jsonl" else "\x85\u2028\u2029"
    texts = [f'a "red"{s}circle, über {i}' for i, s in enumerate(between)]
    (tmp_path / name).write_bytes(written(name, texts).encode(encoding))
    want = [f'a "red" circle, über {i}' for i in range(len(texts))]
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == want
    rows = captions.rows_of(tmp_path / name)
    assert [(row["id"], row["caption"]) for row in rows] == [
        (f"p{i}", t) for i, t in enumerate(want)
    ]
    kept = [prompt.kept for prompt in read_prompts(tmp_path / name)]
    assert kept == [{"prompt_id": row["id"]} for row in rows]


def test_prompts_alone_stay_whole_too(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\r\n\n c\x85d \ne\rf".encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["a b", "c d", "e f"]
    assert "line 1 is not an id" in refused(lambda: captions.rows_of(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes("ein Frühstück".encode("cp1252"))
    assert "iconv -f CP1252" in refused(
        lambda: read_prompts(tmp_path / "a.txt"), "line 1: not UTF-8"
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"quoting": csv.QUOTE_ALL}, {"quoting": csv.QUOTE_NONE, "quotechar": None}],
)
@pytest.mark.parametrize("texts", [['"giggle"', "a cow"], ['a "cow"', "b"], ["a\nb", "c"], ["a"]])
def test_a_tsv_is_read_as_it_was_written_whether_quotes_are_letters_or_not(
    options, texts, tmp_path
):
    if "quotechar" in options:  # such a file has no way to write a line feed
        texts = [text.replace("\n", " ") for text in texts]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t", **options)
        table.writerows([["Prompt", "Category"], *([text, "x"] for text in texts)])
    found = [prompt.text for prompt in read_prompts(tmp_path / "a.tsv")]
    assert found == [text.replace("\n", " ") for text in texts]


def test_a_hash_tells_prompts_and_columns():
    a, b = Prompt("a", {"tag": "x"}), Prompt("b", {"tag": "x"})
    others = [[a, b], [b, a], [a], [a, Prompt("b", {"tag": "y"})]]
    assert len({hash_of(prompts) for prompts in others}) == 4


def painted(out, ids):
    for i, name in enumerate(name for row in ids for name in row):
        path = out / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path)


def test_geneval_is_read_back_as_its_scorer_does(tmp_path):
    prompts = [Prompt(row["prompt"], row) for row in META]
    ids = LAYOUTS["geneval"].ids(prompts, 3)
    painted(tmp_path, ids)
    (tmp_path / "manifest.json").write_text("{}")
    LAYOUTS["geneval"].finish(tmp_path, prompts, ids)
    found = []
    for subfolder in sorted(os.listdir(tmp_path)):
        if not (tmp_path / subfolder).is_dir() or not subfolder.isdigit():
            continue
        metadata = json.loads((tmp_path / subfolder / "metadata.jsonl").read_text())
        names = sorted(os.listdir(tmp_path / subfolder / "samples"))
        assert all(re.match(r"\d+\.png", name) for name in names)
        found.append((metadata, len(names)))
        with Image.open(tmp_path / subfolder / "grid.png", formats=("PNG",)) as sheet:
            assert sheet.width > 3 * 8
    assert found == [(row, 3) for row in META]
    assert LAYOUTS["geneval"].sheets(2) == {"00000/grid", "00001/grid"}
    refused(lambda: LAYOUTS["geneval"].ids([Prompt("a", {"prompt": "a"})], 1), "tag and include")


def test_compbench_is_read_back_as_its_scorers_do(tmp_path):
    texts = ["a red bench", "a cup/bowl", "a cup:bowl", "a_cup\\bowl", "...a cow. And Dr. No"]
    ids = LAYOUTS["compbench"].ids([Prompt(text) for text in texts], 2)
    painted(tmp_path, ids)
    names = os.listdir(tmp_path / "samples")
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert len(names) == 10
    read_back = [name.split("_")[0] for name in names]
    assert read_back[::2] == read_back[1::2]
    assert read_back[::2] == [
        "a red bench",
        "a cup bowl",
        "a cup:bowl",
        "a cup\\bowl",
        "a cow. And Dr. No",
    ]
    assert [
        int(np.asarray(Image.open(tmp_path / "samples" / n, formats=("PNG",)))[0, 0, 0])
        for n in names
    ] == list(range(10))


def test_prompts_that_sanitise_alike_stay_apart():
    ids = LAYOUTS["compbench"].ids([Prompt("a/b"), Prompt("a b"), Prompt("a_b")], 2)
    assert len({name for row in ids for name in row}) == 6


@pytest.mark.parametrize("text", ["x" * 300, "é" * 130, "///", "..."])
def test_prompts_that_are_no_file_names_are_refused(text):
    assert "--layout plain" in refused(lambda: LAYOUTS["compbench"].ids([Prompt(text)], 1))
    assert LAYOUTS["plain"].ids([Prompt(text)], 1) == [["00000_0000"]]


def test_the_usual_numbers_of_pictures():
    assert {name: layout.per_prompt for name, layout in LAYOUTS.items()} == {
        "plain": 1,
        "geneval": 4,
        "compbench": 10,
    }

"""Captions of the level "language": their facts, read by another rule, are the scene's."""

import json
import re
import tarfile
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from cascade.cli import main
from cascade.data.scenes import language
from cascade.data.scenes.asking import PARAPHRASES, paraphrases
from cascade.data.scenes.captions import Scene, caption
from cascade.data.scenes.generate import (
    SPLITS,
    render,
    sample_scene,
    write_captions,
    write_scenes,
)
from cascade.draws import generator
from cascade.eval.scenes.recognizer import judge

# What each word means, spelled out here again.
MEANINGS = {
    "red": "red scarlet crimson",
    "green": "green emerald grass-coloured",
    "blue": "blue azure sapphire",
    "yellow": "yellow golden lemon-coloured",
    "purple": "purple violet plum-coloured",
    "cyan": "cyan turquoise aqua",
    "black": "black ebony jet-black",
    "pink": "pink rosy salmon-coloured",
}
SHAPES = {
    "circle": ["circle", "disc", "round blob"],
    "square": ["square", "box", "quadrate"],
    "triangle": ["triangle", "three-cornered shape", "wedge"],
    "cross": ["cross", "plus sign", "plus"],
}
WAYS = {
    "left of": ["to the left of", "on the left-hand side of", "left of", "west of"],
    "right of": ["to the right of", "on the right-hand side of", "right of", "east of"],
    "above": ["above", "over", "atop", "higher than"],
    "below": ["below", "under", "beneath", "lower than"],
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {
    2: ["two", "a pair of", "a couple of", "2"],
    3: ["three", "a trio of", "a triplet of", "3"],
}
LARGE = {"large": "is large", "is the larger": "is large", "larger of the two being": "large is"}
LARGE |= {"small": "is small", "being smaller than": "is small than", "of the two": ""}


def symbols(text):
    """A caption as a list of (kind, meaning), the longest phrases first; other words are left out.

    Kinds: a colour, a shape, a way (a relation), a count, a size, and "it", "see" and "not".
    """
    table = {name: ("color", color) for color, names in MEANINGS.items() for name in names.split()}
    for shape, names in SHAPES.items():
        table |= {name + end: ("shape", shape) for name in names for end in ("", "s", "es")}
    table |= {name: ("way", way) for way, names in WAYS.items() for name in names}
    table |= {name: ("count", n) for n, names in COUNTS.items() for name in names}
    table |= {phrase: ("size", says) for phrase, says in LARGE.items()}
    table |= {word: (word, "") for word in ("it", "see", "not")}
    pattern = "|".join(sorted(map(re.escape, table), key=len, reverse=True))
    return [table[found] for found in re.findall(rf"(?<![\w-])({pattern})(?![\w-])", text)]


def read(text):
    """The objects in the order of mention, the relation of the first to the second, the larger."""
    found = symbols(text)
    while ("not", "") in found:  # "not X but Y": X goes
        place = found.index(("not", ""))
        del found[place : place + 2]
    count = next((n for kind, n in found if kind == "count"), 1)
    ways = [(i, way) for i, (kind, way) in enumerate(found) if kind == "way"]
    nouns, larger = [], None  # two neighbours, a colour and a shape, are an object
    rest = [(i, *one) for i, one in enumerate(found) if one[0] in ("color", "shape", "size")]
    while rest:
        i, kind, what = rest.pop(0)
        if kind == "size":
            if what == "large is":  # of what follows
                larger = rest[0][2], rest[1][2]
            elif what.startswith("is "):  # of what went before
                big = nouns[-1][1]
                other = [pair for _, pair in nouns if pair != big]
                larger = big if what == "is large" else larger or other[0]
        else:
            pair = (what, rest.pop(0)[2])
            nouns.append((i, pair if kind == "color" else pair[::-1]))
    if not ways:
        return [nouns[0][1]] * count, None, None
    (place, way), mentioned = ways[0], list(dict.fromkeys(pair for _, pair in nouns))
    kinds = [kind for kind, _ in found]
    before = place < nouns[0][0]
    if "of the two" in text and "is the larger" in text:  # "of the two, the F is the larger: F R S"
        before = False
    if before or "it" in kinds:  # "R S is F", "S with F R it", "we see S and, R it, F"
        way = OPPOSITE[way]
    return mentioned, way, larger


def facts(scene):
    pairs = [(o.color, o.shape) for o in scene.objects]
    sizes = [o.size for o in scene.objects]
    larger = pairs[sizes.index("large")] if len(set(sizes)) > 1 else None
    return pairs, scene.relation, larger


def agree(text, scene):
    pairs, way, larger = read(text)
    own, relation, own_larger = facts(scene)
    if relation and pairs == own[::-1]:
        pairs, way = pairs[::-1], OPPOSITE[way]
    return (pairs, way, larger) == (own, relation, own_larger)


@pytest.fixture(scope="module")
def scenes():
    return {
        split: [sample_scene("language", split, generator(0, split, i)) for i in range(500)]
        for split in SPLITS
    }


def test_every_caption_asks_for_what_is_there(scenes):
    for split, some in scenes.items():
        for scene in some:
            assert agree(caption(scene), scene), (split, caption(scene), facts(scene))


def test_every_paraphrase_asks_for_what_is_there(scenes):
    for i, scene in enumerate(scenes["train"][:150]):
        found = paraphrases(scene, "train", generator(1, "p", i))
        assert len(found) == PARAPHRASES
        for text in found:
            assert agree(text, scene), (text, facts(scene))


def test_a_caption_that_says_something_else_would_be_noticed(scenes):
    """The rule above is not satisfied by everything."""
    some = scenes["val"]
    wrong = [agree(caption(one), other) for one, other in pairwise(some)]
    assert np.mean(wrong) < 0.02


def test_the_reader_finds_what_every_caption_asks_for(scenes):
    for split in SPLITS:
        for scene in scenes[split][:40]:
            assert all(judge(scene, render(scene, 64)).values()), scene


def vocabulary(texts):
    return Counter(word for text in texts for word in re.findall(r"[\w-]+", text))


def test_training_captions_never_use_what_is_novel(scenes):
    train = [scene.wording for scene in scenes["train"]]
    assert not any(wording.novel for wording in train)
    forms, words = {w.form for w in train}, vocabulary(w.text for w in train)
    for split in ("val", "unseen"):  # of 500 each
        held_out = [s.wording for s in scenes[split] if s.wording.novel]
        assert 0.4 < len(held_out) / len(scenes[split]) < 0.6
        for wording in held_out:
            other = set(vocabulary([wording.text])) - words.keys()
            assert other or wording.form not in forms or "not" in wording.text, wording
    for ways in (*language.COLORS.values(), *language.SHAPES.values()):
        for word in ways[language.NOVEL]:
            assert not any(w.text == word or f" {word} " in f" {w.text} " for w in train), word


def test_a_wording_records_what_it_is_made_of(scenes):
    for scene in scenes["val"][:300]:
        wording = scene.wording
        assert set(wording.novel) <= {wording.form, *wording.words}
        places = [word for word in wording.words if "{" not in word]
        assert sum(word in wording.text for word in places) >= len(scene.objects[:2])


def test_every_way_of_speaking_occurs(scenes):
    said = {word for s in scenes["val"] for word in (*s.wording.words, s.wording.form)}
    tables = (language.COLORS, language.SHAPES, language.RELATIONS, language.COUNTS)
    ways = [w for table in tables for w in table.values()]
    ways += [language.NOUNS, language.ALONE, language.RELATED, language.SIZED, language.ALIKE]
    assert {word for pair in ways for kind in pair for word in kind} <= said


def test_paraphrases_of_training_pictures_never_are_held_out_captions(scenes):
    held_out = {caption(scene) for split in ("val", "unseen") for scene in scenes[split]}
    found = {
        text
        for i, scene in enumerate(scenes["train"])
        for text in paraphrases(scene, "train", generator(0, "train/paraphrases", i))
    }
    assert len(found) > 2000
    assert not found & held_out


def test_samples_mark_what_training_never_says(tmp_path):
    shard = write_scenes(tmp_path, "language", "val", 40, 32, 0)[0]
    with tarfile.open(shard) as tar:
        fields = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]
    assert {bool(f["scene"]["wording"]["novel"]) for f in fields} == {True, False}
    assert all(len(f["paraphrases"]) == PARAPHRASES for f in fields)
    assert all(Scene.from_json(f["scene"]).wording.text == f["caption"] for f in fields)
    again = write_scenes(tmp_path / "again", "language", "val", 40, 32, 0)[0]
    assert shard.read_bytes() == again.read_bytes()


def test_a_corpus_of_captions_alone(tmp_path, capsys):
    argv = ["data", "scenes", str(tmp_path), "--level", "language", "--captions-only", "300"]
    assert main(argv) == 0
    lines = (tmp_path / "captions.txt").read_text().splitlines()
    assert len(lines) == 300
    for i, line in enumerate(lines):
        assert agree(line, sample_scene("language", "train", generator(0, "captions", i)))
    write_captions(tmp_path / "longer.txt", "language", 400, 0)
    assert (tmp_path / "longer.txt").read_text().splitlines()[:300] == lines
    assert main(argv) == 2
    assert "choose another folder" in capsys.readouterr().err

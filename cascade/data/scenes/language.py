"""Many ways to ask for one scene: synonyms, word order, passive, negation, and comparison.

Words and forms are `KNOWN`, which the captions of training use, or `NOVEL`, which only held-out
captions and `paraphrases` use: a text encoder may have read them, the network that it conditions
has not. A wording records what it is made of, so that its facts can be checked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

KNOWN, NOVEL = 0, 1  # places in each entry below
Ways = tuple[tuple[str, ...], tuple[str, ...]]

COLORS: Mapping[str, Ways] = {
    "red": (("red",), ("scarlet", "crimson")),
    "green": (("green",), ("emerald", "grass-coloured")),
    "blue": (("blue",), ("azure", "sapphire")),
    "yellow": (("yellow",), ("golden", "lemon-coloured")),
    "purple": (("purple",), ("violet", "plum-coloured")),
    "cyan": (("cyan",), ("turquoise", "aqua")),
    "black": (("black",), ("ebony", "jet-black")),
    "pink": (("pink",), ("rosy", "salmon-coloured")),
}
SHAPES: Mapping[str, Ways] = {
    "circle": (("circle",), ("disc", "round blob")),
    "square": (("square",), ("box", "quadrate")),
    "triangle": (("triangle",), ("three-cornered shape", "wedge")),
    "cross": (("cross",), ("plus sign", "plus")),
}
RELATIONS: Mapping[str, Ways] = {
    "left of": (("left of", "to the left of"), ("on the left-hand side of", "west of")),
    "right of": (("right of", "to the right of"), ("on the right-hand side of", "east of")),
    "above": (("above", "over"), ("atop", "higher than")),
    "below": (("below", "under"), ("beneath", "lower than")),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS: Mapping[int, Ways] = {
    2: (("two", "a pair of"), ("a couple of", "2")),
    3: (("three", "a trio of"), ("a triplet of", "3")),
}
# {0} is an object with its article, {c} a colour, {x} another colour, {s} a shape.
NOUNS: Ways = (
    ("{a} {c} {s}", "one {c} {s}", "{as} {s} that is {c}"),
    ("{as} {s} painted {c}", "{as} {s}, not {x} but {c}", "something {c}, namely {as} {s}"),
)
ALONE: Ways = (
    ("{0}", "just {0}", "a picture of {0}"),
    ("nothing but {0}", "all that was drawn is {0}", "{0}, and no other thing"),
)
# {r} is the relation of {0} to {1}, {i} its inverse.
RELATED: Ways = (
    ("{0} {r} {1}", "{1} with {0} {r} it", "there is {0} {r} {1}", "{1} {i} {0}"),
    (
        "{r} {1} is {0}",
        "{0} was placed {r} {1}",
        "{1} has been drawn {i} {0}",
        "{0}, not {i} but {r} {1}",
        "we see {1} and, {r} it, {0}",
    ),
)
# {f} and {g} are the objects without articles; the first is the larger.
SIZED: Ways = (
    (
        "{0} {r} {1}, the {f} large and the {g} small",
        "{1} {i} {0}, the {g} small and the {f} large",
    ),
    (
        "{0} {r} {1}, the larger of the two being the {f}",
        "{0} {r} {1}, the {g} being smaller than the {f}",
        "of the two, the {f} is the larger: {0} {r} {1}",
    ),
)
# {n} is a number word, {ss} the shape in the plural.
ALIKE: Ways = (
    ("{n} {c} {ss}", "{n} {ss} in {c}", "there are {n} {c} {ss}"),
    ("{n} {ss}, not {x} but {c}", "{n} {ss} painted {c}", "a drawing of {n} {c} {ss}"),
)


@dataclass(frozen=True)
class Wording:
    """A caption, and what it is made of.

    Attributes:
        text: the caption.
        form: the sentence, with places for what it names.
        words: what was chosen for each of them, in order.
        novel: those of form and words that training captions never use.
    """

    text: str
    form: str
    words: tuple[str, ...]
    novel: tuple[str, ...]


class Asked(NamedTuple):
    """What a caption asks for: (colour, shape) of each object, and what holds between them.

    Attributes:
        relation: of the first object to the second.
        larger: which object is larger than the other, if the caption says so.
    """

    pairs: Sequence[tuple[str, str]]
    relation: str | None = None
    larger: int | None = None


class _Choices:
    """Draws ways to say something, and keeps account of them."""

    def __init__(self, rng: np.random.Generator, novel: float):
        self.rng, self.share = rng, novel
        self.words: list[str] = []
        self.novel: list[str] = []

    def of(self, ways: Ways) -> str:
        kind = NOVEL if self.rng.random() < self.share else KNOWN
        found = str(self.rng.choice(ways[kind]))
        self.words.append(found)
        self.novel += [found] if kind == NOVEL else []
        return found

    def another(self, color: str) -> str:
        """A word of the same kind for another colour."""
        return str(self.rng.choice([name for name in COLORS if name != color]))


def worded(asked: Asked, rng: np.random.Generator, novel: float) -> Wording:
    """Draws a caption.

    Args:
        novel: the probability that each choice is one of those that training captions never use.
    """
    choose = _Choices(rng, novel)
    if asked.relation is None and len(asked.pairs) > 1:
        text, form = _alike(asked, choose)
    elif asked.relation is None:
        form = choose.of(ALONE)
        text = form.format(_object(asked.pairs[0], choose)[0])
    else:
        text, form = _related(asked, choose)
    return Wording(text, form, tuple(choose.words), tuple(choose.novel))


def _alike(asked: Asked, choose: _Choices) -> tuple[str, str]:
    (color, shape), form = asked.pairs[0], choose.of(ALIKE)
    noun = choose.of(SHAPES[shape])
    named = {"n": choose.of(COUNTS[len(asked.pairs)]), "c": choose.of(COLORS[color])}
    plural = noun + ("es" if noun.endswith(("s", "x")) else "s")
    return form.format(**named, ss=plural, x=choose.another(color)), form


def _related(asked: Asked, choose: _Choices) -> tuple[str, str]:
    form = choose.of(RELATED if asked.larger is None else SIZED)
    objects = [_object(pair, choose) for pair in asked.pairs]
    names = [name for name, _ in objects]
    relation = asked.relation
    if asked.larger == 1:  # forms name the larger object first
        objects, names, relation = objects[::-1], names[::-1], INVERSE[relation]
    ways = {"r": relation, "i": INVERSE[relation]}
    named = {k: choose.of(RELATIONS[way]) for k, way in ways.items() if f"{{{k}}}" in form}
    return form.format(*names, f=objects[0][1], g=objects[1][1], **named), form


def _object(pair: tuple[str, str], choose: _Choices) -> tuple[str, str]:
    """An object with its article, and without."""
    color, shape = pair
    form, c, s = choose.of(NOUNS), choose.of(COLORS[color]), choose.of(SHAPES[shape])
    x = choose.another(color)
    return form.format(a=_article(c), c=c, s=s, x=x, **{"as": _article(s)}), f"{c} {s}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"

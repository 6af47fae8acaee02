"""The facts that a long caption of a scene states, read from its words, and those of the scene.

A fact is one of: the number of objects, the background, and of each object its colour and shape
(`binding`), with these its size and its place, and of two objects their relation.
"""

import re
from collections import Counter
from collections.abc import Sequence

from cascade.data.scenes.captions import RELATIONS, Object, Scene, place

Fact = tuple[str, ...]  # its kind, and what it states

_COLOR = "red|green|blue|yellow|purple|cyan|black|pink"
_SHAPE = "circle|square|triangle|cross|star|heart"
_OPENING = re.compile(r"^(?P<said>.*?) on a plain (?P<background>\w+) background$")
_OBJECT = re.compile(
    rf"(?P<color>{_COLOR}) (?P<shape>{_SHAPE})|(?P<shape2>{_SHAPE})(?:e?s)? (?:in|that is) "
    rf"(?P<color2>{_COLOR})"
)
_WAY = re.compile(r"to the left of|to the right of|left of|right of|above|below|over|under")
_STATED = re.compile(
    r"^(?P<what>.+?) is (?P<size>small|large) and (?P<place>at the .+|in the middle)$"
)
_NUMBERS = {"two": 2, "pair": 2, "three": 3, "trio": 3}
_MEANS = {"to the left of": "left of", "to the right of": "right of", "over": "above"}
_MEANS |= {"under": "below"}


def facts_of(scene: Scene) -> Counter[Fact]:
    """Return the facts of a scene."""
    found = Counter([("number", str(len(scene.objects))), ("background", scene.background)])
    for o in scene.objects:
        found.update(_of_object((o.color, o.shape), o.size, place(o)))
    if scene.relation:
        found[_relation(*(_pair(o) for o in scene.objects), scene.relation)] += 1
    return found


def facts_in(text: str) -> Counter[Fact]:
    """Return the facts that a long caption states; what cannot be read states nothing."""
    first, *others = (sentence.strip() for sentence in text.lower().rstrip(" .").split("."))
    found: Counter[Fact] = Counter()
    if not (opening := _OPENING.match(first)):
        return found
    said = opening["said"]
    pairs = [(m["color"] or m["color2"], m["shape"] or m["shape2"]) for m in _OBJECT.finditer(said)]
    number = next((n for word, n in _NUMBERS.items() if word in said.split()), len(pairs))
    found.update([("number", str(number)), ("background", opening["background"])])
    if (way := _WAY.search(said)) and len(pairs) == 2:
        name = _MEANS.get(way[0], way[0])
        # "a X with a Y above it": the relation is of Y to X.
        found[_relation(*(pairs[::-1] if said.endswith(" it") else pairs), name)] += 1
    for sentence in others:
        if stated := _STATED.match(sentence):
            own = _OBJECT.search(stated["what"])
            pair = (own["color"], own["shape"]) if own else pairs[0] if pairs else ("", "")
            found.update(_of_object(pair, stated["size"], stated["place"]))
    return found


def share(rows: Sequence[tuple[Counter[Fact], Counter[Fact]]]) -> dict[str, float]:
    """Return the share of facts that are right, of all that are said or true, by kind and in all.

    Args:
        rows: the facts of a caption, and those of its scene.
    """
    right: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for said, true in rows:
        for kind in {fact[0] for fact in said | true}:
            own, other = ({f: n for f, n in of.items() if f[0] == kind} for of in (said, true))
            right[kind] += (Counter(own) & Counter(other)).total()
            whole[kind] += max(sum(own.values()), sum(other.values()))
    return {kind: right[kind] / whole[kind] for kind in sorted(whole)} | {
        "all": right.total() / whole.total()
    }


def _pair(o: Object) -> tuple[str, str]:
    return o.color, o.shape


def _of_object(pair: tuple[str, str], size: str, where: str) -> list[Fact]:
    return [("binding", *pair), ("size", *pair, size), ("place", *pair, where)]


def _relation(one: tuple[str, str], other: tuple[str, str], name: str) -> Fact:
    """The relation of one object to another, as that which its inverse states as well."""
    if name in ("right of", "below"):
        one, other, name = other, one, RELATIONS[name][1]
    return ("relation", *one, name, *other)

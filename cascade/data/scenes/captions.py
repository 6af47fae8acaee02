"""The content of a scene, and its captions.

The short caption names colours, shapes, a number or a relation, and sometimes sizes; the long one
describes the whole scene. Each kind of scene has several phrasings, and a relation can be stated
from either side.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cascade.data.scenes.language import Wording

# The direction (x, y) of the first object as seen from the second, and the inverse relation.
RELATIONS: Mapping[str, tuple[tuple[int, int], str]] = {
    "left of": ((-1, 0), "right of"),
    "right of": ((1, 0), "left of"),
    "above": ((0, -1), "below"),
    "below": ((0, 1), "above"),
}
NUMBERS = ("no", "one", "two", "three")
ONE = (
    "a {size}{color} {shape}",
    "one {size}{color} {shape}",
    "a {size}{shape} in {color}",
    "a single {size}{color} {shape}",
    "a {size}{shape} that is {color}",
    "just a {size}{color} {shape}",
)
ALIKE = (
    "{number} {size}{color} {shape}",
    "a group of {number} {size}{color} {shape}",
    "{number} {size}{shape} in {color}",
)
RELATED = ("a {0} {relation} a {1}", "a {1} with a {0} {relation} it", "one {0} {relation} one {1}")


_TEXTS = ("text", "form")  # of a wording


@dataclass(frozen=True)
class Object:
    """An object; its box has centre (x, y) and side `diameter`, as fractions of the picture."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float


@dataclass(frozen=True)
class Scene:
    """The content of a picture, and the choices of its short caption.

    Attributes:
        objects: one; two, the first in `relation` to the second; or several identical ones.
        background: never named in the short caption.
        relation: one of `RELATIONS`; None for one object or several identical ones.
        names_size: whether the short caption says "small" or "large".
        phrasing: index of the short caption's phrasing.
        word: written below the object in its colour; None: nothing is.
        shown: whether the objects are drawn; otherwise the word stands for its one object.
        wording: the short caption, if it is one of `language`; then `phrasing` is not used.
    """

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None
    names_size: bool = False
    phrasing: int = 0
    word: str | None = None
    shown: bool = True
    wording: Wording | None = None

    @property
    def kind(self) -> str:
        """The number of objects: "one", "two" or "three"."""
        return NUMBERS[len(self.objects)]

    def to_json(self) -> dict[str, Any]:
        fields = {**asdict(self), "objects": [asdict(o) for o in self.objects]}
        added = {
            "word": None,
            "shown": True,
            "wording": None,
        }  # scenes of other levels do not mention them
        return {k: v for k, v in fields.items() if k not in added or v != added[k]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Scene":
        objects = tuple(Object(**o) for o in fields["objects"])
        said = fields.get("wording")
        wording = said and Wording(**{k: v if k in _TEXTS else tuple(v) for k, v in said.items()})
        return cls(**{**fields, "objects": objects, "wording": wording})


def caption(scene: Scene) -> str:
    """Return the short caption: "a red circle above a blue square", "three small green stars"."""
    if scene.wording:
        return scene.wording.text
    sizes = [f"{o.size} " if scene.names_size else "" for o in scene.objects]
    if scene.relation:
        nouns = [f"{size}{o.color} {o.shape}" for size, o in zip(sizes, scene.objects)]
        return RELATED[scene.phrasing].format(*nouns, relation=scene.relation)
    color, shape = scene.objects[0].color, scene.objects[0].shape
    if scene.kind == "one":
        return ONE[scene.phrasing].format(size=sizes[0], color=color, shape=shape)
    shape += "es" if shape.endswith("s") else "s"
    wording = ALIKE[scene.phrasing]
    return wording.format(number=scene.kind, size=sizes[0], color=color, shape=shape)


def long_caption(scene: Scene) -> str:
    """Return the long caption: the short one, the background, each object's size and position."""
    names = ("It",) if len(scene.objects) == 1 else ("One", "Another", "The third")
    if scene.relation:
        names = [f"The {o.color} {o.shape}" for o in scene.objects]
    short = caption(scene)
    sentences = [f"{short[0].upper()}{short[1:]} on a plain {scene.background} background."]
    sentences += [f"{name} is {o.size} and {place(o)}." for name, o in zip(names, scene.objects)]
    return " ".join(sentences)


def place(o: Object) -> str:
    """Describe an object's position on a grid of three by three."""
    row, column = (0 if v < 0.4 else 1 if v <= 0.6 else 2 for v in (o.y, o.x))
    vertical, horizontal = ("top ", "", "bottom ")[row], ("left", "", "right")[column]
    return f"at the {vertical}{horizontal}".rstrip() if vertical + horizontal else "in the middle"

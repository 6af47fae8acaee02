"""Groups the members of a tar into samples by the keys in their names.

A key ends at the first dot of the base name, as in WebDataset ("first_dot"), or at the last one
("last_dot"), which suits names such as `step_0.01.jpg`; extensions are lower-cased. A sample is a
run of adjacent members with the same key; empty members count as missing.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cascade.data.tars.tar import HARD_LINK, Member, StreamMember
from cascade.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
# Keys with an absolute path, a path out of the folder, or control characters.
HOSTILE = re.compile(r"^/|(^|/)\.\.(/|$)|[\0-\x1f\x7f]")

FIRST_DOT, LAST_DOT = "first_dot", "last_dot"

HOSTILE_NAME, NO_PICTURE, NO_CAPTION = "hostile name", "no picture", "no caption"
DUPLICATE, DOTTED = "duplicate key", "dot in the key"

REMEDY = (
    "a key ends at the first dot of a name: data.keys=last_dot ends it at the last one, or write "
    "shards with proper keys by `cascade data pack`"
)


@dataclass
class Group:
    """Adjacent members with one key.

    Attributes:
        first: the name of the first member.
        members: what `take` returned for pictures and captions, by extension.
        others: other extensions.
        lost: why some members cannot be read, by extension.
        unsure: whether another group has the same key and one of its extensions (`_mark`).
    """

    key: str
    first: str
    members: dict[str, Any] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    lost: dict[str, str] = field(default_factory=dict)
    unsure: bool = False

    @property
    def picture(self) -> Any:
        """What `take` returned for its picture; None if there is none."""
        return next((self.members[e] for e in PICTURES if e in self.members), None)

    @property
    def captions(self) -> dict[str, Any]:
        return {e: self.members[e] for e in CAPTIONS if e in self.members}

    @property
    def fault(self) -> str:
        """Why this is not a usable sample; "" if it is."""
        if HOSTILE.search(self.key):
            return HOSTILE_NAME
        kinds = {NO_PICTURE: PICTURES, NO_CAPTION: CAPTIONS}
        lacking = {why: of for why, of in kinds.items() if self.members.keys().isdisjoint(of)}
        lost = [self.lost[e] for of in lacking.values() for e in of if e in self.lost]
        return next(iter([*lost, *lacking]), DUPLICATE if self.unsure else "")

    @property
    def dotted(self) -> int:
        """How many samples this would contain if keys ended at the last dot."""
        parts: dict[str, set[str]] = defaultdict(set)
        for extension in self.others:
            stem, _, last = extension.rpartition(".")
            if stem:
                parts[stem].add(last)
        alone = not self.members
        return sum(
            not p.isdisjoint(PICTURES) and (alone or not p.isdisjoint(CAPTIONS))
            for p in parts.values()
        )


def check_rule(rule: str) -> None:
    """Raise UserError if there is no such rule."""
    if rule not in (FIRST_DOT, LAST_DOT):
        raise UserError(f"keys={rule}: choose {FIRST_DOT} or {LAST_DOT}")


def key_and_extension(name: str, rule: str) -> tuple[str, str]:
    """Split a member's name; the key is "" for hidden files, which belong to no sample."""
    folder, _, base = name.rpartition("/")
    if base.startswith("."):
        return "", ""
    stem, _, extension = base.partition(".") if rule == FIRST_DOT else base.rpartition(".")
    if not stem:
        stem, extension = base, ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()


def grouped(
    members: Iterable[Member | StreamMember], rule: str, take: Callable[[Any], Any]
) -> Iterator[Group]:
    """Yield the groups of a tar, each once the next one begins or the members end.

    Args:
        take: called with each picture and caption, before the next member is read.
    """
    now: Group | None = None
    same: list[Group] = []  # the groups before `now` with its key
    for member in members:
        key, extension = key_and_extension(member.name, rule)
        known = extension in PICTURES or extension in CAPTIONS
        if not key or (member.lost and not known and member.lost != HARD_LINK):
            continue
        if now is None or key != now.key or extension in now.members or extension in now.others:
            if now is not None and key == now.key:
                # Only the first can be of use: what the others hold need not be kept.
                same.append(replace(now, members=dict.fromkeys(now.members)) if same else now)
            elif now is not None:
                yield from _mark([*same, now], adjacent=True)
                same = []
            now = Group(key, member.name)
        if not known:
            if member.bytes or member.lost:
                now.others.add(extension)
        elif member.lost:
            now.lost[extension] = member.lost
        elif member.bytes:
            now.members[extension] = take(member)
    if now is not None:
        yield from _mark([*same, now], adjacent=True)


def _mark(parts: list[Group], adjacent: bool = False) -> list[Group]:
    """Mark groups of one key as unsure, unless each is a sample or they can be one together.

    If a member was renamed, it repeats one of another sample, and belongs to neither of its parts:
    of `a.jpg b.txt b.jpg b.txt` nobody can tell which text is b's. Adjacent parts must have the
    same members: of `b.jpg b.txt b.jpg b.json` nobody can tell where the first one ends.
    """
    kinds = [frozenset({*part.members, *part.lost}) for part in parts]
    repeated = len(frozenset().union(*kinds)) < sum(map(len, kinds))
    unlike = adjacent and len(set(kinds)) > 1
    if repeated and (unlike or any(part.fault for part in parts)):
        for part in parts:
            part.unsure = True
    return parts


def joined(groups: Sequence[Group], whole: bool) -> list[Group]:
    """Join the parts of samples that are not adjacent, as in an unsorted tar, at the first part.

    Only where it is unambiguous: no part is a sample by itself, and together they have one picture
    and no extension twice. If a tar is not whole, none are joined and the last group is dropped.
    """
    parts: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        parts[group.key].append(group)
    for some in parts.values():
        _mark(some)
    if not whole:
        return list(groups[:-1])
    complete = {key: one for key, some in parts.items() if len(some) > 1 and (one := _one(some))}
    return [
        complete.get(group.key, group)
        for group in groups
        if group.key not in complete or group is parts[group.key][0]
    ]


def _one(parts: Sequence[Group]) -> Group | None:
    extensions = [e for part in parts for e in (*part.members, *part.others, *part.lost)]
    pictures = sum(e in PICTURES for e in extensions)
    twice = len(set(extensions)) < len(extensions)
    if twice or pictures != 1 or any(not part.fault for part in parts):
        return None
    one = Group(parts[0].key, parts[0].first)
    for part in parts:
        one.members |= part.members
        one.others |= part.others
        one.lost |= part.lost
    return one

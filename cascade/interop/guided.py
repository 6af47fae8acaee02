"""guided-diffusion's networks (ADM), which are told a class of ImageNet.

Neither the number of heads nor the order of queries, keys and values shows in a file, so that a
network is recognised by its sizes.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cascade.errors import UserError
from cascade.interop.files import tensors_in
from cascade.interop.imported import Imported
from cascade.interop.names.adm import HEAD_CHANNELS, adm_rules, adm_sizes
from cascade.interop.names.rules import Rule

LICENSE = "MIT (openai/guided-diffusion), see its model-card.md"
_LINEAR = "cascade.diffusion.noise.linear_table"


class Sizes(NamedTuple):
    """What the shapes tell of a network."""

    channels: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...]
    image_channels: int = 0


class Facts(NamedTuple):
    """What they do not tell.

    Attributes:
        sides: of the small picture, if there is one, and of the large one, in pixels.
        heads: a setting of our network.
        legacy: whether queries, keys and values are interleaved by head.
        linear: whether its table is DDPM's, not the cosine one.
    """

    sides: tuple[int, ...]
    heads: dict[str, int]
    legacy: bool = True
    linear: bool = True


_SIX = (1, 1, 2, 2, 4, 4)
_OF_64 = {"head_channels": HEAD_CHANNELS}
PUBLISHED = {
    Sizes(192, (1, 2, 3, 4), (1, 2, 3)): Facts((64,), _OF_64, legacy=False, linear=False),
    Sizes(256, (1, 1, 2, 3, 4), (2, 3, 4)): Facts((128,), {"heads": 4}),
    Sizes(256, _SIX, (3, 4, 5)): Facts((256,), _OF_64),
    Sizes(128, (1, 2, 2, 4, 4, 8, 8), (4, 5, 6)): Facts((512,), _OF_64),
    Sizes(192, _SIX, (3, 4, 5), 3): Facts((64, 256), {"heads": 4}),
    Sizes(192, _SIX, (4, 5), 3): Facts((128, 512), _OF_64),
}


def network(path: Path) -> Imported:
    """Reads a network that is told classes from its file.

    Raises:
        UserError: it is none of the published ones.
    """
    system = "guided-diffusion"
    tensors = tensors_in(path, system)
    sizes = adm_sizes(tensors, path)
    if "label_emb.weight" not in tensors:
        raise UserError(f"{path} has no label_emb.weight: only networks told a class are imported")
    shown = (sizes["channels"], tuple(sizes["multipliers"]), tuple(sizes["attention"]))
    facts = PUBLISHED.get(Sizes(*shown, sizes["image_channels"]))
    if facts is None:
        raise UserError(
            f"{path} is of a network with {shown[0]} channels times {list(shown[1])}, which is "
            f"none that {system} published, so that its heads are unknown: give one of those"
        )
    settings: dict[str, Any] = {
        **{f"net.{key}": value for key, value in {**sizes, **facts.heads}.items()},
        "net.level.dim": tensors["time_embed.0.weight"].shape[1],
        "classes": len(tensors["label_emb.weight"]),
        "size": facts.sides[-1],
    }
    if len(facts.sides) > 1:
        settings["low"] = facts.sides[0]
    elif facts.linear:
        settings |= {"process.mean.schedule.path": _LINEAR, "net.level.schedule.path": _LINEAR}
        settings["net.dropout"] = 0.0
    experiment = "adm_sr_released" if len(facts.sides) > 1 else "adm_released"
    rules = partial(_rules, legacy=facts.legacy)
    return Imported(experiment, settings, tensors, rules, system, LICENSE, [path])


def _rules(stage: Any, legacy: bool) -> Iterator[Rule]:
    yield from adm_rules(stage.net, "net.", legacy=legacy)
    yield Rule("label_emb", "conditioner.embedders.label.embed")

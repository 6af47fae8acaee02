"""What an adapter is to a stage, and which stage it belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import safe_open
from torch import Tensor

from cascade.encoders.weights import reading, tensors_hash
from cascade.errors import UserError

# What parametrizations and extended tables insert into names of parameters, and the prefixes of
# modules that are added to a stage.
CHANGED, INSIDE = ".parametrizations.weight.", ".table."
_ADDED = ("control.", "adapter.", "further.", "weaker.")


@runtime_checkable
class Adapter(Protocol):
    """An addition to a frozen stage, which alone is trained."""

    def attached(self, stage: Any) -> "Adapter":
        """Add the parameters to a stage. UserError if they do not fit it."""

    def export(self, stage: Any, state: Mapping[str, Tensor], run: Path) -> None:
        """Write the adapter into a run directory.

        Args:
            state: of the stage.
        """


def base_hash(state: Mapping[str, Tensor]) -> str:
    """Hash a stage's weights, without adapters, ControlNets, further losses or a weaker stage.

    Returns "" for weights on the meta device, which have no values.
    """
    plain = {
        name.replace(f"{CHANGED}original", ".weight").replace(INSIDE, "."): value
        for name, value in state.items()
        if not name.startswith(_ADDED) and f"{CHANGED}0." not in name
    }
    return "" if any(value.is_meta for value in plain.values()) else tensors_hash(plain)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter's file and its metadata. UserError if it cannot be read."""
    if not file.exists():
        raise UserError(f"{file.parent} holds no {file.name}: give the run that trained it")
    with reading([file], "an adapter"), safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return tensors, opened.metadata() or {}


def check_base(folder: Path, about: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Raises UserError if an adapter says that it was trained for another network."""
    theirs, own = about.get("base"), base_hash(state)
    if theirs and own and theirs != own:
        raise UserError(
            f"{folder} was trained for another network ({theirs}) than this one ({own}): give the "
            "run that it began with"
        )

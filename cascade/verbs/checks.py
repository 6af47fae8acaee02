"""What can be said of a training before anything heavy is imported, by whoever sends it off too."""

from pathlib import Path

from omegaconf import DictConfig

from cascade.errors import UserError
from cascade.verbs.configuration import differences, loaded

# What may change between two starts of the same run; the totals follow from `images`.
FREE = (
    *("images", "run", "trainer", "workers", "grids", "micro_batch", "faults", "watchdog"),
    # Of encoders, which are told by their hashes.
    *("clip.checkpoint", "clip.quick_gelu", "text.reader.quick_gelu"),
    *("stage.encoders.0.quick_gelu", "stage.encoders.1.quick_gelu"),
    *("learning_rate.total", "stage.learning_rate.total", "data.max_skip_fraction", "data.cache"),
)


def check_identity(config: DictConfig, folder: Path) -> None:
    """Raises UserError if a run directory is another configuration's."""
    if not (folder / "config.yaml").exists():
        return
    old = loaded(folder / "config.yaml")
    paths = {line: line.split(":")[0] for line in differences(old, config)}
    changed = [d for d, p in paths.items() if not f"{p}.".startswith(tuple(f"{f}." for f in FREE))]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} was trained with another configuration: {changed[0]}{more}; "
            "choose another run=..., or remove that folder"
        )


def shares(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Samples at a time on each rank, and over how many times gradients are accumulated.

    Raises:
        UserError: the batch is not ranks x micro_batch x a whole number.
    """
    micro_batch = micro_batch or max(1, batch // ranks)
    steps, rest = divmod(batch, ranks * micro_batch)
    if rest or not steps:
        raise UserError(
            f"batch={batch} is not ranks ({ranks}) x micro_batch ({micro_batch}) x a whole number: "
            "change batch or micro_batch"
        )
    return micro_batch, steps

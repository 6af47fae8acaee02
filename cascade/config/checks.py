"""Checks of a training that need no heavy import, so that they run before a job is submitted."""

from pathlib import Path

from cascade.data.tars.dataset import read_dataset
from cascade.data.tars.splits import chosen, lacking
from cascade.data.tars.tar import tars_of
from cascade.errors import UserError


def check_split(data: Path, split: str) -> None:
    """Raises UserError if a folder of shards lacks a split; a folder without shards passes."""
    tars = tars_of(data) if data.is_dir() else []
    dataset = read_dataset(data) if tars else None
    shares = {tar.stem: dataset.share(tar.stem) if dataset else 0.0 for tar in tars}
    if tars and not chosen(shares, split)[0]:
        raise lacking(data, list(shares), split)


def accumulation(batch: int, micro_batch: int | None, ranks: int) -> tuple[int, int]:
    """Splits a global batch: samples per forward pass on each rank, and passes to accumulate.

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

"""Whether what is to be measured with was never trained on."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cascade.data.dataset import read_dataset
from cascade.data.shards import Shards
from cascade.data.transforms import Pictures
from cascade.errors import UserError
from cascade.training.surroundings import trained_on
from cascade.verbs.configuration import loaded


def check_unseen(runs: Iterable[Path], data: Path, split: str) -> None:
    """Raises UserError if a run was trained with what the index of `data` holds out since then."""
    dataset = read_dataset(data)
    if not (dataset and dataset.held_out):
        return
    shards = partial(Shards, data, Pictures(()), max_skip_fraction=1.0)
    share = shards(split=split).corpus.share
    for run in runs:
        asked = loaded(run / "config.yaml").data
        own = {key: asked[key] for key in ("split", "captions") if key in asked}
        if trained_on(run, partial(shards, **own), share):
            raise UserError(
                f"{run} was trained with what {data} holds out now: train it again, or measure "
                "with --split all, which says so"
            )

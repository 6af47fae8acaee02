"""`cascade demo`: a whole cascade in one process, from no data at all to a report.

It does what `cascade data`, `cascade train` for each stage, and `cascade evaluate` would do one
after another, as conf/demo.yaml and its choice of `cascade` describe. Finished parts are skipped;
an interrupted part is resumed.
"""

import argparse
import gc
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from omegaconf import OmegaConf

from cascade.config.checks import check_split
from cascade.config.compose import composed
from cascade.data.embeddings import EMBEDDINGS
from cascade.eval.cascades.evaluation import evaluate
from cascade.files.atomic import check_writable
from cascade.files.lease import lease
from cascade.runs.cascade_file import measured, overrides, write_cascade
from cascade.training.fit import train
from cascade.verbs.data import embed, make_scenes


def main(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    config = composed("demo", chosen(args.overrides))
    folder, data = Path(config.run), Path(config.data.path)
    check_writable(folder, "choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    if config.scenes:
        counts = OmegaConf.to_container(config.scenes.counts)
        make_scenes(data, config.scenes.level, counts, config.scenes.size, config.seed)
    else:
        for split in config.evaluate.counts:
            check_split(data, split)
    for name in config.stages:
        train(composed("train", overrides(config, name, folder, data)))
        gc.collect()  # Lightning's trainer and module form a cycle that holds data and optimizer
        if name == "clip":  # which conditions the other stages by its embeddings
            embed(data, str(folder / "clip"), data / EMBEDDINGS)
    write_cascade(config, folder)
    if measured(folder):
        print(f"already measured ({folder / 'metrics.json'})")
    else:
        with lease(folder):
            evaluate(
                folder,
                data,
                judge=folder / "judge",
                counts=OmegaConf.to_container(config.evaluate.counts),
                guidance=list(config.evaluate.guidance),
                seed=config.seed,
                targets=OmegaConf.to_container(config.evaluate.targets),
                edits=config.evaluate.edits,
            )
    minutes = (time.monotonic() - begin) / 60
    model = quote(str(folder))
    print(
        f"\n{minutes:.1f} minutes. Look at {folder}/report.html; then paint your own caption:\n\n"
        f"  {_command()} sample --model {model} {quote(config.caption)} --n 4 "
        "--seed 0 --out out.png\n\n"
        f"or open a page to paint, edit and compare on:\n\n  {_command()} serve {model}\n"
    )


def chosen(overrides: Sequence[str]) -> list[str]:
    """The overrides, with `cascade=`, `data.path=` for the earlier `experiment=`, `shards=`."""
    later = {"experiment=": "cascade=", "shards=": "data.path="}
    return [re.sub("^(experiment|shards)=", lambda m: later[m[0]], one) for one in overrides]


def _command() -> str:
    venv = Path(".venv/bin/cascade")
    return str(venv) if venv.exists() and os.environ.get("MAKELEVEL") else "cascade"

"""`cascade demo`: a whole cascade, from no data at all to a report.

It is the sequence of commands that anybody would give, `cascade data`, `cascade train` for each
stage, `cascade evaluate`, in one process; conf/demo.yaml and its experiment say which. What is
finished is passed over, what was interrupted goes on.
"""

import argparse
import gc
import os
import time
from pathlib import Path
from shlex import quote

from omegaconf import DictConfig, OmegaConf

from cascade.data.lease import lease
from cascade.files import check_writable
from cascade.verbs.checks import check_split
from cascade.verbs.configuration import composed
from cascade.verbs.data import EMBEDDINGS, embed, make_scenes
from cascade.verbs.evaluate import evaluate
from cascade.verbs.train import run
from cascade.verbs.whole import measured, overrides, write_cascade


def main(args: argparse.Namespace) -> None:
    begin = time.monotonic()
    config = composed("demo", args.overrides)
    folder, data = Path(config.run), Path(config.shards)
    check_writable(folder, "choose another run=...")
    folder.mkdir(parents=True, exist_ok=True)
    if config.scenes:
        counts = OmegaConf.to_container(config.scenes.counts)
        make_scenes(data, config.scenes.level, counts, config.scenes.size, config.seed)
    else:
        check_split(data, next(iter(config.evaluate.counts)))
    for name in config.stages:
        train_stage(config, name, folder, data)
    write_cascade(config, folder)
    if measured(folder):
        print(f"measured before ({folder / 'metrics.json'})")
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
            )
    minutes = (time.monotonic() - begin) / 60
    print(
        f"\n{minutes:.1f} minutes. Look at {folder}/report.html; then paint your own caption:\n\n"
        f"  {_command()} sample --model {quote(str(folder))} {quote(config.caption)} --n 4 "
        "--seed 0 --out out.png\n"
    )


def train_stage(config: DictConfig, name: str, folder: Path, data: Path) -> None:
    """Trains one stage; behind the CLIP that conditions come its embeddings of all shards."""
    run(composed("train", overrides(config, name, folder, data)))
    gc.collect()  # Lightning's trainer and module hold each other, and so pictures and optimizer
    if name == "clip":
        embed(data, str(folder / "clip"), data / EMBEDDINGS)


def _command() -> str:
    venv = Path(".venv/bin/cascade")
    return str(venv) if venv.exists() and os.environ.get("MAKELEVEL") else "cascade"

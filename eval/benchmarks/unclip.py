"""Seconds of a picture at 256 px, compared to diffusers' UnCLIPPipeline with the same weights.

    python -m cascade.eval.benchmarks.unclip [--channels 64] [--pictures 1] [--rounds 3]

A cascade in Karlo's layout with random weights is exported to diffusers. Both paint with Karlo's
steps (25, 25 and 7), in turn, and ours also with those of the demo (2, 6 and 1). The median counts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from cascade.config.compose import built, composed, saved
from cascade.encoders.architecture import Architecture
from cascade.encoders.clip import save_clip
from cascade.errors import UserError
from cascade.eval.benchmarks import clock
from cascade.eval.benchmarks.demo import OWN, took
from cascade.formats.texts import lines
from cascade.runs.model import load_cascade, paint

CAPTION = "a red circle above a blue square"
KARLO = {"prior": 25, "decoder": 25, "sr256": 7}
FEW = ["prior.steps=2", "prior.scale=1", "decoder.steps=6", "decoder.scale=1", "sr256.steps=1"]


def write_model(folder: Path, channels: int) -> None:
    """Writes a cascade in Karlo's layout, with random weights.

    Args:
        channels: of the U-Nets at their finest level; the prior is 8 times as wide.
    """
    text = {"text_width": 64, "text_layers": 2, "text_heads": 2}
    clip = Architecture(32, 64, vision_layers=1, vision_width=32, head_width=16, **text)
    save_clip(clip, clip.build(), folder / "clip")
    encoder = ["clip=tiny", "clip.model.dim=64", "text.size=64", f"clip.path={folder / 'clip'}"]
    encoder.append("clip.model.text_width=64")
    unet = [f"net.channels={channels}", f"net.embed={4 * channels}"]
    prior = ["net.layers=6", f"net.width={8 * channels}", f"net.heads={channels // 8}"]
    stages = {
        "prior": ["experiment=karlo_prior_released", *encoder, *prior, "net.context=77"],
        "decoder": ["experiment=karlo_decoder_released", *encoder, *unet],
        "sr256": [
            "experiment=karlo_sr256_released",
            *(one.replace("net.", "net.net.") for one in unet),
        ],
    }
    for name, overrides in stages.items():
        run = folder / name
        config = composed("train", ["data.path=none", f"run={run}", *overrides])
        saved(config, run / "config.yaml")
        built(config.stage).export(run)
    choices = {name: {"steps": steps} for name, steps in KARLO.items()}
    (folder / "cascade.yaml").write_text(OmegaConf.to_yaml({"stages": choices}))


def theirs(folder: Path) -> Any:
    """The exported pipeline, in diffusers."""
    try:
        import diffusers
        from diffusers.pipelines.deprecated import unclip
    except ImportError as error:
        raise UserError("this benchmark compares with diffusers: pip install diffusers") from error
    diffusers.pipelines.unclip = unclip  # where the pipeline's own loader looks for it
    pipeline = diffusers.UnCLIPPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def painters(model: Path, exported: Path, pictures: int) -> dict[str, Callable[[], Any]]:
    """Calls that paint the pictures, by name."""
    took([OWN, "export", "--model", model, "--format", "diffusers", "--out", exported])
    pipeline, captions = theirs(exported), [CAPTION] * pictures
    steps = dict(zip(("prior", "decoder", "super_res"), KARLO.values()))
    given = {f"{name}_num_inference_steps": count for name, count in steps.items()}
    own, few = load_cascade(model), load_cascade(model, FEW)
    return {
        "diffusers": partial(pipeline, captions, **given),
        "ours, same steps": partial(paint, own, captions, 0, pictures),
        "ours, few steps": partial(paint, few, captions, 0, pictures),
    }


def compared(calls: dict[str, Callable[[], Any]], pictures: int, rounds: int) -> Table:
    """Seconds of each call for a picture, and their ratio to the first, after a warm-up."""
    times = clock.rounds(calls, rounds + 1, time.perf_counter)
    medians = {name: statistics.median(some[1:]) / pictures for name, some in times.items()}
    table = Table("256 px", "seconds a picture", "ratio")
    for name, value in medians.items():
        table.add_row(name, f"{value:.3g}", f"{value / next(iter(medians.values())):.2f}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=lines(__doc__)[0])
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        torch.manual_seed(0)
        write_model(model, args.channels)
        calls = painters(model, Path(folder) / "exported", args.pictures)
        Console().print(compared(calls, args.pictures, args.rounds))


if __name__ == "__main__":
    main()

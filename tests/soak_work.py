"""What runs in the processes of `tests.soak`: to prepare, to train, and to compare."""

import ctypes
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.processes import cascade_in_group

BATCH = 4


def prepare(folder: str, embedded: Sequence[str]) -> int:
    """Write scenes, a CLIP, its embeddings and an index."""
    import torch

    from cascade import cli
    from cascade.config.compose import built, composed
    from cascade.data.scenes.generate import write_scenes
    from cascade.encoders.clip import save_clip

    place = Path(folder)
    write_scenes(place, "plain", "train", 30, 32, seed=0, shard_size=10)
    model = built(composed("train", ["stage=clip", f"data.path={place}", *embedded]).clip.model)
    torch.manual_seed(0)
    save_clip(model, model.build(), place / "clip")
    for verb in (["precompute", folder, "--clip", str(place / "clip")], ["index", folder]):
        if code := cli.main(["data", *verb]):
            return code
    (place / "ready").touch()
    return 0


def compare(run: str, clean: str) -> int:
    """Compare two finished runs, bit for bit: weights, average, moments, and samples."""
    import torch
    from safetensors.torch import load_file
    from torch.utils._pytree import tree_leaves

    from cascade.training.checkpoint import newest_checkpoint

    one, other = Path(run), Path(clean)
    found = [newest_checkpoint(path) for path in (one, other)]
    weights = [load_file(path / "weights.safetensors") for path in (one, other)]
    if found[0].step != found[1].step:  # the last one was not written, but the weights were
        found = found[1:] * 2
    states = [torch.load(c.path / "state.pt", weights_only=True) for c in found]
    parts = [(s["state_dict"], s["optimizer_states"], s["callbacks"]["EMA"]) for s in states]
    for a, b in zip(tree_leaves([weights[0], parts[0]]), tree_leaves([weights[1], parts[1]])):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        if not same:
            print("the weights, moments or averages differ")
            return 1
    if any(c.consumed != c.step * BATCH for c in found):
        print(f"samples were passed over: {found}")
        return 1
    if (one / "skipped.jsonl").exists():
        print((one / "skipped.jsonl").read_text())
        return 1
    return 0


def trained(argv: Sequence[str]) -> int:
    """`cascade ARGV`, which the system kills when the process that forked it ends (prctl)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    return cascade_in_group(argv)


def is_late(now: float) -> int:
    return int(time.time() - now < 1800)

"""Exact float64 values of the papers' formulas, by topic."""

import json
from pathlib import Path
from typing import Any

import torch

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text())


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)

"""Shapes in signatures are checked in the tests, and nothing is ever fetched."""

import json
import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# Before anything of ours is imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
install_import_hook("cascade", "beartype.beartype")


@pytest.fixture(scope="session")
def vectors():
    """Exact float64 values of the papers' formulas, by topic."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text())

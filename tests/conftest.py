"""Shapes in signatures are checked in the tests, and nothing is ever fetched."""

import os

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

from jaxtyping import install_import_hook

install_import_hook("cascade", "beartype.beartype")

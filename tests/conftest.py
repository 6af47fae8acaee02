"""Shapes in signatures are checked in the tests, and nothing is ever fetched."""

import json
import os
import sys
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


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that must not appear; importing `hostile_module` writes it as well."""
    file, folder = tmp_path / "canary", tmp_path / "modules"
    folder.mkdir()
    (folder / "hostile_module.py").write_text(f"open({str(file)!r}, 'w')\ndef make(): pass\n")
    monkeypatch.syspath_prepend(folder)
    yield file
    assert not file.exists(), "the code of a stranger ran"
    assert "hostile_module" not in sys.modules


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Stand-ins for Slurm's programs: what they were asked is in `asked`."""
    from tests.launching import program

    folder = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    note = f'echo "$(basename $0) $*" >> {folder}/asked'
    program(folder, "squeue", f"[ ! -e {folder}/queue ] || cat {folder}/queue")
    program(folder, "sbatch", f"{note}\necho $(($(grep -c ^sbatch {folder}/asked) + 100))")
    program(folder, "scontrol", note)
    program(folder, "sleep", note)
    return folder

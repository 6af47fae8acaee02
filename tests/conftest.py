"""Shapes in signatures are checked in the tests, and nothing is ever fetched."""

import os
import sys

import pytest
from jaxtyping import install_import_hook

# Before torch and our own modules are imported.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each use all cores slow each other down
    os.environ.setdefault("OMP_NUM_THREADS", "1")
install_import_hook("cascade", "beartype.beartype")


def pytest_terminal_summary(terminalreporter):
    """Print the table of the drills, whose rows may come from several processes."""
    passed = terminalreporter.stats.get("passed", [])
    rows = [row for test in passed for key, row in test.user_properties if key == "drill"]
    if rows:
        head = ("fault", "ranks", "exit codes", "what happened", "samples lost")
        for row in (head, 5 * ("---",), *rows):
            terminalreporter.write_line("| " + " | ".join(map(str, row)) + " |")


@pytest.fixture(scope="session", autouse=True)
def _autograd_without_threads():
    """Starts autograd before `describe` does, for which torch pretends that there is a CUDA device.

    Autograd decides in the first backward pass whether devices need threads, and a process that has
    such threads cannot fork ranks.
    """
    import torch

    torch.ones((), requires_grad=True).backward()


@pytest.fixture(scope="session")
def vectors():
    from tests.exact import VECTORS

    return VECTORS


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

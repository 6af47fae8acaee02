"""CONTRIBUTING.md, followed to the letter in a copy of the package."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.slurm.code import copied

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
# Runs the page's commands one after the other, so that the imports are paid for once.
DRIVER = """
import shlex, sys
from cascade.cli import main
for line in sys.stdin.read().splitlines():
    program, *arguments = shlex.split(line)
    if program != "cascade" or main(arguments):
        sys.exit(f"failed: {line}")
"""


def place(path, package, work):
    """Where a file that the page names lies: runs in the working folder, all else in the copy."""
    if path.parts[0] == "runs":
        return work / path
    return package / path if path.parts[0] == "cascade" else package / "cascade" / path


def written(text, package, work):
    """Writes a block to the file that its first line names."""
    first, _, body = text.partition("\n")
    name, how = re.fullmatch(r"# ([\w./]+)(?:, (at the end|in \w+))?", first).groups()
    path = place(Path(name), package, work)
    assert path.exists() == bool(how), name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(joined(path.read_text(), how, body) if how else body)


def joined(source, how, body):
    """A module with a block at its end, or behind the last entry of a table or field of a class."""
    if how == "at the end":
        return f"{source}\n\n{body}"
    lines, name = source.splitlines(keepends=True), how.removeprefix("in ")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            end = node.end_lineno - 1  # before the bracket
        elif isinstance(node, ast.ClassDef) and node.name == name:
            end = max(field.end_lineno for field in node.body if isinstance(field, ast.AnnAssign))
    return "".join([*lines[:end], body, *lines[end:]])


@pytest.mark.slow
def test_the_page_can_be_followed(tmp_path):
    package, work = copied(tmp_path / "code"), tmp_path / "work"
    work.mkdir()
    commands = []
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "sh":
            commands += text.splitlines()
        else:
            written(text, package, work)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(commands),
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (work / "icon.png").exists()
    files = [*work.rglob("weights.safetensors"), *work.rglob("open_clip_model.safetensors")]
    weights = {str(path.parent.relative_to(work)) for path in files}
    points = {f"runs/widths/{channels}-s0/icon" for channels in (8, 16)}
    assert weights == {"runs/icon", "runs/read", "runs/clip", *points}
    numbers = json.loads((work / "runs/painted.evaluation/numbers.json").read_text())
    assert "diversity" in json.dumps(numbers)

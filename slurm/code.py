"""The code that a job runs: a copy, made when the job is sent.

The copy has the layout of an installed package (`cascade/eval`, `cascade/conf`, ...), whatever that
of the source is, and is named by what is in it: equal code is copied once.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from cascade.errors import UserError

_COPY = "code-"
_PACKAGES = ("cascade", "cascade.eval", "cascade.conf", "cascade.slurm")


def copied(folder: Path) -> Path:
    """Copies the package `cascade` as it is now; returns what `PYTHONPATH` should be."""
    files = dict(_files())
    copy = folder.absolute() / f"{_COPY}{_digest(files)}"
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for name, path in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
        beside.chmod(0o755)
        try:
            os.replace(beside, copy)
        except OSError:  # another was faster
            shutil.rmtree(beside)
    return copy


def digest_of(copy: Path) -> str:
    """What a task is told of the code that it is to run."""
    return copy.name.removeprefix(_COPY)


def check(digest: str) -> None:
    """Raises UserError if the code that runs is not what was copied: PYTHONPATH was lost."""
    if _digest(dict(_files())) != digest:
        found = next(iter(find_spec("cascade").submodule_search_locations))
        raise UserError(
            f"this runs the code in {found}, not what was frozen when it was sent ({digest}): see "
            "what takes PYTHONPATH away (a container, the preamble, the interpreter), or send again"
        )


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _files() -> Iterator[tuple[str, Path]]:
    for package in _PACKAGES:
        spec = find_spec(package)
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in root.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package.replace('.', '/')}/{path.relative_to(root)}", path


def commit() -> dict[str, str | bool]:
    """The commit that the code is of, and whether it was changed since; empty without git."""
    source = Path(next(iter(find_spec("cascade").submodule_search_locations)))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not merely inside of some repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}

"""Frozen copies of the package, so that a queued job runs the code that was submitted.

A copy has the layout of an installed package (`cascade/eval`, `cascade/conf`, ...), whatever the
source's layout. Its name contains a digest of its content, so equal code is copied only once.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from cascade.config.allowlist import trusted
from cascade.errors import UserError

_COPY = "code-"
_PACKAGES = ("cascade", "cascade.eval", "cascade.conf", "cascade.slurm")


def copied(folder: Path) -> Path:
    """Copy the package `cascade` as it is now; return the `PYTHONPATH` that selects the copy."""
    files = _files()
    copy = folder.absolute() / f"{_COPY}{_digest(files)}"
    if not copy.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".code-", dir=folder))
        for name, path in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary / name)
        temporary.chmod(0o755)
        try:
            os.replace(temporary, copy)
        except OSError:  # another process made the same copy first
            shutil.rmtree(temporary)
    return copy


def digest_of(copy: Path) -> str:
    """Return the digest in a copy's name, which a task compares with the code that it runs."""
    return copy.name.removeprefix(_COPY)


def trusting() -> list[str]:
    """The options that make a task trust the modules that the command line trusts here."""
    return [word for module in trusted() for word in ("--trust", module)]


def check(digest: str) -> None:
    """Raise UserError if the running code is not the frozen copy, because PYTHONPATH was lost."""
    if _digest(_files()) != digest:
        raise UserError(
            f"this job runs the code in {_root('cascade')}, not what was frozen on submission "
            f"({digest}): find what drops PYTHONPATH (container, preamble, interpreter), or submit "
            "again"
        )


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _files() -> dict[str, Path]:
    return {
        f"{package.replace('.', '/')}/{path.relative_to(root)}": path
        for package, root in {name: _root(name) for name in _PACKAGES}.items()
        for path in root.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def _root(package: str) -> Path:
    return Path(next(iter(find_spec(package).submodule_search_locations)))


def commit() -> dict[str, str | bool]:
    """Return the commit of the code and whether files differ from it; empty without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_root("cascade")), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not some enclosing repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {}

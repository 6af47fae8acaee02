"""Check the installed packages by their metadata, so that nothing broken is imported here.

Whether it can be imported, and what its CUDA finds, is asked in a process of its own (`probe`).
"""

import platform
import re
from collections.abc import Iterator
from importlib import metadata

from cascade.doctor.finding import Finding, note, problem, warning

OURS = "cascade-diffusion"
STOLEN = {"lightning": {"2.6.2", "2.6.3"}, "pytorch-lightning": {"2.6.2", "2.6.3"}}
INSTALL = "set the environment up again (`make setup`, or `pip install` of that version)"


def bounds() -> dict[str, str]:
    """The packages that Cascade requires without extras, and their versions, as ">=2.6.6,<2.7".

    Empty if it is not installed as a package.
    """
    try:
        lines = metadata.requires(OURS) or []
    except metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w.-]+)\s*([^;]*)", line) for line in lines if "extra ==" not in line)
    return {match[1]: match[2].strip() for match in found if match}


def version(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """The versions of Python, the system, and every package that Cascade requires."""
    system = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return {**system, **{name: version(name) for name in (OURS, *bounds())}}


def packages() -> Iterator[Finding]:
    """Report packages that are missing, have a wrong version, or are known to be malicious."""
    for name, bad in STOLEN.items():
        if (found := version(name)) in bad:
            yield problem(
                f"{name} {found} is a malicious release that steals credentials",
                "remove this environment, and replace every password and key that it could read",
            )
    needed = bounds()
    if not needed:
        yield warning(
            f"{OURS} is not installed as a package, so its requirements are unknown",
            "`pip install -e .` in its folder",
        )
        return
    yield from _within(needed)
    shown = ("torch", "lightning", "transformers", "open_clip_torch", "hydra-core", "webdataset")
    there = [f"{name} {found}" for name in shown if (found := version(name))]
    yield note(f"Python {platform.python_version()}, {', '.join(there)}")


def _within(needed: dict[str, str]) -> Iterator[Finding]:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        yield problem("packaging is not installed, so versions cannot be compared", INSTALL)
        return
    for name, asked in needed.items():
        found = version(name)
        if found is None:
            yield problem(f"{name} is not installed", f"install {name}{asked}: {INSTALL}")
        elif not SpecifierSet(asked).contains(found, prereleases=True):
            yield problem(f"{name} is {found}, but {asked} is needed", INSTALL)

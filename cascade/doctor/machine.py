"""Check the machine as this process sees it: CPUs, memory, disks and environment variables."""

import fcntl
import math
import os
import resource
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cascade.doctor.finding import Finding, note, problem, warning
from cascade.files import processors
from cascade.files.locks import NO_LOCKS

GIB = 2**30
FULL, TIGHT = 1 * GIB, 10 * GIB  # free bytes of a disk: a problem, a warning
SHARED = 256 * 2**20  # bytes of /dev/shm; a container has 64 MiB by default
FILES = 1024  # open files: tars, embeddings, and the workers' pipes

# The SLURM_* variables that locate Slurm. All others are read by srun and sbatch as options.
_HARMLESS = {"SLURM_CONF", "SLURM_ROOT", "SLURM_TIME_FORMAT"}


def machine(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Run the checks that do not depend on a path."""
    yield from threads(environment)
    yield from memory()
    yield from slurm(environment)
    yield from caches(environment)


def threads(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Compare the number of threads that was asked for with the CPUs available."""
    allowed = processors.available(environment)
    whole = max(1, math.floor(allowed))
    yield note(f"{allowed:g} of {os.cpu_count()} CPUs may be used")
    given = {name: environment[name] for name in processors.COUNTS if name in environment}
    for name, value in given.items():
        count = value.split(",")[0].strip()
        if not count.isdigit() or int(count) < 1:
            yield warning(f"{name} is no number of threads", f"export {name}={whole}, or unset it")
        elif int(count) > math.ceil(allowed):
            yield warning(
                f"{name}={count}, and {allowed:g} CPUs may be used: threads wait for each other",
                f"export {name}={whole}",
            )


def memory() -> Iterator[Finding]:
    """Check shared memory, through which data workers pass batches, and the limit of open files."""
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < SHARED:
        yield warning(
            f"/dev/shm has {size // 2**20} MiB: with workers=1 or more, training dies of a "
            "bus error when batches do not fit",
            "give the container more (docker run --shm-size=8g), or train with workers=0",
        )
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < FILES:
        more = "" if hard == resource.RLIM_INFINITY else f", of at most {hard}"
        yield warning(f"only {most} files may be open at a time", f"ulimit -n {FILES}{more}")


def slurm(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Report variables that change jobs, by name only: values may identify a person."""
    ours = sorted(name for name in environment if name.startswith("SBATCH_"))
    if ours:
        yield warning(
            f"{', '.join(ours)}: for sbatch such a variable overrides the options in a script",
            f"unset {' '.join(ours)}, and set launcher.KEY=VALUE instead",
        )
    theirs = sorted(n for n in environment if n.startswith("SLURM_") and n not in _HARMLESS)
    if "SLURM_JOB_ID" in environment:
        yield warning(
            f"this is inside a Slurm job, whose {len(theirs)} SLURM_* variables are inherited by "
            "jobs submitted from here",
            "submit jobs from a shell outside of any job",
        )
    elif theirs:
        yield warning(
            f"{', '.join(theirs)}: srun and sbatch read such variables as options",
            f"unset {' '.join(theirs)}",
        )


def caches(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Report where models are looked for, according to the environment."""
    home = environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub")
    named = [name for name in ("HF_HUB_CACHE", "HF_HOME") if environment.get(name)]
    if named and not cache.is_dir():
        yield warning(
            f"{named[0]} leads to {cache}, which is no folder: no model is found by its name",
            f"mend or unset {named[0]}, or give models as directories",
        )
    elif cache.is_dir() and not os.access(cache, os.R_OK | os.X_OK):
        yield warning(f"{cache} cannot be read: no model is found by its name", "change its rights")
    offline = [n for n in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if environment.get(n)]
    said = f" ({', '.join(offline)} set)" if offline else ""
    where = f"looked for in {cache}" if cache.is_dir() else f"not found, as there is no {cache}"
    yield note(f"models given by name are {where}{said}; none is ever fetched")
    if environment.get("WDS_SECURE"):
        yield warning("WDS_SECURE is set: webdataset refuses pipes and URLs", "unset WDS_SECURE")


def disks(places: Iterable[Path]) -> Iterator[Finding]:
    """Report the free space of each disk that may be written to."""
    seen = set()
    for place in places:
        there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        if (device := there.stat().st_dev) in seen or not os.access(there, os.W_OK):
            continue
        seen.add(device)
        space = shutil.disk_usage(there)
        inodes = os.statvfs(there)
        if inodes.f_files and not inodes.f_favail:
            yield problem(f"{there}: no file can be added (no inodes)", "remove files there")
        said = f"{there}: {space.free / GIB:,.1f} GiB free"
        if space.free < FULL:
            yield problem(f"{said}, too few for a checkpoint", "make room, or write elsewhere")
        elif space.free < TIGHT:
            yield warning(f"{said}, which is soon used up", "make room, or write elsewhere")
        else:
            yield note(said)


def locks(folder: Path) -> Iterator[Finding]:
    """Check that processes that share a folder can claim work by file locks."""
    if not os.access(folder, os.W_OK):
        yield note("it cannot be written to: nothing can be added to it from here")
        return
    remedy = "mount it with locks (Lustre: -o flock; NFS: without nolock and local_lock)"
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            yield warning(
                f"the file system of {folder} has no locks: jobs that share work wait three "
                "minutes before they take over from one that died",
                remedy,
            )
            return
    kind, options = _mount(folder)
    if {"localflock", "nolock", "local_lock=all", "local_lock=posix"} & {*options.split(",")}:
        yield warning(
            f"{folder} is on {kind} with local locks, which processes of other machines do not "
            "see: two machines may do the same work",
            remedy,
        )
    else:
        yield note(f"files can be locked ({kind})")


def _mount(folder: Path) -> tuple[str, str]:
    """The type and the mount options of a folder's file system."""
    best, found = -1, ("", "")
    mounts = (line.split(" ") for line in processors.lines_of("/proc/self/mounts"))
    for _, where, kind, options, *_ in mounts:
        place = Path(where.replace("\\040", " "))
        if folder.resolve().is_relative_to(place) and len(place.parts) > best:
            best, found = len(place.parts), (kind, options)
    return found

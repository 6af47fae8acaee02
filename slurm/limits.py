"""Limits that a cluster sets, as Slurm reports them: time limits and the size of job arrays."""

import re
from collections.abc import Iterator

from cascade.errors import UserError
from cascade.formats.texts import lines
from cascade.slurm.queue import slurm

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_NO_LIMIT = {"UNLIMITED", "INFINITE", "-1", "0"}


def seconds(limit: str | int) -> int | None:
    """Convert a time limit in sbatch's notation to seconds; None if unlimited.

    Raises:
        UserError: it is not one of minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
    """
    text = str(limit).strip()
    if text.upper() in _NO_LIMIT:
        return None
    if not (found := _TIME.fullmatch(text)):
        raise UserError(
            f"{text!r} is not a time limit: write minutes, HH:MM:SS or D-HH, as for sbatch"
        )
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is None:  # MM, MM:SS or HH:MM:SS
        parts = parts if len(parts) == 3 else [0, *parts]
    hours, minutes, rest = [*parts, 0, 0][:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def partition_limits(names: str | None) -> Iterator[tuple[str, str]]:
    """Yield the name and default time limit of each named partition that has one.

    Args:
        names: comma-separated, as for sbatch; None: the default partition.
    """
    for line in lines(slurm("scontrol", "show", "partition", "--oneliner")):
        has = dict(word.partition("=")[::2] for word in line.split())
        wanted = has["PartitionName"] in names.split(",") if names else has["Default"] == "YES"
        limit = has["MaxTime"] if has["DefaultTime"] == "NONE" else has["DefaultTime"]
        if wanted and limit not in _NO_LIMIT:
            yield has["PartitionName"], limit


def largest_array() -> int | None:
    """Return the largest number of tasks in one array; None if Slurm does not report it.

    Raises:
        UserError: the cluster has no job arrays.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.M)
    if found and int(found[1]) == 0:
        raise UserError("this Slurm has no job arrays (MaxArraySize=0): choose launcher=local")
    return int(found[1]) if found else None

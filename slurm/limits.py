"""What a cluster allows, in its own words: time limits, and how long an array may be."""

import re
from collections.abc import Iterator, Mapping

from cascade.errors import UserError
from cascade.slurm.queue import slurm
from cascade.texts import lines

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_NO_LIMIT = {"UNLIMITED", "INFINITE", "-1", "0"}


def seconds(limit: str | int) -> int | None:
    """A time limit as sbatch writes it; None: there is no limit.

    Raises:
        UserError: it is none of minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS.
    """
    text = str(limit).strip()
    if text.upper() in _NO_LIMIT:
        return None
    if not (found := _TIME.fullmatch(text)):
        raise UserError(f"{text!r} is no time limit of Slurm's: write minutes, HH:MM:SS or D-HH")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, minutes, rest = [*parts, 0, 0][:3]
        return ((int(found["days"]) * 24 + hours) * 60 + minutes) * 60 + rest
    hours, minutes, rest = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + rest


def partition_limits(names: str | None) -> Iterator[tuple[str, str]]:
    """Name and limit of each partition in a list, where its jobs have one without asking.

    Args:
        names: as sbatch takes them, with commas; None: the default partition.
    """
    for line in lines(slurm("scontrol", "show", "partition", "--oneliner")):
        has = _fields(line)
        wanted = has["PartitionName"] in names.split(",") if names else has["Default"] == "YES"
        limit = has["MaxTime"] if has["DefaultTime"] == "NONE" else has["DefaultTime"]
        if wanted and limit not in _NO_LIMIT:
            yield has["PartitionName"], limit


def largest_array() -> int | None:
    """Tasks in one array at most; None: Slurm does not say.

    Raises:
        UserError: the cluster has no job arrays.
    """
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", slurm("scontrol", "show", "config"), re.M)
    if found and int(found[1]) == 0:
        raise UserError("this Slurm has no job arrays (MaxArraySize=0): choose launcher=local")
    return int(found[1]) if found else None


def _fields(line: str) -> Mapping[str, str]:
    return dict(word.partition("=")[::2] for word in line.split())

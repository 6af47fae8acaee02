"""How a batch script is handed to sbatch: what it asks for is what the job gets.

sbatch ranks its SBATCH_* variables above the lines of a script. So these lines are given as
arguments too, which rank highest, and variables that would ask for something else are taken out
and named. The others are the user's defaults for what the launcher leaves open.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cascade.slurm.queue import outside_jobs, slurm

# Variables that are not called as the option that they set.
_SET = {"TIMELIMIT": "time", "ARRAY_INX": "array", "NO_REQUEUE": "requeue", "MEM_PER_NODE": "mem"}
_EITHER = (  # options of which one rules the others out
    {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"},
    {"mem", "mem-per-cpu", "mem-per-gpu"},
)
# How many GPUs is always asked, if only by not asking for one. Nobody waits for the jobs here, and
# they are looked for in the queue of this cluster.
_ALWAYS = {"gpus", "wait", "clusters"}
_SHORT = {"p": "partition", "t": "time", "A": "account", "C": "constraint", "q": "qos"}


def sent(script: Path, options: Sequence[str]) -> str:
    """The number of the array that sbatch makes of a script."""
    without = set(overruled(options))
    env = {key: value for key, value in outside_jobs().items() if key not in without}
    return slurm("sbatch", "--parsable", *options, str(script), env=env).strip().split(";")[0]


def overruled(options: Sequence[str]) -> list[str]:
    """The SBATCH_* variables of the environment that are not heeded beside these options."""
    asked = {*map(_name, options), *_ALWAYS}
    asked |= {one for either in _EITHER if either & asked for one in either}
    return [key for key in sorted(os.environ) if key.startswith("SBATCH_") and _sets(key) in asked]


def note(overruled: Iterable[str]) -> Iterator[str]:
    """What is to be said of the environment, in a line, if there is anything."""
    parts = [f"{key}={os.environ[key]}" for key in sorted(overruled)]
    if job := os.environ.get("SLURM_JOB_ID"):
        parts.append(f"the SLURM_* variables of job {job}")
    if parts:
        yield f"not passed on to sbatch: {', '.join(parts)}"


def value(options: Sequence[str], name: str, variable: str) -> str | None:
    """What an option is in the end: the last one given, or else the environment's."""
    given = [_stated(option)[1] for option in options if _name(option) == name]
    return given[-1] if given else os.environ.get(variable)


def _sets(variable: str) -> str:
    word = variable.removeprefix("SBATCH_")
    return _SET.get(word, word.lower().replace("_", "-"))


def _name(option: str) -> str:
    return _stated(option)[0]


def _stated(option: str) -> tuple[str, str]:
    """Name and value of `--name=value` or `-nvalue`."""
    if short := re.fullmatch(r"-(\w)[\s=]*(.*)", option):
        return _SHORT.get(short[1], short[1]), short[2]
    name, _, given = option.removeprefix("--").partition("=")
    return name, given

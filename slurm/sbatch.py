"""Submission of a batch script, such that the job gets exactly what the script requests.

For sbatch, SBATCH_* environment variables take precedence over the directives in a script. The
directives are therefore passed as arguments as well, which take precedence over both. Conflicting
variables are removed and reported; the others remain the user's defaults for what the launcher
leaves unset.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cascade.slurm.queue import outside_jobs, slurm

# Variables that are not named after the option that they set.
_SET = {"TIMELIMIT": "time", "ARRAY_INX": "array", "NO_REQUEUE": "requeue", "MEM_PER_NODE": "mem"}
_EITHER = (  # mutually exclusive options
    {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket"},
    {"mem", "mem-per-cpu", "mem-per-gpu"},
)
# The number of GPUs is always decided here, also when it is none. The launcher never waits for a
# job, and looks for jobs in the queue of this cluster only.
_ALWAYS = {"gpus", "wait", "clusters"}
_SHORT = {"p": "partition", "t": "time", "A": "account", "C": "constraint", "q": "qos"}


def submit(script: Path, options: Sequence[str]) -> str:
    """Submit a script; return the number of the job array."""
    without = set(overruled(options))
    env = {key: value for key, value in outside_jobs().items() if key not in without}
    return slurm("sbatch", "--parsable", *options, str(script), env=env).strip().split(";")[0]


def overruled(options: Sequence[str]) -> list[str]:
    """Return the SBATCH_* variables of the environment that conflict with these options."""
    asked = {*(_split(option)[0] for option in options), *_ALWAYS}
    asked |= {one for either in _EITHER if either & asked for one in either}
    return [
        key for key in sorted(os.environ) if key.startswith("SBATCH_") and _option_of(key) in asked
    ]


def note(overruled: Iterable[str]) -> Iterator[str]:
    """Yield a line that reports what is not passed on from the environment, if anything."""
    parts = [f"{key}={os.environ[key]}" for key in sorted(overruled)]
    if job := os.environ.get("SLURM_JOB_ID"):
        parts.append(f"the SLURM_* variables of job {job}")
    if parts:
        yield f"not passed on to sbatch: {', '.join(parts)}"


def value(options: Sequence[str], name: str, variable: str) -> str | None:
    """Return an option's effective value: the last one given, or else the environment's."""
    return dict(map(_split, options)).get(name, os.environ.get(variable))


def _option_of(variable: str) -> str:
    word = variable.removeprefix("SBATCH_")
    return _SET.get(word, word.lower().replace("_", "-"))


def _split(option: str) -> tuple[str, str]:
    """Split `--name=value` or `-nvalue` into name and value."""
    if short := re.fullmatch(r"-(\w)[\s=]*(.*)", option):
        return _SHORT.get(short[1], short[1]), short[2]
    name, _, given = option.removeprefix("--").partition("=")
    return name, given

"""The Slurm launcher: each group of a plan becomes one job array, each task one array element.

The batch script runs `srun` with one process per GPU and acts on the exit code of the first process
that failed. 75 means that a checkpoint was written; 134, 137 and 138 mean death by a signal that
another attempt may survive. All of these requeue the one element. So does a task that exits without
recording that it finished, because srun returns 0 when a node is lost. At most `max_restarts`
restarts in a row may end without a newer checkpoint. A task that stated why it failed is never
requeued.

Attempts are numbered in the task's folder, so that a script that outlives the connection to its
node leaves the files of a newer attempt alone.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.runs.done import ATTEMPT, DONE, FAILURE
from cascade.runs.run import CHECKPOINTS, EVENTS
from cascade.slurm import sbatch
from cascade.slurm.code import digest_of, trusting
from cascade.slurm.limits import largest_array, partition_limits, seconds
from cascade.slurm.plan import LOG, Submission, Task, TaskGroup
from cascade.slurm.queue import COMMENT, Job, jobs

# Slurm may signal up to a minute early, and a process handles signals only after its imports.
_EARLY, _IMPORTS = 60, 60

_SCRIPT = """\
#!/usr/bin/env bash
{directives}

case $SLURM_ARRAY_TASK_ID in
{tasks}
esac
exec >>"$folder/{log}" 2>&1
restarts=${{SLURM_RESTART_COUNT:-0}}
job=${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}
echo "cascade: job $job on $SLURM_JOB_NODELIST, restart $restarts, $(date --iso-8601=seconds)"
newest() {{ ls -d "$folder"/{checkpoints}/step-* 2>/dev/null | sed -n '$s:.*/::p'; }}
note() {{
    echo "$attempt $vain $begun" >"$folder/.{attempt}-$attempt" &&
        mv "$folder/.{attempt}-$attempt" "$folder/{attempt}"
}}
# This attempt's number, the attempts in a row without a newer checkpoint, the newest checkpoint.
attempt=0 vain=0 before='' begun=$(newest)
[ ! -e "$folder/{attempt}" ] || read -r attempt vain before <"$folder/{attempt}"
vain=$((vain + 1)) attempt=$((attempt + 1))
[ "$restarts" != 0 ] && [[ ! $begun > $before ]] || vain=0
note || exit 1 # the disk is full
export CASCADE_FOLDER=$folder CASCADE_ATTEMPT=$attempt
export CASCADE_FAILURE=$folder/.failure-$attempt CASCADE_FIRST=$folder/.first-$attempt
rm -f "$folder/{failure}" "$folder/{done}" "$folder"/.failure-* "$folder"/.first-*
if [ "$vain" -gt {max_restarts} ]; then
    echo "no newer checkpoint in $vain attempts, and max_restarts is {max_restarts}" \\
        >"$folder/{failure}"
    exit 1
fi
{preamble}
export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1
# If sbatch was given --export, srun would inherit it and drop the variables above.
export SLURM_EXPORT_ENV=ALL
# srun returns the greatest exit code, often that of a process killed because another failed.
srun --export=ALL --kill-on-bad-exit=1 {each} sh -c 'trap : TERM USR1 USR2; "$@"; code=$?; set -C
[ $code = 0 ] || {{ echo $code >"$CASCADE_FIRST"; }} 2>/dev/null; exit $code' sh \\
    {python} -m cascade --code {digest}{trusting} "${{command[@]}}"
code=$?
[ $code = 0 ] || read -r code 2>/dev/null <"$CASCADE_FIRST"
read -r latest _ <"$folder/{attempt}"
if [ "$latest" != "$attempt" ]; then
    echo "cascade: attempt $attempt ends with $code; attempt $latest has taken over"
    exit 75
elif [ $code != 0 ]; then
    rm -f "$folder/{done}"
    # Else the SIGTERM with which srun ends the other ranks would look like a preemption.
    if [ $code != 75 ] && [ -s "$CASCADE_FIRST" ] && [ -e "$folder/{events}" ]; then
        printf '{{"time": %s, "event": "failed", "exit_code": %s}}\\n' "$(date +%s.%3N)" $code \\
            >>"$folder/{events}"
    fi
elif ! grep -qs "\\"attempt\\": $attempt," "$folder/{done}"; then
    echo "cascade: exit code 0, but the task did not finish, as when its node is lost"
    code=137
fi
case $code in
0) ;;
75 | 134 | 137 | 138)
    if [[ $(newest) > $begun ]]; then
        vain=-1
    elif [ $code = 138 ] || {{ [ $code = 75 ] && tail -n 1 "$folder/{events}" 2>/dev/null |
        grep -q SIGUSR1; }}; then # a time limit too short for one step counts twice
        vain=$((vain + 1))
        note
    fi
    if [ -e "$CASCADE_FAILURE" ]; then
        :
    elif [ $((vain + 1)) -gt {max_restarts} ]; then
        echo "exit code $code; no newer checkpoint in $((vain + 1)) attempts, and max_restarts" \\
            "is {max_restarts}" >"$CASCADE_FAILURE"
    elif scontrol requeue "$job"; then
        echo "cascade: exit code $code, requeued"
        sleep 60 # until Slurm ends this attempt
    fi
    ;;
*) [ -e "$CASCADE_FAILURE" ] || echo "exit code $code" >"$CASCADE_FAILURE" ;;
esac
[ ! -e "$CASCADE_FAILURE" ] || mv "$CASCADE_FAILURE" "$folder/{failure}"
exit $code
"""


@dataclass(frozen=True)
class Slurm:
    """Submits tasks to Slurm, and does not wait for them.

    Args:
        partition, account, constraint: as for sbatch.
        time: limit of one attempt, as for sbatch ("08:00:00", or minutes).
        nodes: nodes per training.
        gpus: GPUs per node, with one process each; 0: one process, on CPUs.
        cpus: CPUs per process.
        container: inserted between srun and python: options of pyxis (`--container-image=IMG`), or
            a command (`apptainer exec --nv IMG.sif`).
        preamble: lines of shell to run before srun (`module load ...`).
        options: further options for sbatch (`--qos=high`).
        max_restarts: restarts in a row that may end without a newer checkpoint, for whatever
            reason; a time limit that was too short for one step counts twice.
        signal_seconds: how long before the time limit a training is signalled to checkpoint.
        at_once: array elements that may run concurrently; None: no limit.
        python: the interpreter; None: the current one.
    """

    partition: str | None
    account: str | None
    time: str | int | None
    nodes: int
    gpus: int
    cpus: int | None
    constraint: str | None
    container: str | None
    preamble: str | None
    options: Sequence[str]
    max_restarts: int
    signal_seconds: int
    at_once: int | None
    python: str | None

    def __post_init__(self) -> None:
        if self.time is not None:
            self._check_limit(self.time, f"launcher.time={self.time}")

    def ranks(self, resources: Mapping[str, Any]) -> Mapping[str, int]:
        own = self._with(resources)
        return {"devices": max(own.gpus, 1), "num_nodes": own.nodes}

    def held(self, folders: Sequence[Path]) -> Mapping[Path, Job]:
        found = jobs()
        return {folder: found[folder] for folder in folders if folder in found}

    def start(self, submission: Submission) -> None:
        """Submit one job array per group with remaining tasks, or several if one is too large."""
        arrays: dict[str, list[str]] = {}
        left = submission.left
        groups = [(group, self._for(group)) for group in submission.groups if left[group.name]]
        for group, own in groups:  # before anything is submitted
            own._check(group, submission)
        most = largest_array() if any(len(left[group.name]) > 1 for group, _ in groups) else None
        ignored: set[str] = set()
        for group, own in groups:
            before, pairs = _dependencies(group, submission, arrays)
            arrays[group.name] = jobs = []
            for i, part in enumerate(submission.parts(group, most)):
                waits = [f"afterok:{':'.join(before)}"] if before else []
                waits += [f"aftercorr:{pairs[i]}"] if pairs else []
                waits += [f"afterany:{jobs[-1]}"] if jobs and own.at_once else []
                options = own.options_of(group, part, waits)
                script = part.record(group).with_name("script.sh")
                script.write_text(own.script(group, part, options))
                ignored.update(sbatch.overruled(options))
                jobs.append(sbatch.submit(script, options))
                print(f"{group.name}: job {jobs[-1]}, {len(part.left[group.name])} to run")
        for line in sbatch.note(ignored):
            print(line)

    def _for(self, group: TaskGroup) -> "Slurm":
        alone = {"nodes": 1, "gpus": min(self.gpus, 1)} if group.alone else {}
        return self._with({**alone, **group.resources})

    def _check(self, group: TaskGroup, submission: Submission) -> None:
        """Raise UserError for what Slurm would accept but cannot carry out."""
        for letter in str(submission.record(group)):
            if letter == "\\" or ord(letter) < 32:
                root = submission.root
                raise UserError(f"{root}: Slurm drops {letter!r} in names: choose another run=...")
        options = self.options_of(group, submission)
        if limit := sbatch.value(options, "time", "SBATCH_TIMELIMIT"):
            self._check_limit(limit, f"{group.name}: the time limit {limit}")
            return
        for name, limit in partition_limits(sbatch.value(options, "partition", "SBATCH_PARTITION")):
            self._check_limit(limit, f"{group.name}: the default limit {limit} of partition {name}")

    def _check_limit(self, limit: str | int, what: str) -> None:
        least = self.signal_seconds + _EARLY + _IMPORTS
        if (given := seconds(limit)) is not None and given < least:
            raise UserError(
                f"{what} is too short: a training is signalled {self.signal_seconds} s before it; "
                f"give at least launcher.time={-(-least // 60)} (minutes), or a smaller "
                "launcher.signal_seconds"
            )

    def _with(self, resources: Mapping[str, Any]) -> "Slurm":
        known = [field.name for field in fields(self)]
        if unknown := resources.keys() - set(known):
            raise UserError(f"resources: {min(unknown)} is none of {', '.join(known)}")
        return replace(self, **resources)

    def script(self, group: TaskGroup, submission: Submission, options: Sequence[str]) -> str:
        """Return the batch script for a group's remaining tasks, with the options as directives."""
        tasks = submission.left[group.name]
        cpus = f"--cpus-per-task={self.cpus}" if self.cpus else ""  # srun does not inherit it
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {shlex.quote(option)}" for option in options),
            tasks="\n".join(_case(i, task) for i, task in enumerate(tasks)),
            log=LOG,
            checkpoints=CHECKPOINTS,
            events=EVENTS,
            done=DONE,
            attempt=ATTEMPT,
            preamble=self.preamble or "",
            failure=FAILURE,
            code=shlex.quote(str(submission.code)),
            digest=digest_of(submission.code),
            trusting="".join(f" {shlex.quote(word)}" for word in trusting()),
            each=" ".join(filter(None, [cpus, self.container])),
            python=shlex.quote(self.python or sys.executable),
            max_restarts=self.max_restarts,
        )

    def options_of(
        self, group: TaskGroup, submission: Submission, waits: Sequence[str] = ()
    ) -> list[str]:
        """Return sbatch's options for a group's remaining tasks; `waits` are its dependencies."""
        record = submission.record(group)
        throttle = f"%{self.at_once}" if self.at_once else ""
        given = {
            "job-name": f"{submission.root.name}/{group.name}",
            "comment": f"{COMMENT}{record}",
            "array": f"0-{len(submission.left[group.name]) - 1}{throttle}",
            "chdir": Path.cwd(),
            "output": f"{str(record.parent).replace('%', '%%')}/%a.txt",
            "open-mode": "append",
            "signal": f"USR1@{self.signal_seconds}",
            "nodes": self.nodes,
            "ntasks-per-node": max(self.gpus, 1),
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "constraint": self.constraint,
            "dependency": ",".join(waits) or None,
            "kill-on-invalid-dep": "yes" if waits else None,
        }
        stated = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return ["--requeue", *stated, *self.options]


def _dependencies(
    group: TaskGroup, submission: Submission, arrays: Mapping[str, Sequence[str]]
) -> tuple[list[str], Sequence[str]]:
    """Return the jobs that must succeed first, and the arrays to pair with element by element.

    Slurm treats a job that it has forgotten as successful. The dependencies are therefore limited
    to jobs that were just submitted or are in the queue; earlier results are read from the folders.
    """
    after, pairs = list(group.after), ()
    if group.each_after and (earlier := submission.left[group.each_after]):
        if earlier == [submission.awaited(group, task) for task in submission.left[group.name]]:
            pairs = arrays[group.each_after]
        else:  # Slurm pairs elements by index, and the indices differ
            after.append(group.each_after)
    before = [job for name in after for job in arrays.get(name, ())]
    before += [
        str(submission.held[task.folder].id)
        for earlier in submission.groups
        if earlier.name in (*group.after, group.each_after)
        for task in earlier.tasks
        if task.folder in submission.held
    ]
    return before, pairs


def _case(index: int, task: Task) -> str:
    """Return the line of the script that maps an array index to its task."""
    folder = shlex.quote(str(task.folder))
    return f"{index}) folder={folder} command=({shlex.join(task.command)}) ;;"

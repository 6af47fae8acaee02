"""Tasks as jobs of Slurm: each link of a plan is one array, each task of it one element.

The batch script runs `srun` with one process for each GPU, and decides from the exit code of the
first that ended badly: 75 is a checkpoint, 134, 137 and 138 are a death by a signal that another
attempt may outlive, and all of these requeue that one element. So does a task that did not write
down that it is finished: srun ends with 0 when a node is lost. `max_restarts` restarts in a row may
end without a newer checkpoint. Whatever says why it failed is never requeued.

Attempts are numbered in the task's folder, and a script that outlives the connection to its node
touches nothing of a newer attempt.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cascade.done import ATTEMPT, DONE, FAILURE
from cascade.errors import UserError
from cascade.slurm import sbatch
from cascade.slurm.code import digest_of
from cascade.slurm.limits import largest_array, partition_limits, seconds
from cascade.slurm.plan import LOG, Link, Sent, Task
from cascade.slurm.queue import COMMENT, Job, jobs

# Slurm may send a signal a minute before its time; and it is caught once the imports are over.
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
newest() {{ ls -d "$folder"/checkpoints/step-* 2>/dev/null | sed -n '$s:.*/::p'; }}
note() {{
    echo "$attempt $vain $begun" >"$folder/.{attempt}-$attempt" &&
        mv "$folder/.{attempt}-$attempt" "$folder/{attempt}"
}}
# This attempt's number, how many in a row before it made no newer checkpoint, and the newest.
attempt=0 vain=0 before='' begun=$(newest)
[ ! -e "$folder/{attempt}" ] || read -r attempt vain before <"$folder/{attempt}"
vain=$((vain + 1)) attempt=$((attempt + 1))
[ "$restarts" != 0 ] && [[ ! $begun > $before ]] || vain=0
note || exit 1 # the disk is full, as the log says if it can
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
# Where sbatch was told what to export, srun would export that and none of the above.
export SLURM_EXPORT_ENV=ALL
# The greatest exit code, which is srun's, is often that of a process that was ended for another.
srun --export=ALL --kill-on-bad-exit=1 {each} sh -c 'trap : TERM USR1 USR2; "$@"; code=$?; set -C
[ $code = 0 ] || {{ echo $code >"$CASCADE_FIRST"; }} 2>/dev/null; exit $code' sh \\
    {python} -m cascade --code {digest} "${{command[@]}}"
code=$?
[ $code = 0 ] || read -r code 2>/dev/null <"$CASCADE_FIRST"
read -r latest _ <"$folder/{attempt}"
if [ "$latest" != "$attempt" ]; then
    echo "cascade: attempt $attempt ends with $code; attempt $latest has taken over"
    exit 75
elif [ $code != 0 ]; then
    rm -f "$folder/{done}"
elif ! grep -qs "\\"attempt\\": $attempt," "$folder/{done}"; then
    echo "cascade: exit code 0 of a task that is not finished, as when its node is lost"
    code=137
fi
case $code in
0) ;;
75 | 134 | 137 | 138)
    if [[ $(newest) > $begun ]]; then
        vain=-1
    elif [ $code = 138 ] || {{ [ $code = 75 ] && tail -n 1 "$folder/events.jsonl" 2>/dev/null |
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
    """Sends tasks to Slurm, and does not wait for them.

    Args:
        partition, account, constraint: as sbatch has them.
        time: limit of one attempt, as sbatch has it ("08:00:00", or minutes).
        nodes: of each training.
        gpus: of each node, a process for each; 0: one process on CPUs.
        cpus: of each process.
        container: what stands between srun and python: pyxis' options (`--container-image=IMG`),
            or a command (`apptainer exec --nv IMG.sif`).
        preamble: lines of shell before srun (`module load ...`).
        options: further options of sbatch (`--qos=high`).
        max_restarts: how many restarts in a row may end without a newer checkpoint, whatever ended
            them; a time limit that was too short for one step counts twice.
        signal_seconds: how long before the limit a training is told to write its checkpoint.
        at_once: how many elements of an array run at a time; None: as many as Slurm lets.
        python: the interpreter, if it is not this one.
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

    def start(self, sent: Sent) -> None:
        """One job array for each link that has something left; several, where that is too much."""
        arrays: dict[str, list[str]] = {}
        links = [(link, self._for(link)) for link in sent.links if sent.left[link.name]]
        for link, own in links:  # before the first is sent
            own._check(link, sent)
        most = largest_array() if any(len(sent.left[link.name]) > 1 for link, _ in links) else None
        ignored: set[str] = set()
        for link, own in links:
            before, pairs = _dependencies(link, sent, arrays)
            arrays[link.name] = jobs = []
            for i, part in enumerate(sent.parts(link, most)):
                waits = [f"afterok:{':'.join(before)}"] if before else []
                waits += [f"aftercorr:{pairs[i]}"] if pairs else []
                waits += [f"afterany:{jobs[-1]}"] if jobs and own.at_once else []
                options = own.options_of(link, part, waits)
                script = part.record(link).with_name("script.sh")
                script.write_text(own.script(link, part, options))
                ignored.update(sbatch.overruled(options))
                jobs.append(sbatch.sent(script, options))
                print(f"{link.name}: job {jobs[-1]}, {len(part.left[link.name])} to run")
        for line in sbatch.note(ignored):
            print(line)

    def _for(self, link: Link) -> "Slurm":
        alone = {"nodes": 1, "gpus": min(self.gpus, 1)} if link.alone else {}
        return self._with({**alone, **link.resources})

    def _check(self, link: Link, sent: Sent) -> None:
        """Raises UserError for what Slurm would accept and could not do."""
        for letter in str(sent.record(link)):
            if letter == "\\" or ord(letter) < 32:
                raise UserError(f"{sent.root}: Slurm loses {letter!r} in names: choose another run")
        options = self.options_of(link, sent)
        if limit := sbatch.value(options, "time", "SBATCH_TIMELIMIT"):
            self._check_limit(limit, f"{link.name}: the time limit {limit}")
            return
        for name, limit in partition_limits(sbatch.value(options, "partition", "SBATCH_PARTITION")):
            self._check_limit(limit, f"{link.name}: the default limit {limit} of partition {name}")

    def _check_limit(self, limit: str | int, what: str) -> None:
        least = self.signal_seconds + _EARLY + _IMPORTS
        if (given := seconds(limit)) is not None and given < least:
            raise UserError(
                f"{what} is too short: a training is told to stop {self.signal_seconds} s before "
                f"it; give launcher.time={-(-least // 60)} (minutes) at least, or a smaller "
                "launcher.signal_seconds"
            )

    def _with(self, resources: Mapping[str, Any]) -> "Slurm":
        known = [field.name for field in fields(self)]
        if unknown := resources.keys() - set(known):
            raise UserError(f"resources: {min(unknown)} is none of {', '.join(known)}")
        return replace(self, **resources)

    def script(self, link: Link, sent: Sent, options: Sequence[str]) -> str:
        """The batch script of what is left of a link, with sbatch's options written at its top."""
        tasks = sent.left[link.name]
        cpus = f"--cpus-per-task={self.cpus}" if self.cpus else ""  # srun does not ask sbatch
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {shlex.quote(option)}" for option in options),
            tasks="\n".join(_case(i, task) for i, task in enumerate(tasks)),
            log=LOG,
            done=DONE,
            attempt=ATTEMPT,
            preamble=self.preamble or "",
            failure=FAILURE,
            code=shlex.quote(str(sent.code)),
            digest=digest_of(sent.code),
            each=" ".join(filter(None, [cpus, self.container])),
            python=shlex.quote(self.python or sys.executable),
            max_restarts=self.max_restarts,
        )

    def options_of(self, link: Link, sent: Sent, waits: Sequence[str] = ()) -> list[str]:
        """sbatch's options for what is left of a link; `waits` are dependencies, all to be met."""
        record = sent.record(link)
        throttle = f"%{self.at_once}" if self.at_once else ""
        given = {
            "job-name": f"{sent.root.name}/{link.name}",
            "comment": f"{COMMENT}{record}",
            "array": f"0-{len(sent.left[link.name]) - 1}{throttle}",
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
    link: Link, sent: Sent, arrays: Mapping[str, Sequence[str]]
) -> tuple[list[str], Sequence[str]]:
    """The jobs that must have ended well, and the arrays that a link's arrays are paired with.

    Slurm counts a job that it has forgotten as one that ended well. So there are none but those
    that were just sent or are in the queue; what ended before is read from the folders.
    """
    after, pairs = list(link.after), ()
    if link.each_after and (earlier := sent.left[link.each_after]):
        if earlier == [sent.awaited(link, task) for task in sent.left[link.name]]:
            pairs = arrays[link.each_after]
        else:  # Slurm pairs elements by their numbers, which differ
            after.append(link.each_after)
    before = [job for name in after for job in arrays.get(name, ())]
    before += [
        str(sent.held[task.folder].id)
        for earlier in sent.links
        if earlier.name in (*link.after, link.each_after)
        for task in earlier.tasks
        if task.folder in sent.held
    ]
    return before, pairs


def _case(index: int, task: Task) -> str:
    """The line of the script that says which task an element of the array is."""
    folder = shlex.quote(str(task.folder))
    return f"{index}) folder={folder} command=({shlex.join(task.command)}) ;;"

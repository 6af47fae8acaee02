"""A private Slurm of four nodes on this machine, for as long as the tests last.

munged, slurmctld and four slurmd with their own folder, key and ports, without cgroups, systemd or
accounting, as whoever runs the tests: a Slurm that the machine belongs to is never touched.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
PROGRAMS += ("setpriv",)
NODES = 4
_SYSTEM = "/usr/sbin:/sbin"

_CONF = """\
ClusterName=cascade
MaxArraySize=6
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=8
MinJobAge=3600
InactiveLimit=0
ReturnToService=2
NodeName=n[1-{nodes}] NodeHostname=localhost Port=[{ports[1]}-{ports[4]}] CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=high Nodes=ALL PriorityTier=2
PartitionName=short Nodes=ALL DefaultTime=5
"""


def missing() -> list[str]:
    """Which of Slurm's programs are not on this machine."""
    path = os.environ["PATH"] + ":" + _SYSTEM
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


class Cluster:
    """Starts with `start`; `env` is what its commands need.

    Args:
        folder: of everything that it writes; its path is short (a socket lies there).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self._requeued: dict[tuple[str, str], float] = {}
        path = os.environ["PATH"] + ":" + _SYSTEM
        self.env = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        conf = _CONF.format(
            user=getpass.getuser(), folder=self.folder, nodes=NODES, ports=free_ports(NODES + 1)
        )
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "state").mkdir()
        for i in range(NODES):
            (self.folder / f"spool-n{i + 1}").mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        own = {
            "key-file": key.name,
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munge.seed",
        }
        self._daemon(
            ["munged", "--foreground", "--force", "--num-threads=2"]
            + [f"--{option}={self.folder / name}" for option, name in own.items()]
        )
        self.wait((self.folder / "munge.socket").exists, "munged")
        self._daemon(["slurmctld", "-D", "-c"])
        for i in range(NODES):
            self._daemon(["slurmd", "-D", "-N", f"n{i + 1}"])
        self.wait(self._ready, "nodes")

    def _ready(self) -> bool:
        return self("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == str(NODES)

    def __call__(self, *command: str) -> str:
        """What a command of Slurm's prints; empty where it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Until a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            for daemon in self.daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f"{daemon.args[3]} ended:\n{self.logs()}")
            if time.monotonic() > end:
                raise TimeoutError(f"{what}, after {seconds} s\n{self('squeue')}\n{self.logs()}")
            time.sleep(0.1)

    def hurry(self) -> None:
        """Lets start what was requeued, which Slurm otherwise holds for two minutes.

        Two seconds it must wait: at once, nodes would take it for the job of before.
        """
        waiting = self("squeue", "-h", "-r", "-t", "PD", "-O", "JobArrayID,Reason,RestartCnt")
        for line in waiting.splitlines():
            job, *reason, restarts = line.split()
            since = self._requeued.setdefault((job, restarts), time.monotonic())
            if reason == ["BeginTime"] and time.monotonic() > since + 2:
                self("scontrol", "update", f"JobId={job}", "StartTime=now")

    def logs(self) -> str:
        """The last of what each daemon wrote."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-1500:]}" for file in files)

    def stop(self) -> None:
        """Jobs first: a slurmstepd outlives its slurmd."""
        if self.daemons:
            self("scancel", "--user", getpass.getuser(), "--full")
            end = time.monotonic() + 30
            while self("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for step in self._steps():
            os.kill(step, signal.SIGKILL)

    def _daemon(self, command: list[str]) -> None:
        dies_with_us = ["setpriv", "--pdeathsig", "TERM"]
        with (self.folder / f"{command[0]}{len(self.daemons)}.log").open("w") as log:
            process = subprocess.Popen(
                [*dies_with_us, *command],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.daemons.append(process)

    def _steps(self) -> list[int]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = str(self.folder) in (process / "environ").read_text(errors="replace")
                if ours and (process / "comm").read_text().strip() == "slurmstepd":
                    found.append(int(process.name))
            except OSError:
                continue
        return found


def free_ports(count: int) -> list[int]:
    """So many in a row, which nobody listens on."""
    for first in range(20000 + os.getpid() % 1000 * 8, 32000, count):
        ports = list(range(first, first + count))
        try:
            for port in ports:
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return ports
    raise RuntimeError("no free ports")

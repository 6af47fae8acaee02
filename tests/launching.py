"""What the tests of sending runs off share: Slurm's programs, as far as they are asked."""

from cascade.config.compose import built, composed
from cascade.slurm.plan import Task

# What a stand-in for python does, as a task that writes down that it is finished.
FINISHES = """finish() {
    [ $? = 0 ] || return
    echo "{\\"attempt\\": $CASCADE_ATTEMPT, \\"outputs\\": {}}" >"$CASCADE_FOLDER/done"
}
trap finish EXIT"""


def launcher(*overrides):
    return built(composed("launcher", overrides).launcher)


def by_name(links):
    return {link.name: link for link in links}


def program(folder, name, text):
    """A program of this name that the shell finds in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def in_queue(programs, *rows):
    """Lets squeue print jobs: (id, state, restarts, reason, record, index)."""
    lines = (f"{i}|{n}|{s}|{r}|{why}|cascade:{record}" for i, s, r, why, record, n in rows)
    (programs / "queue").write_text("".join(f"{line:<200}\n" for line in lines))


def tasks(root, *names):
    return [Task(root / name, ["train", name]) for name in names]

"""Sending runs off: what is frozen, the batch script, chains, processes here, the table."""

import fcntl
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import cascade.conf
from cascade.cli import main
from cascade.config.compose import built, composed
from cascade.data.scenes.generate import write_scenes
from cascade.errors import Failed, TryAgain, UserError
from cascade.eval.cascades.evaluation import evaluate
from cascade.files import processors
from cascade.runs.done import finished
from cascade.slurm import local, queue, state
from cascade.slurm.batch import Slurm
from cascade.slurm.chain import chain, training_task
from cascade.slurm.code import copied
from cascade.slurm.local import Local
from cascade.slurm.plan import Submission, Task, TaskGroup, launch
from cascade.slurm.queue import Job
from tests.launching import FINISHES, by_name, in_queue, launcher, program, tasks

CONF = Path(next(iter(cascade.conf.__path__)))
SMALL = ["stage=sr256", "size=16", "low=8", "crop=null", "batch=4", "images=48", "data.path=none"]


def stand_in(folder, text):
    """A python that does what `text` says, in the folder of the task, as a task that ends well."""
    return str(program(folder, "python", f'cd "$CASCADE_FOLDER"\n{FINISHES}\n{text}'))


def sent(root, *links):
    left = {link.name: link.tasks for link in links}
    return Submission(root, root / "launch" / "1", root / "code", links, left, {})


# The batch script


def test_the_script_asks_for_a_process_on_each_gpu_and_for_a_signal(tmp_path):
    asked = ["launcher.gpus=8", "launcher.nodes=4", "launcher.time='08:00:00'"]
    asked += ["launcher.partition=gpu", "launcher.account=art", "launcher.constraint=h100"]
    asked += ["launcher.cpus=6", "launcher.container='--container-image=x.sqsh'"]
    asked += ["launcher.preamble='module load cuda'", "launcher.options=['--qos=high']"]
    link = TaskGroup("sweep", tasks(tmp_path, "a", "b", "c"), after=["clip"])
    one = launcher("launcher=slurm", "launcher.at_once=2", *asked)
    record = sent(tmp_path, link)
    text = one.script(link, record, one.options_of(link, record, ["afterok:7:9_1"]))
    directives = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
    expected = """
        --requeue --open-mode=append --signal=USR1@300 --nodes=4 --ntasks-per-node=8
        --gpus-per-node=8 --cpus-per-task=6 --time=08:00:00 --partition=gpu --account=art
        --constraint=h100 --array=0-2%2 --dependency=afterok:7:9_1 --kill-on-invalid-dep=yes
        --qos=high"""
    assert set(expected.split()) <= set(directives)
    python = shlex.quote(sys.executable)
    assert (
        "module load cuda\n"
        f"export PYTHONPATH={tmp_path}/code${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1\n"
    ) in text
    assert (
        "srun --export=ALL --kill-on-bad-exit=1 --cpus-per-task=6 --container-image=x.sqsh sh -c"
        in text
    )
    assert f'{python} -m cascade --code code "${{command[@]}}"\n' in text


def test_what_is_not_asked_for_is_left_to_the_cluster(tmp_path):
    link = TaskGroup("train", tasks(tmp_path, "a"))
    one, record = launcher("launcher=slurm", "launcher.gpus=0"), sent(tmp_path, link)
    text = one.script(link, record, one.options_of(link, record))
    for word in ("partition", "account", "time=", "constraint", "gpus", "cpus", "dependency"):
        assert word not in text
    assert "--ntasks-per-node=1" in text


def attempt(
    root, code, *, index=1, restarts=None, failure=None, srun=":", finishes=True, **choices
):
    """Runs the script of two tasks as Slurm would, with an srun that ends with `code`."""
    link = TaskGroup("sweep", tasks(root / "a b", "first", "it's"))
    for task in link.tasks:
        task.folder.mkdir(parents=True, exist_ok=True)
    record = sent(root, link)
    one = launcher("launcher=slurm", *(f"launcher.{k}={v}" for k, v in choices.items()))
    told = f'echo {failure} > "$CASCADE_FAILURE"' if failure else ":"
    text = f'{FINISHES if finishes else ""}\necho "srun $*"\n{told}\n{srun}\nexit {code}'
    program(root / "bin", "srun", text)
    script = program(root, "script.sh", one.script(link, record, one.options_of(link, record)))
    env = {**os.environ, "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": str(index)}
    env |= {"SLURM_JOB_NODELIST": "n1"}
    if restarts is not None:
        env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(["bash", "-u", script], env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
    return done.returncode, link.tasks[index].folder


@pytest.mark.parametrize("code", [75, 134, 137, 138])
def test_a_checkpoint_and_a_killed_process_requeue_this_task_alone(code, programs, tmp_path):
    assert attempt(tmp_path, code)[0] == code
    assert (programs / "asked").read_text().splitlines() == ["scontrol requeue 5_1", "sleep 60"]


@pytest.mark.parametrize(
    ("code", "failure", "says"),
    [
        (2, "data.path is not given", "data.path is not given"),
        (1, None, "exit code 1"),
        (143, None, "exit code 143"),
        (137, "a bad file", "a bad file"),  # one rank said why, and the others were killed for it
    ],
)
def test_a_failure_is_never_requeued_and_says_why(code, failure, says, programs, tmp_path):
    ended, folder = attempt(tmp_path, code, failure=failure)
    assert ended == code
    assert not (programs / "asked").exists()
    assert (folder / "failure.txt").read_text().strip() == says
    assert not (folder / "done").exists()


@pytest.mark.parametrize(
    ("first", "word"), [(137, "requeued"), (75, "preempted"), (1, ""), (2, "")]
)
def test_the_first_that_ends_decides(first, word, programs, tmp_path):
    """srun returns 143 whenever it ended the others, by SIGTERM, for the sake of one."""
    told = """echo '{"signal": "SIGTERM"}' >>events.jsonl"""
    text = f"[ ! -e first ] || exit 75\ntouch first\n{told}\nexit {first}"
    python = stand_in(tmp_path / "python", text)
    ranks = 'while [[ $1 = --* ]]; do shift; done\n"$@"\n"$@"'
    _, folder = attempt(tmp_path, 143, srun=ranks, python=python)
    assert (programs / "asked").exists() == bool(word)
    if word:
        assert state.state(folder, Job("5_1", "PENDING", 1, "BeginTime")).word == word
        assert all(json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())


SAVES = 'mkdir -p "$CASCADE_FOLDER/checkpoints/step-0000000$CASCADE_ATTEMPT"'
LIMIT = """echo '{"signal": "SIGUSR1"}' >> "$CASCADE_FOLDER/events.jsonl" """


@pytest.mark.parametrize(
    ("attempts", "requeued"),
    [
        ([(75, ":")] * 3, [True, True, False]),
        ([(75, SAVES)] * 6, [True] * 6),
        (
            [(75, ":"), (75, ":"), (137, SAVES), (75, ":"), (75, ":"), (75, ":")],
            [True] * 5 + [False],
        ),
        ([(138, ":")] * 2, [True, False]),  # the signal came before anything could listen
        ([(75, LIMIT)] * 2, [True, False]),
        ([(75, f"{LIMIT}; {SAVES}")] * 4, [True] * 4),  # which is what a time limit is for
        ([(137, ":"), (75, LIMIT)], [True, False]),
    ],
)
def test_attempts_in_a_row_without_a_newer_checkpoint_have_a_cap(
    attempts, requeued, programs, tmp_path
):
    for n, ((code, srun), again) in enumerate(zip(attempts, requeued)):
        (programs / "asked").unlink(missing_ok=True)
        ended, folder = attempt(tmp_path, code, restarts=n, srun=srun, max_restarts=2)
        assert ended == code
        assert (programs / "asked").exists() == again, n
    assert (folder / "failure.txt").exists() != again
    if not again:
        assert "max_restarts is 2" in (folder / "failure.txt").read_text()
        (programs / "asked").unlink(missing_ok=True)
        attempt(tmp_path, 75, max_restarts=2)  # sent anew
        assert (programs / "asked").exists()


def test_what_slurm_ended_counts_if_no_checkpoint_came_of_it(programs, tmp_path):
    """Of such an attempt the script does not see the end either."""
    folder = tmp_path / "a b" / "it's"
    for n, (step, begun) in enumerate([(1, 1), (1, 1), (2, 1), (2, 1), (2, 1), (2, 0)]):
        (folder / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        asked = 'touch "$CASCADE_FOLDER/begun"; kill -9 $PPID'
        code, _ = attempt(tmp_path, 0, restarts=n, srun=asked, max_restarts=2)
        assert (folder / "begun").exists() == bool(begun), n
        (folder / "begun").unlink(missing_ok=True)
    assert code == 1
    assert "no newer checkpoint in 3 attempts" in (folder / "failure.txt").read_text()


def test_an_exit_code_of_0_is_no_success_by_itself(programs, tmp_path):
    """As srun's is when the node is lost."""
    code, folder = attempt(tmp_path, 0, finishes=False)
    assert code == 137
    assert not finished(folder)
    assert (programs / "asked").read_text().splitlines() == ["scontrol requeue 5_1", "sleep 60"]
    code, _ = attempt(tmp_path, 0, restarts=1)
    assert code == 0
    assert finished(folder)
    attempt(tmp_path, 0, restarts=2, finishes=False)  # what was done before is not done now
    assert not finished(folder)


@pytest.mark.parametrize("code", [0, 1, 75, 137])
def test_an_attempt_that_was_overtaken_touches_nothing(code, programs, tmp_path):
    overtaken = """
        echo "7 0 " > "$CASCADE_FOLDER/attempt"
        echo '{"attempt": 7, "outputs": {}}' > "$CASCADE_FOLDER/done"
        exit """
    ended, folder = attempt(tmp_path, code, srun=f"{overtaken}{code}", finishes=False)
    assert ended == 75
    assert not (programs / "asked").exists()
    assert not (folder / "failure.txt").exists()
    assert finished(folder)


def test_a_task_that_ends_well_leaves_a_mark_and_its_log(programs, tmp_path):
    (tmp_path / "a b" / "first").mkdir(parents=True)
    (tmp_path / "a b" / "first" / "failure.txt").write_text("of the attempt before")
    code, folder = attempt(tmp_path, 0, index=0)
    assert code == 0
    assert (folder / "done").exists()
    assert not (folder / "failure.txt").exists()
    log = (folder / "log.txt").read_text()
    assert "job 5_0 on n1" in log
    assert "-m cascade --code code train first" in log


# What is frozen


def test_a_copy_of_the_code_is_complete_and_comes_first(tmp_path):
    copy = copied(tmp_path)
    assert copied(tmp_path) == copy
    code = (
        "import cascade, cascade.conf, cascade.eval, cascade.slurm.plan as p, sys\n"
        "for m in (cascade, cascade.conf, cascade.eval, p): print(m.__file__ or m.__path__[0])"
    )
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    repository = Path(__file__).parent.parent  # whose working tree must not be what is run
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(copy)) for line in done.stdout.splitlines())
    originals = {p.relative_to(CONF) for p in CONF.rglob("*.yaml")}
    assert {p.relative_to(copy / "cascade/conf") for p in copy.rglob("*.yaml")} == originals


def test_a_training_is_frozen_when_it_is_sent(programs, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", *SMALL, f"run={run}", "launcher=slurm", "launcher.gpus=2"]
    assert main(arguments) == 0
    frozen = yaml.safe_load((run / "frozen.yaml").read_text())
    assert frozen["images"] == 48
    assert frozen["trainer"]["devices"] == 2
    assert "launcher" not in frozen
    assert "${" not in (run / "frozen.yaml").read_text()
    record = json.loads((run / "launch" / "1" / "train" / "tasks.json").read_text())
    assert Path(record["code"], "cascade", "cli.py").exists()
    assert len(record["commit"]) == 40
    script = (run / "launch" / "1" / "train" / "script.sh").read_text()
    assert f"folder={run} command=(train --config {run}/frozen.yaml)" in script


def test_what_waits_is_not_sent_again_nor_changed(programs, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", *SMALL, f"run={run}", "launcher=slurm"]
    assert main(arguments) == 0
    record = run / "launch" / "1" / "train" / "tasks.json"
    in_queue(programs, ("101_0", "PENDING", 0, "Priority", record, 0))
    assert main(arguments) == 0
    assert "1 queued or running" in capsys.readouterr().out
    assert main([*arguments, "optim.lr=1"]) == 2
    assert "scancel 101_0" in capsys.readouterr().err
    assert (programs / "asked").read_text().count("sbatch") == 1
    in_queue(programs, ("101_0", "PENDING", 0, "DependencyNeverSatisfied", record, 0))
    assert main([*arguments, "optim.lr=1"]) == 0


def test_what_cannot_work_is_refused_when_it_is_sent(programs, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", *SMALL, f"run={run}", "launcher=slurm"]
    assert main([*arguments, "launcher.gpus=3"]) == 2
    assert "not ranks (3)" in capsys.readouterr().err
    run.mkdir()
    (run / "config.yaml").write_text(
        training_task([*SMALL, f"run={run}"], Local(1, 0, None))[0].config
    )
    assert main([*arguments, "seed=5"]) == 2
    assert "seed: 0 -> 5" in capsys.readouterr().err
    assert not (programs / "asked").exists()
    program(programs, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    assert main(arguments) == 2
    assert "invalid partition" in capsys.readouterr().err


def test_a_whole_configuration_takes_no_overrides(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "frozen.yaml"), "images=3"]) == 2
    assert "takes no overrides" in capsys.readouterr().err


def test_an_evaluation_is_asked_for_by_a_file(tmp_path, capsys):
    given = {"model": str(tmp_path / "model"), "data": "nowhere", "judge": "none"}
    given |= {"counts": {"val": 2}, "guidance": [1], "seed": 0}
    for more, says in (({}, "none is no directory"), ({"speed": 1}, "unexpected keyword")):
        (tmp_path / "frozen.yaml").write_text(yaml.safe_dump(given | more))
        assert main(["evaluate", "--config", str(tmp_path / "frozen.yaml")]) == 2
        assert says in capsys.readouterr().err
    assert main(["evaluate", "--config", str(tmp_path / "frozen.yaml"), "--out", "x"]) == 2
    assert "--out has no effect" in capsys.readouterr().err


def test_a_job_says_why_it_failed_where_its_launcher_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("CASCADE_FAILURE", str(tmp_path / "failure.txt"))
    assert main(["train", "--config", str(tmp_path / "frozen.yaml")]) == 2
    assert "frozen.yaml" in (tmp_path / "failure.txt").read_text()


def test_without_slurm_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", *SMALL, f"run={tmp_path / 'run'}", "launcher=slurm"]) == 2
    assert "launcher=local" in capsys.readouterr().err


# Chains


def links_of(name, tmp_path, *overrides):
    config = composed("launch", [f"cascade={name}", f"run={tmp_path / 'c'}", *overrides])
    return by_name(chain(config, launcher("launcher=slurm")))


def test_unclip_is_a_chain_from_its_clip_to_its_evaluation(tmp_path):
    links = links_of("unclip", tmp_path, "data.path=shards", "precompute=3", "run=c")
    assert {name: list(link.after) for name, link in links.items()} == {
        "clip": [],
        "judge": [],
        "precompute": ["clip"],
        "prior": ["clip", "precompute"],
        "decoder": ["precompute"],
        "sr256": [],
        "sr1024": [],
        "evaluation": ["clip", "judge", "sr256", "sr1024", "precompute", "prior", "decoder"],
    }
    alone = {name for name, link in links.items() if link.alone}
    assert alone == {"precompute", "evaluation"}
    assert len(links["precompute"].tasks) == 3
    command = " ".join(links["precompute"].tasks[0].command)
    assert command == "data precompute shards --clip c/clip --out shards/embeddings"
    more = ["run=c", "data.path=shards", "each=['++clip.checkpoint=a.pt','++clip.quick_gelu=true']"]
    named = links_of("unclip", tmp_path, *more)["precompute"].tasks[0].command
    assert [*named[-4:]] == ["--checkpoint", "a.pt", "--quick-gelu", "true"]
    asked = yaml.safe_load(links["evaluation"].tasks[0].config)
    assert (asked["judge"], asked["counts"]) == ("c/judge", {"val": 5000})
    demo = composed("demo", []).evaluate
    asked = yaml.safe_load(links_of("demo", tmp_path)["evaluation"].tasks[0].config)
    assert {key: asked[key] for key in ("counts", "guidance", "targets")} == {
        key: OmegaConf.to_container(demo[key]) for key in ("counts", "guidance", "targets")
    }


def test_a_training_waits_for_each_that_it_reads(tmp_path):
    """A decoder of latents for its autoencoder, a student for its teacher."""
    links = links_of("latent", tmp_path)
    assert links["decoder"].after == ["scenes", "autoencoder", "precompute"]
    order = [*links]
    assert order.index("autoencoder") < order.index("decoder")
    run = tmp_path / "c"
    taught = f"+stages.fast=[stage=sr256,++teacher={run}/sr256]"
    links = links_of("unclip", tmp_path, "data.path=shards", taught)
    assert links["fast"].after == ["sr256"]
    circle = [f"++stages.sr256=[stage=sr256,++teacher={run}/sr1024]"]
    circle += [f"++stages.sr1024=[stage=sr256,++teacher={run}/sr256]"]
    with pytest.raises(UserError, match="sr256 and sr1024 read one another"):
        links_of("unclip", tmp_path, "data.path=shards", *circle)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF / "cascade").glob("*.yaml"))])
def test_every_cascade_is_a_chain(name, tmp_path):
    links = links_of(name, tmp_path, "data.path=shards")
    assert list(links)[-1] == "evaluation"
    config = composed("launch", [f"cascade={name}", "data.path=shards"])
    assert set(config.cascade) < set(config.stages)
    assert config.judge != f"{config.run}/judge" or "judge" in config.stages
    for link in links.values():
        for task in link.tasks:
            if link.name == "evaluation":
                inspect.signature(evaluate).bind(**yaml.safe_load(task.config))
            elif task.config:
                with torch.device("meta"):
                    built(yaml.safe_load(task.config)["stage"])


def test_shards_without_a_split_to_measure_are_refused_before_anything_is_trained(tmp_path, capsys):
    for split in ("train", "val"):
        write_scenes(tmp_path / "shards", "plain", split, 1, 16, seed=0)
    given = [f"data.path={tmp_path / 'shards'}", f"run={tmp_path / 'c'}", "scenes=null"]
    for verb in (["launch", "cascade=demo"], ["demo"]):
        assert main([*verb, *given]) == 2
        assert "unseen" in capsys.readouterr().err
        assert not (tmp_path / "c/clip").exists()


def test_without_a_clip_nothing_is_embedded(tmp_path):
    config = composed("launch", ["cascade=unclip", f"run={tmp_path}", "data.path=x"])
    config.stages = {"decoder": ["stage=decoder_text"], "sr256": ["stage=sr256"]}
    links = by_name(chain(config, launcher("launcher=slurm")))
    assert {name: list(link.after) for name, link in links.items()} == {
        "decoder": [],
        "sr256": [],
        "evaluation": ["decoder", "sr256"],
    }


def test_what_a_cascade_reads_precomputed_is_precomputed(tmp_path):
    config = composed("launch", ["cascade=unclip", f"run={tmp_path}", "data.path=x"])
    decoder = ["stage=decoder_text", "text=t5_small", "precomputed=text", "data=recaptioned"]
    config.stages = {"decoder": decoder}
    links = by_name(chain(config, launcher("launcher=slurm")))
    command = " ".join(links["precompute"].tasks[0].command)
    text = "--text google/t5-v1_1-small --text-out x/text --captions long_caption,txt"
    assert command == f"data precompute x {text}"
    written = tmp_path / "captions"
    written.mkdir()
    (written / "manifest.json").touch()
    config.stages = {"decoder": [*decoder, f"data.recaptions={written}"]}
    links = by_name(chain(config, launcher("launcher=slurm")))
    command = " ".join(links["precompute"].tasks[0].command)
    assert command == f"data precompute x {text} --recaptions {written}"


def test_links_differ_in_what_they_ask_for(programs, tmp_path):
    arguments = ["launch", "cascade=unclip", "data.path=x", f"run={tmp_path}", "launcher=slurm"]
    asked = ["+resources.sr256={nodes: 4, gpus: 8}", "+resources.evaluation.time=60"]
    assert main([*arguments, *asked]) == 0
    scripts = {p.parent.name: p.read_text() for p in tmp_path.glob("launch/1/*/script.sh")}
    assert "--nodes=4" in scripts["sr256"]
    assert "--time=60" in scripts["evaluation"]
    assert yaml.safe_load((tmp_path / "sr256/frozen.yaml").read_text())["trainer"]["num_nodes"] == 4
    assert main([*arguments, "+resources.clip.node=4"]) == 2


def test_jobs_of_a_chain_depend_on_those_before_them(programs, tmp_path):
    root = tmp_path / "chain"
    names = ("clip", "precompute", "prior", "evaluation")
    after = ([], ["clip"], ["precompute"], ["clip", "prior"])
    links = [TaskGroup(n, tasks(root, n), after=a) for n, a in zip(names, after)]
    launch(launcher("launcher=slurm"), root, links)

    def dependencies(number):
        found = {}
        for path in root.glob(f"launch/{number}/*/script.sh"):
            lines = path.read_text().splitlines()
            given = [line for line in lines if line.startswith("#SBATCH --dependency=")]
            found[path.parent.name] = given[0].partition("afterok:")[2] if given else ""
        return found

    assert dependencies(1) == {
        "clip": "",
        "precompute": "101",
        "prior": "102",
        "evaluation": "101:103",
    }
    record = root / "launch" / "1" / "precompute" / "tasks.json"
    in_queue(programs, ("102_0", "RUNNING", 0, "None", record, 0))
    links[0] = TaskGroup("clip", [Task(root / "clip", ["train"], done=True)])
    launch(launcher("launcher=slurm"), root, links)
    assert dependencies(2) == {"prior": "102_0", "evaluation": "105"}


def test_tasks_wait_each_for_its_own_where_numbers_agree(programs, tmp_path):
    root = tmp_path / "sweep"

    def dependency(number, done=(), measured=()):
        trained = [
            Task(t.folder, ["train"], done=t.folder.name in done) for t in tasks(root, *"ab")
        ]
        cells = [Task(root / f"{n}/cells", ["cells"], done=n in measured) for n in "ab"]
        links = [TaskGroup("clip", tasks(root, "clip")), TaskGroup("sweep", trained, ["clip"])]
        launch(
            launcher("launcher=slurm"),
            root,
            [*links, TaskGroup("evaluation", cells, ["clip"], each_after="sweep")],
        )
        script = (root / f"launch/{number}/evaluation/script.sh").read_text()
        return re.search("--dependency=(.*)", script)[1]

    assert dependency(1) == "afterok:101,aftercorr:102"
    assert dependency(2, done="a", measured="a") == "afterok:104,aftercorr:105"
    assert dependency(3, done="a") == "afterok:107:108"  # b is 0 of one array and 1 of the other
    assert dependency(4, done="ab") == "afterok:110"


# Processes of this machine


def run_here(root, links, text, at_once=2):
    local = Local(at_once, 0, stand_in(root / "bin", text))
    launch(local, root, links)


def test_what_fails_stops_what_hangs_on_it_and_nothing_else(tmp_path, capsys):
    links = [
        TaskGroup("data", tasks(tmp_path, "data")),
        TaskGroup("bad", tasks(tmp_path, "bad"), after=["data"]),
        TaskGroup("good", tasks(tmp_path, "good", "better"), after=["data"]),
        TaskGroup("report", tasks(tmp_path, "report"), after=["bad", "good"]),
    ]
    text = "echo ran; [[ $PWD = */bad && ! -e ../mended ]] && exit 3; exit 0"
    with pytest.raises(
        Failed, match=r"1 failed: bad \(exit code 3.*not started because of it: report"
    ):
        run_here(tmp_path, links, text)
    assert not (tmp_path / "report" / "log.txt").exists()
    assert all(finished(tmp_path / name) for name in ("data", "good", "better"))
    (tmp_path / "mended").touch()
    links = [
        TaskGroup(
            l.name,
            [Task(t.folder, t.command, done=finished(t.folder)) for t in l.tasks],
            l.after,
        )
        for l in links
    ]
    run_here(tmp_path, links, text)
    counts = {p.parent.name: p.read_text().count("ran") for p in tmp_path.glob("*/log.txt")}
    assert counts == {"data": 1, "bad": 2, "good": 1, "better": 1, "report": 1}


def test_what_is_ready_for_its_last_link_goes_on_without_the_others(tmp_path):
    names = ("good", "bad", "last")
    cells = [Task(tmp_path / name / "cells", ["cells"]) for name in names]
    links = [
        TaskGroup("sweep", tasks(tmp_path, *names)),
        TaskGroup("cells", cells, each_after="sweep"),
    ]
    links.append(TaskGroup("report", tasks(tmp_path, "report"), after=["cells"]))
    text = f"echo ${{PWD#{tmp_path}/}} >> {tmp_path}/order; [[ $PWD != */bad ]]"
    with pytest.raises(Failed, match=r"1 failed: bad .*not started because of it: cells, report"):
        run_here(tmp_path, links, text, at_once=1)
    order = ["good", "good/cells", "bad", "last", "last/cells"]
    assert (tmp_path / "order").read_text().split() == order


def test_several_run_at_a_time_and_no_more(tmp_path):
    """Each waits for another to be there, which none alone would see."""
    text = """
        mkdir ../at-work-$$
        for i in $(seq 200); do
            n=$(ls -d ../at-work-* | wc -l); [ $n -gt 2 ] && touch ../too-many
            [ $n -ge 2 ] && touch ../together; [ -e ../together ] && break; sleep 0.05
        done
        sleep 0.1; rmdir ../at-work-$$; [ -e ../together ]"""
    run_here(tmp_path, [TaskGroup("sweep", tasks(tmp_path, *"abcd"))], text)
    assert (tmp_path / "together").exists()
    assert not (tmp_path / "too-many").exists()


def test_what_most_wait_for_begins_first_and_what_is_alone_has_all_processors(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processors, "available", lambda _: 6.0)
    links = [
        TaskGroup("small", tasks(tmp_path, "small")),
        TaskGroup("clip", tasks(tmp_path, "clip")),
        TaskGroup("embeddings", tasks(tmp_path, "embeddings"), after=["clip"]),
        TaskGroup("prior", tasks(tmp_path, "prior"), after=["embeddings"]),
        TaskGroup("report", tasks(tmp_path, "report"), after=["small", "prior"]),
    ]
    run_here(tmp_path, links, f"echo ${{PWD##*/}} $OMP_NUM_THREADS >> {tmp_path}/order", at_once=3)
    order = dict(line.split() for line in (tmp_path / "order").read_text().splitlines())
    assert order == {"clip": "3", "small": "2", "embeddings": "3", "prior": "3", "report": "6"}
    (tmp_path / "order").unlink()
    run_here(tmp_path, links, f"echo ${{PWD##*/}} >> {tmp_path}/order", at_once=1)
    assert (tmp_path / "order").read_text().split()[:2] == ["clip", "embeddings"]


def test_without_a_terminal_running_tasks_report_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_SPEAKS", 0.0)
    lines, said = ["other", "12:00:00 a: 5/9 images"], []
    wait = "while ! [ -e ../seen{} ]; do sleep 0.05; done"
    text = "; ".join(f"echo '{line}'; {wait.format(i)}" for i, line in enumerate(lines))
    monkeypatch.setattr(local, "print", lambda line, **_: said.append(line), raising=False)

    def seen(seconds, sleep=time.sleep):
        sleep(seconds)
        for i, line in enumerate(["a: other", lines[1]]):  # which names itself
            if line in said:
                (tmp_path / f"seen{i}").touch()

    monkeypatch.setattr(local.time, "sleep", seen)
    run_here(tmp_path, [TaskGroup("sweep", tasks(tmp_path, "a"))], text)
    assert said[0] == "a: started"
    assert said[-1] == "a: finished"


def test_a_checkpoint_of_a_process_here_is_no_failure(tmp_path):
    with pytest.raises(TryAgain, match="not finished: a"):
        run_here(
            tmp_path,
            [TaskGroup("sweep", tasks(tmp_path, "a", "b"))],
            "[[ $PWD = */a ]] && exit 75; exit 0",
        )


def test_a_process_that_ends_with_0_and_did_not_finish_has_failed(tmp_path):
    with pytest.raises(Failed, match="exit code 0, but the task did not finish"):
        run_here(tmp_path, [TaskGroup("sweep", tasks(tmp_path, "a"))], "trap - EXIT; exit 0")
    assert not finished(tmp_path / "a")


def test_a_process_runs_the_copy_and_says_why_it_failed(tmp_path):
    text = "echo $PYTHONPATH $PYTHONSAFEPATH; echo because > $CASCADE_FAILURE; exit 2"
    with pytest.raises(Failed, match="because"):
        run_here(tmp_path, [TaskGroup("sweep", tasks(tmp_path, "a"))], text)
    assert f"{tmp_path}/launch/code-" in (tmp_path / "a" / "log.txt").read_text()


def test_ending_the_launch_ends_all_that_it_started(tmp_path):
    script = tmp_path / "launch.py"
    python = stand_in(
        tmp_path / "bin",
        "trap 'touch saved; exit 75' TERM; touch started; while :; do sleep 0.1; done",
    )
    script.write_text(
        "from pathlib import Path\n"
        "from cascade.slurm.local import Local\n"
        "from cascade.slurm.plan import TaskGroup, Task, launch\n"
        f"root = Path({str(tmp_path)!r})\n"
        "links = [TaskGroup('sweep', [Task(root / name, ['train']) for name in 'abc'])]\n"
        f"launch(Local(2, 0, {python!r}), root, links)\n"
    )
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    started = [tmp_path / name / "started" for name in "ab"]
    while not all(path.exists() for path in started):
        assert process.poll() is None
        time.sleep(0.02)
    assert queue.locked(tmp_path / "a")
    assert state.state(tmp_path / "a", None).word == "running"
    again = Local(2, 0, python)
    folders = [tmp_path / name for name in "abc"]
    assert sorted(again.held(folders)) == folders[:2]
    process.send_signal(signal.SIGTERM)
    assert process.wait() != 0
    assert all((tmp_path / name / "saved").exists() for name in "ab")
    assert not (tmp_path / "c" / "started").exists()
    assert not queue.locked(tmp_path / "a")


# The table


def a_run(folder, images=0, total=100, **files):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"images: {total}\n")
    if images:
        (folder / "status.json").write_text(json.dumps({"images": images, "total": total}))
        head, row = "images,loss,lr,images_per_second,seconds", f"{images},0.25,1e-3,10.0,4.0"
        (folder / "metrics.csv").write_text(f"{head}\n4,9,9,9,9\n{row}\n")
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_the_table_has_a_word_for_every_state(tmp_path):
    def word(name, job=None, images=0, **files):
        return state.state(a_run(tmp_path / name, images, **files), job).word

    term = json.dumps({"event": "interrupted", "signal": "SIGTERM"}) + "\n"
    assert word("a", Job("1_0", "PENDING", 0, "Priority")) == "queued"
    assert word("b", Job("1_0", "RUNNING", 2, "None"), failure_txt="old") == "running"
    assert word("c", Job("1_0", "PENDING", 1, "BeginTime"), 40) == "requeued"
    assert word("d", Job("1_0", "PENDING", 1, "BeginTime"), 40, events_jsonl=term) == "preempted"
    assert word("e", images=100, weights_safetensors="") == "finished"
    assert word("e2", images=100) == "stopped"  # by whatever, before it had exported anything
    assert word("e3", images=40, done="") == "stopped"  # as srun's exit code once had it
    assert word("f", images=40, failure_txt="no .tar is there") == "failed"
    assert word("g", images=40, events_jsonl=term) == "stopped"
    assert word("h", images=40, heartbeats__rank0_json="{}") == "running"
    (tmp_path / "i").mkdir()
    for name in ("log.txt", "done"):
        (tmp_path / "i" / name).touch()
    assert state.state(tmp_path / "i", None).word == "finished"  # nothing speaks against it
    (tmp_path / "j").mkdir()
    (tmp_path / "j" / "frozen.yaml").write_text("images: 7\n")
    assert state.state(tmp_path / "j", None) == state.State("not started", 0, 7)


def test_the_table_says_how_far_a_run_is(tmp_path):
    found = state.state(a_run(tmp_path / "a", 40), Job("1_0", "RUNNING", 1, "None"))
    assert (found.images, found.total, found.rate, found.loss) == (40, 100, 10.0, 0.25)
    assert found.seconds_left == 6.0
    assert found.note == "job 1_0, restart 1"
    with (tmp_path / "a" / "metrics.csv").open("a") as file:
        file.write("60,0.2")  # killed in the middle of a row
    assert state.state(tmp_path / "a", None).images == 40
    assert [state.duration(s) for s in (0.4, 59.9, 65.0, 7300.0, 90_000.0)] == [
        "0 s",
        "1 min 0 s",
        "1 min 5 s",
        "2 h 1 min",
        "1 d 1 h",
    ]


def test_runs_prints_directories_and_the_queue(programs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "runs" / "deep" / "decoder", 40, failure_txt="ran out of [disk]")
    a_run(tmp_path / "runs" / "deep" / "decoder" / "checkpoints" / "x")
    record = tmp_path / "tasks.json"
    record.write_text(json.dumps({"tasks": [{"folder": str(tmp_path / "runs" / "prior")}]}))
    row = ("7_0", "PENDING", 0, "Dependency", record, 0)
    in_queue(programs, row, ("8", "RUNNING", 0, "None", "somebody/else", "N/A"))
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["runs/deep/decoder", "failed", "40", "100"]
    assert "ran out of [disk]" in lines[1]
    assert lines[2].split() == ["runs/prior", "queued", "job", "7_0:", "Dependency"]


def test_runs_works_without_slurm_and_imports_nothing_heavy(tmp_path):
    a_run(tmp_path / "runs" / "a", 40)
    code = (
        "import sys; from cascade.cli import main\n"
        "assert main(['runs', sys.argv[1]]) == 0\n"
        "heavy = {'torch', 'lightning', 'numpy', 'hydra', 'omegaconf'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stopped" in done.stdout


def test_a_lock_is_seen_while_its_holder_lives(tmp_path):
    assert not queue.locked(tmp_path)
    with (tmp_path / queue.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert queue.locked(tmp_path)
    assert not queue.locked(tmp_path)


def test_resources_are_the_launchers(tmp_path):
    with pytest.raises(UserError, match="gpu is none of"):
        launcher("launcher=slurm").ranks({"gpu": 4})
    assert isinstance(launcher("launcher=slurm"), Slurm)
    assert launcher("launcher=slurm").ranks({"nodes": 4}) == {"devices": 1, "num_nodes": 4}

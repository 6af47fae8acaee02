"""Stand-ins for packages that log trainings: signatures of the real ones, and what was called."""

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass
class Service:
    """What one package was told, over all attempts."""

    ids: list[str] = field(default_factory=list)
    configs: list[Any] = field(default_factory=list)
    scalars: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    pictures: list[tuple[int, str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # every argument, as text

    def log(self, data, step):
        self.said.append(repr(data))
        for key, value in data.items():
            if isinstance(value, Picture):
                self.pictures.append((step, key, value.sheet))
        if scalars := {k: v for k, v in data.items() if isinstance(v, float)}:
            self.scalars.append((step, scalars))


@dataclass
class Picture:
    sheet: Any


def module(monkeypatch, name, **content):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="stand-in")
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def wandb(monkeypatch):
    told = Service()

    def init(
        entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
        config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None,
        job_type=None, mode=None, force=None, reinit=None, resume=None, resume_from=None,
        fork_from=None, save_code=None, tensorboard=None, sync_tensorboard=None, monitor_gym=None,
        settings=None,
    ):  # fmt: skip
        assert mode == "offline"
        assert resume is None
        told.ids.append(id or "wandb-1")
        told.configs.append(config)
        told.said.append(repr((project, dir, name, config, settings)))
        return Run()

    class Run:
        id = property(lambda self: told.ids[-1])

        def log(self, data, step=None, commit=None):
            told.log(data, step)

        def save(self, glob_str, base_path=None, policy="live", glob=True):
            told.files.append(glob_str)

        def finish(self, exit_code=None):
            told.ends.append(exit_code)

    def Image(data_or_path, mode=None, caption=None, grouping=None, classes=None, file_type=None):
        return Picture(data_or_path)

    module(monkeypatch, "wandb", init=init, Image=Image)
    return told


def trackio(monkeypatch):
    told = Service()

    def init(
        project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
        bucket_id=None, config=None, resume="never", private=None, settings=None, embed=True,
        auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
    ):  # fmt: skip
        assert resume == ("allow" if told.ids else "never")
        assert "/" not in name  # a path would lead out of the folder of pictures
        told.ids.append(name)
        told.configs.append(config)
        told.said.append(repr((project, name, config)))
        return SimpleNamespace(name=name)

    def log(metrics, step=None):
        told.log(metrics, step)

    def log_artifact(artifact_or_path, name=None, type=None, aliases=None, overwrite=False):
        told.files.append(str(artifact_or_path))

    def Image(value, caption=None):
        return Picture(value)

    content = {"init": init, "log": log, "log_artifact": log_artifact, "Image": Image}
    module(monkeypatch, "trackio", **content, finish=lambda: told.ends.append(None))
    return told


def mlflow(monkeypatch):
    told, names = Service(), {}

    class MlflowClient:
        def __init__(self, tracking_uri=None, registry_uri=None, workspace_store_uri=None):
            told.said.append(repr(tracking_uri))

        def get_experiment_by_name(self, name):
            return SimpleNamespace(experiment_id=names[name]) if name in names else None

        def create_experiment(self, name, artifact_location=None, tags=None):
            return names.setdefault(name, "7")

        def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
            told.ids.append("mlflow-1")
            return SimpleNamespace(info=SimpleNamespace(run_id="mlflow-1"))

        def update_run(self, run_id, status=None, name=None):
            told.ids.append(run_id)

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            told.said.append(repr((metrics, params)))
            assert len(params) <= 100
            if metrics:
                (step,) = {one.step for one in metrics}
                told.log({one.key: one.value for one in metrics}, step)

        def log_dict(self, run_id, dictionary, artifact_file):
            told.configs.append(dictionary)

        def log_image(
            self, run_id, image, artifact_file=None, key=None, step=None, timestamp=None,
            synchronous=None,
        ):  # fmt: skip
            told.log({key: Picture(image)}, step)

        def log_artifact(self, run_id, local_path, artifact_path=None):
            told.files.append(local_path)

        def set_terminated(self, run_id, status=None, end_time=None):
            told.ends.append(status)

    def Metric(key, value, timestamp, step):
        return SimpleNamespace(key=key, value=value, timestamp=timestamp, step=step)

    def Param(key, value):
        return SimpleNamespace(key=key, value=value)

    module(monkeypatch, "mlflow", MlflowClient=MlflowClient)
    module(monkeypatch, "mlflow.entities", Metric=Metric, Param=Param)
    return told

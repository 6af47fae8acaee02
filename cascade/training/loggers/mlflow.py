"""MLflow: a store in the run's directory, or the one that MLFLOW_TRACKING_URI names."""

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from cascade.runs.run import MLFLOW, Run

_LONGEST, _AT_ONCE = 500, 100  # characters of a parameter; parameters of a request


class MLflow:
    """Logs a run to MLflow. A resumed run has the same id.

    Without MLFLOW_TRACKING_URI, `mlflow/` in the run's directory holds an SQLite database and the
    artifacts. A server's user and password are MLFLOW_TRACKING_USERNAME and _PASSWORD.

    Args:
        experiment: of MLflow.
    """

    package = "mlflow"

    def __init__(self, experiment: str = "cascade"):
        self.experiment = experiment

    def begin(
        self, run: Run, config: Mapping[str, Any], images: int, known: str | None
    ) -> str | None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.run, self.metric = run, Metric
        folder = run.path.absolute() / MLFLOW
        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store:
            folder.mkdir(exist_ok=True)
        self.client = MlflowClient(tracking_uri=store or f"sqlite:///{folder / 'mlflow.db'}")
        if known:
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            return self.id
        place = None if store else (folder / "artifacts").as_uri()
        found = self.client.get_experiment_by_name(self.experiment)
        within = (
            found.experiment_id
            if found
            else self.client.create_experiment(self.experiment, artifact_location=place)
        )
        self.id = self.client.create_run(within, run_name=str(run.path)).info.run_id
        params = [Param(key, value) for key, value in _flat(config)]
        for i in range(0, len(params), _AT_ONCE):
            self.client.log_batch(self.id, params=params[i : i + _AT_ONCE])
        self.client.log_dict(self.id, dict(config), "config.yaml")
        return self.id

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        now = int(1000 * time.time())
        metrics = [self.metric(key, value, now, images) for key, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def picture(self, name: str, sheet: Image.Image, images: int) -> None:
        self.client.log_image(self.id, sheet, key=name, step=images)

    def end(self, finished: bool) -> None:
        if finished:
            self.client.log_artifact(self.id, str(self.run.metrics_file))
        self.client.set_terminated(self.id, status="FINISHED" if finished else "KILLED")


def _flat(node: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the text of every value."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{where}.{key}" if where else str(key))
    else:
        yield where, str(node)[:_LONGEST]

"""Weights & Biases (wandb), offline unless told otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from cascade.errors import UserError
from cascade.runs.run import Run


class WandB:
    """Logs a run to wandb, whose files lie in `wandb/` of the run's directory.

    Offline, `wandb sync` uploads them later; a resumed run has the same id. Neither the command
    line nor the code, environment or terminal is recorded.

    Args:
        project: of wandb.
        mode: "offline" or "online"; the key is that of `wandb login` or WANDB_API_KEY.
    """

    package = "wandb"

    def __init__(self, project: str = "cascade", mode: str = "offline"):
        if mode not in ("offline", "online"):
            raise UserError(f"logger.wandb.mode={mode}: give offline or online")
        self.project, self.mode = project, mode

    def begin(
        self, run: Run, config: Mapping[str, Any], images: int, known: str | None
    ) -> str | None:
        import wandb

        self.run = run
        self.logged = wandb.init(
            project=self.project,
            dir=str(run.path),
            id=known,
            name=str(run.path),
            config=dict(config),
            mode=self.mode,
            resume="allow" if known and self.mode == "online" else None,
            settings={
                **{"console": "off", "disable_code": True, "disable_git": True},
                **{"x_disable_meta": True, "x_save_requirements": False, "symlink": False},
            },
        )
        self.image = wandb.Image
        return self.logged.id

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        self.logged.log(dict(values), step=images)

    def picture(self, name: str, sheet: Image.Image, images: int) -> None:
        self.logged.log({name: self.image(sheet)}, step=images)

    def end(self, finished: bool) -> None:
        if finished:
            file = Path(self.run.metrics_file).absolute()
            self.logged.save(str(file), base_path=str(file.parent), policy="now")
        self.logged.finish(exit_code=None if finished else 1)

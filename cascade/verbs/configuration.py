"""From `conf/` and overrides on the command line to a configuration, and from one to objects.

What is wrong with a configuration is a `UserError` of one line.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

import cascade.conf
from cascade.errors import UserError


@contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if cause is not None and not isinstance(cause, (TypeError, ValueError)):
            raise
        where = str(error).strip().rsplit("full_key: ", 1)[-1]
        raise UserError(f"configuration {where}: {cause or error}") from error
    except (HydraException, OmegaConfBaseException) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError("configuration: " + " ".join(lines)) from error


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """`conf/{name}.yaml` with overrides in Hydra's syntax, resolved; nothing may be missing."""
    with (
        one_line_errors(),
        initialize_config_dir(str(Path(cascade.conf.__path__[0]).resolve()), version_base="1.3"),
    ):
        config = compose(name, list(overrides))
        try:
            missing = sorted(OmegaConf.missing_keys(config))
            OmegaConf.resolve(config)
        except InterpolationToMissingValueError as error:
            missing = [str(error).splitlines()[0].rsplit(": ", 1)[-1]]
        if missing:
            raise UserError(f"{missing[0]} is not given: add {missing[0]}=...")
        return config


def built(config: DictConfig | dict) -> Any:
    """The object that a configuration describes; lists and dictionaries become plain ones."""
    with one_line_errors():
        return instantiate(config, _convert_="all")


def saved(config: DictConfig, path: Path) -> None:
    """Writes a resolved configuration."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(config, resolve=True))


def loaded(path: Path) -> DictConfig:
    """A configuration that `saved` wrote."""
    if not path.exists():
        raise UserError(f"{path.parent} is not a run: it has no {path.name}")
    return OmegaConf.load(path)


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two configurations, as "a.b: 1 -> 2"."""
    if isinstance(old, (dict, DictConfig)) and isinstance(new, (dict, DictConfig)):
        keys = sorted({*old, *new}, key=str)
        dotted = [f"{where}.{key}" if where else str(key) for key in keys]
        pairs = [(old.get(k), new.get(k), d) for k, d in zip(keys, dotted)]
        return [line for pair in pairs for line in differences(*pair)]
    return [] if old == new else [f"{where}: {old} -> {new}"]

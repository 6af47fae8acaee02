"""Composes configurations from `conf/` and overrides, and builds objects from configurations.

Every fault of a configuration is a `UserError` of one line.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

import cascade.conf
from cascade.config.allowlist import check_resolved, check_targets
from cascade.config.overrides import parse
from cascade.config.signatures import Type
from cascade.config.values import conform, type_at
from cascade.errors import UserError
from cascade.files.atomic import write_text
from cascade.formats import texts


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
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        if isinstance(error, MissingConfigException):
            _check_kind(error.missing_cfg_file or "")
        raise UserError("configuration: " + " ".join(str(error).split())) from error


def _check_kind(missing: str) -> None:
    """Raises UserError if a stage was named where a whole cascade is expected, or vice versa."""
    group, _, name = missing.rpartition("/")
    files = Path(cascade.conf.__path__[0])
    if group == "cascade" and (files / f"experiment/{name}.yaml").exists():
        raise UserError(f"{name} is a single stage: run `cascade train experiment={name}`")
    if group == "experiment" and (files / f"cascade/{name}.yaml").exists():
        raise UserError(f"{name} is a whole cascade: run `cascade demo cascade={name}`")


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes `conf/{name}.yaml` with overrides in Hydra's syntax, resolved.

    Values get the types that their parameters' annotations declare; texts, such as paths, need no
    quotes.

    Raises:
        UserError: a value is missing, or has another type than its parameter.
    """
    given = [parse(override) for override in overrides]
    keys = Type(fields=f"cascade.config.keys.{name.title()}")  # the types of top-level values
    with (
        one_line_errors(),
        initialize_config_dir(str(Path(cascade.conf.__path__[0]).resolve()), version_base="1.3"),
    ):
        try:
            config = compose(name, before := [one.tentative for one in given])
        except ValueError as error:  # Hydra's, for a group that is null or a number
            raise UserError(f"configuration: {error}; ~GROUP leaves a group out") from error
        meant = [one.meant(type_at(config, keys, one.path)) for one in given]
        for one, text in zip(given, meant):
            if r"\${" in text:
                raise UserError(f"{one.path}: names cannot have '${{' in them, which is replaced")
        if meant != before:
            config = compose(name, meant)
        try:
            missing = sorted(OmegaConf.missing_keys(config))
            OmegaConf.resolve(config)
        except InterpolationToMissingValueError as error:
            missing = [str(error).split("\n")[0].rsplit(": ", 1)[-1]]
        if missing:
            raise UserError(f"{missing[0]} is not given: add {missing[0]}=...")
        conform(config, keys)
        check_resolved(OmegaConf.to_container(config), "")
        return config


def built(config: DictConfig | dict) -> Any:
    """Builds the object that a configuration describes, with plain lists and dictionaries.

    Raises:
        UserError: the configuration does not fit the object, or names something that is not on the
            allow-list; then nothing has been called.
    """
    with one_line_errors():
        config = OmegaConf.create(config) if isinstance(config, dict) else copy.deepcopy(config)
        OmegaConf.resolve(config)
        check_targets(OmegaConf.to_container(config), config._get_full_key(None))
        return instantiate(config, _convert_="all")


def saved(config: DictConfig, path: Path) -> None:
    """Writes a configuration, resolved, to a file."""
    write_text(path, OmegaConf.to_yaml(config, resolve=True))


def loaded(path: Path) -> DictConfig:
    """Reads a configuration that `saved` wrote, or that comes from elsewhere.

    Raises:
        UserError: the file is missing or damaged; it has interpolations, which could read the
            environment; or it has YAML aliases, a few lines of which can expand to terabytes.
    """
    if not path.exists():
        raise UserError(f"{path.parent} is not a run: it has no {path.name}")
    try:
        text = texts.read(path)
        aliases = any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text, yaml.SafeLoader))
        config = None if aliases else OmegaConf.create(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}): get it again") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{path} is no mapping of names to values without aliases: write it out")
    check_resolved(OmegaConf.to_container(config), "")
    return config


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Lists what differs between two configurations, as "a.b: 1 -> 2"; list indices are keys."""
    lists = isinstance(old, (list, ListConfig)) and isinstance(new, (list, ListConfig))
    if lists and len(old) == len(new):
        old, new = (dict(enumerate(v)) for v in (old, new))
    if isinstance(old, (dict, DictConfig)) and isinstance(new, (dict, DictConfig)):
        keys = sorted({*old, *new}, key=str)
        dotted = [f"{where}.{key}" if where else str(key) for key in keys]
        pairs = [(old.get(k), new.get(k), d) for k, d in zip(keys, dotted)]
        return [line for pair in pairs for line in differences(*pair)]
    return [] if old == new else [f"{where}: {old} -> {new}"]

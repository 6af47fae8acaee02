"""From `conf/` and overrides on the command line to a configuration, and from one to objects.

What is wrong with a configuration is a `UserError` of one line.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

import cascade.conf
from cascade import texts
from cascade.errors import UserError
from cascade.files import write_atomically
from cascade.verbs.overrides import read
from cascade.verbs.signatures import Type
from cascade.verbs.targets import check_resolved, check_targets
from cascade.verbs.values import conform, type_at

# Where the types are stated of what no target takes.
KEYS = {name: f"cascade.verbs.keys.{name.title()}" for name in ("train", "demo", "launch", "sweep")}


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
        raise UserError("configuration: " + " ".join(str(error).split())) from error


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """`conf/{name}.yaml` with overrides in Hydra's syntax, resolved; nothing may be missing.

    Values have the types that their parameters take, as annotations say; texts, such as paths, need
    no quotes.
    """
    given, keys = [read(override) for override in overrides], Type(fields=KEYS.get(name))
    with (
        one_line_errors(),
        initialize_config_dir(str(Path(cascade.conf.__path__[0]).resolve()), version_base="1.3"),
    ):
        config = compose(name, before := [one.tentative for one in given])
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
    """The object that a configuration describes; lists and dictionaries become plain ones.

    Raises:
        UserError: it does not describe one, or calls what `TARGETS` lacks: then nothing was called.
    """
    with one_line_errors():
        config = OmegaConf.create(config) if isinstance(config, dict) else copy.deepcopy(config)
        OmegaConf.resolve(config)
        check_targets(OmegaConf.to_container(config), config._get_full_key(None))
        return instantiate(config, _convert_="all")


def saved(config: DictConfig, path: Path) -> None:
    """Writes a resolved configuration."""
    text = OmegaConf.to_yaml(config, resolve=True)
    write_atomically(path, lambda beside: beside.write_text(text))


def loaded(path: Path) -> DictConfig:
    """A configuration that `saved` wrote, or a stranger: values only.

    Raises:
        UserError: there is none, it is damaged, or has interpolations, which would read the
            environment, or YAML's aliases, of which a few lines make terabytes.
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
        raise UserError(f"{path} is no plain configuration of names and values: write it out")
    check_resolved(OmegaConf.to_container(config), "")
    return config


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What differs between two configurations, as "a.b: 1 -> 2"; a place in a list is a key."""
    lists = isinstance(old, (list, ListConfig)) and isinstance(new, (list, ListConfig))
    if lists and len(old) == len(new):
        old, new = (dict(enumerate(v)) for v in (old, new))
    if isinstance(old, (dict, DictConfig)) and isinstance(new, (dict, DictConfig)):
        keys = sorted({*old, *new}, key=str)
        dotted = [f"{where}.{key}" if where else str(key) for key in keys]
        pairs = [(old.get(k), new.get(k), d) for k, d in zip(keys, dotted)]
        return [line for pair in pairs for line in differences(*pair)]
    return [] if old == new else [f"{where}: {old} -> {new}"]

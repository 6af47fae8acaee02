"""Models that are loaded: each stage once, and all of them within a memory limit.

What was used longest ago is dropped first. A model whose files changed is loaded again, and one
whose files are gone is refused.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from cascade.batch import image_size
from cascade.errors import UserError
from cascade.pipeline import Cascade, innermost
from cascade.runs.cascade_file import companions, parsed_choice, stage_choices, stage_runs
from cascade.runs.choices import SamplingChoices
from cascade.runs.model import device, load_cascade
from cascade.runs.run import Run
from cascade.serve.places import Place

MOST = 8  # cascades: stages in different choices of sampling; weaker ones are their own

Stamp = tuple[tuple[int, int] | None, ...]  # times and sizes of files


class Kept(NamedTuple):
    """What was loaded, from which files, and what they looked like."""

    what: Any
    files: tuple[Path, ...]
    stamp: Stamp


class Loaded(NamedTuple):
    """A cascade, and how each of its stages is sampled, by the stage's name."""

    cascade: Cascade
    choices: Mapping[str, Mapping[str, Any]]


class Store:
    """Stages and cascades of one device.

    Args:
        memory: bytes of weights to keep.
        load: loads the stage of a run.
    """

    def __init__(self, memory: int, load: Callable[[Run], Any] = Run.load):
        self.memory, self._load = memory, load
        self._stages: OrderedDict[Path, Kept] = OrderedDict()
        self._cascades: OrderedDict[tuple[str, tuple[str, ...]], Kept] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes of the weights that are loaded."""
        links = (link for kept in self._cascades.values() for link in kept.what.cascade.stages)
        return weight([*(kept.what for kept in self._stages.values()), *map(innermost, links)])

    def loaded(self, place: Place, sets: Sequence[str] = ()) -> Loaded:
        """A model, or a run as a cascade of one stage, with some sampling choices.

        Raises:
            UserError: it is not there any more, is damaged, or is larger than the memory limit.
        """
        if not place.there:
            raise UserError(f"{place.name} is not there any more: choose another")
        key = place.name, tuple(sets)
        kept = self._cascades.get(key)
        if kept is None or kept.stamp != stamp(kept.files):
            kept = self._loaded(place, sets)
            self._cascades[key] = kept
        self._cascades.move_to_end(key)
        while len(self._cascades) > MOST:
            self._cascades.popitem(last=False)
        return kept.what

    def _loaded(self, place: Place, sets: Sequence[str]) -> Kept:
        runs, more = [Run(place.path)], []
        if place.kind != "run":
            of = stage_runs(place.file, sets)
            runs = [Run(path) for path in of.values()]
            more = list(map(Run, companions(place.file, sets).values()))
        files = [] if place.kind == "run" else [place.file]
        files += [file for run in [*runs, *more] for file in _files(run)]
        before = stamp(files)
        self._make_room([run.path for run in [*runs, *more]], place.name)
        if place.kind == "run":
            options = {option: value for _, option, value in map(parsed_choice, sets)}
            cascade = _alone(runs[0], self._stage(runs[0]).to(device()), options)
            choices: dict[str, Any] = {place.path.name: options}
        else:
            cascade = load_cascade(place.file, sets, self._stage)
            choices = stage_choices(place.file, sets)
        found = Loaded(cascade, sampled(cascade, choices))
        return Kept(found, tuple(files), before)

    def _stage(self, run: Run) -> Any:
        kept, files = self._stages.get(run.path), _files(run)
        if kept is None or kept.stamp != stamp(files):
            before = stamp(files)
            stage = self._load(run)
            kept = self._stages[run.path] = Kept(stage, tuple(files), before)
        self._stages.move_to_end(run.path)
        return kept.what

    def _make_room(self, runs: Sequence[Path], name: str) -> None:
        """Drop what was used longest ago, until these runs fit."""
        sizes = {run: sum(file.stat().st_size for file in Run(run).weights) for run in runs}
        if (need := sum(sizes.values())) > self.memory:
            raise UserError(
                f"{name} has {need / 1e6:,.0f} MB of weights, and --memory allows "
                f"{self.memory / 1e6:,.0f}: choose a smaller one"
            )
        missing = sum(size for run, size in sizes.items() if run not in self._stages)
        while self._cascades and self.size + missing > self.memory:
            self._cascades.popitem(last=False)  # and with it its weaker stages
        for run in [run for run in self._stages if run not in sizes]:
            if self.size + missing <= self.memory:
                return
            self._drop(run)

    def _drop(self, path: Path) -> None:
        stage = self._stages.pop(path).what
        for key, kept in list(self._cascades.items()):
            if any(_same(innermost(link), stage) for link in kept.what.cascade.stages):
                del self._cascades[key]


def _same(one: Any, other: Any) -> bool:
    """Whether two stages share a network."""
    return one is other or getattr(one, "net", one) is getattr(other, "net", other)


def _files(run: Run) -> list[Path]:
    return [run.config_file, *run.weights]


def stamp(files: Iterable[Path]) -> Stamp:
    """Times and sizes of files; None for those that are gone."""
    found: list[tuple[int, int] | None] = []
    for file in files:
        try:
            at = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((at.st_mtime_ns, at.st_size))
    return tuple(found)


def weight(stages: Iterable[Any]) -> int:
    """Bytes of some stages and their encoders, which load when they are first used."""
    tensors: dict[int, Tensor] = {}
    for stage in stages:
        encoders = [value for one in stage.frozen for value in vars(one).values()]
        for module in [stage, *(value for value in encoders if isinstance(value, nn.Module))]:
            tensors |= {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def sampled(cascade: Cascade, choices: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The choices of each stage, with the scale and the steps that it takes."""
    found = {}
    for link, (name, of) in zip(cascade.stages, choices.items()):
        sampler, of = innermost(link).sampler, of or {}
        told = {} if of.get("text_embedding") else vars(sampler)
        own = {option: told[option] for option in ("scale", "steps") if told.get(option)}
        found[name] = {option: v for option, v in {**of, **own}.items() if v is not None}
    return found


def _alone(run: Run, stage: Any, options: Mapping[str, Any]) -> Cascade:
    """A cascade of one stage, which needs nothing but captions."""
    link = SamplingChoices.of(run.path.name, options).applied(stage, run)
    if not image_size(link.writes) or (lacks := link.reads - {"caption"}):
        needs = f"reads {', '.join(sorted(lacks))}" if image_size(link.writes) else "is no picture"
        raise UserError(f"{run.path} cannot paint alone ({needs}): choose its model")
    return Cascade([link])

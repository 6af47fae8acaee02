"""The table of measures: what is computed from generated pictures, its name, and what is better.

`MEASURES` is the only list of metrics. `evaluate --model`, the attribution of losses to stages,
sweeps, reports and `evaluate --pictures` all read it, so that a metric is added by one entry.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from cascade.eval.metrics import distances, interval, manifold
from cascade.eval.metrics.features import CLIPFeatures, Features, InceptionFeatures
from cascade.eval.metrics.interval import Interval
from cascade.eval.metrics.kernels import cmmd, cubic, gaussian, kid, kid_subsets
from cascade.eval.metrics.statistics import Moments

# Where a measure is reported: in metrics.json by size of picture, in the table of stages, as an
# outcome of sweeps, and in the numbers of `evaluate --pictures`.
EVALUATION, ATTRIBUTION, SWEEPS, PICTURES = "evaluation", "attribution", "sweeps", "pictures"
PLACES = (EVALUATION, ATTRIBUTION, SWEEPS, PICTURES)

_CHUNK = 4096  # rows whose logits are held at a time


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Generated pictures in one feature space, and what they are measured against.

    Attributes:
        space: which features these are.
        rows: features of the generated pictures.
        real: features of the real pictures.
        reference: moments of the real pictures' features.
        moments: those of `rows`, where a file keeps them; None: computed from `rows`.
        cosines: cosine similarity of each picture and its caption in a CLIP's space.
        right: whether each picture shows everything that its scene's caption asks for.
        minimum: fewest pictures of a Fréchet distance (None: four per dimension).
        draws: bootstrap resamples; 0: no bootstrapped intervals.
    """

    space: Features
    rows: Float[Tensor, "n d"]
    real: Float[Tensor, "m d"] | None = None
    reference: Moments | None = None
    moments: Moments | None = None
    cosines: Float[Tensor, " n"] | None = None
    right: Bool[Tensor, " n"] | None = None
    minimum: int | None = None
    draws: int = 200

    @property
    def logits(self) -> Callable[[], Iterator[Float[Tensor, "b c"]]] | None:
        """Gives Inception's class logits of all rows, in parts; None in other spaces."""
        if not isinstance(self.space, InceptionFeatures):
            return None
        return lambda: (self.space.logits(part).cpu() for part in self.rows.split(_CHUNK))

    @cached_property
    def balls(self) -> tuple[Float64[Tensor, " n"], Bool[Tensor, " m"]]:
        """What density and coverage are the means of."""
        return manifold.in_balls(self.rows, self.real)

    @cached_property
    def precision(self) -> float:
        return manifold.precision(self.rows, self.real)

    @cached_property
    def recall(self) -> float:
        return manifold.precision(self.real, self.rows)

    @cached_property
    def coverage(self) -> float:
        return self.balls[1].double().mean().item()

    @cached_property
    def kid_subsets(self) -> tuple[float, float]:
        return kid_subsets(self.rows, self.real)

    @cached_property
    def inception_score(self) -> tuple[float, float]:
        return distances.inception_score(self.logits())


@dataclass(frozen=True)
class Measure:
    """One metric.

    Attributes:
        key: of its value in files.
        name: in tables, figures and sentences.
        better: whether less or more of it is better.
        compute: its value; None: undefined for this sample (too few pictures, another space).
        interval: its 95 % confidence interval; None: there is none.
        deviation: over splits or subsets, where reporting one is the metric's convention.
        reads: the attributes of a `Sample` without which it is left out.
        places: where it is reported.
        distance: maps it to a distance whose errors grow in proportion to it, and back; sweeps
            compare such values by their ratio, and others (None) by their difference.
    """

    key: str
    name: str
    better: Literal["less", "more"]
    compute: Callable[[Sample], float | None]
    interval: Callable[[Sample], Interval | None] = lambda sample: None
    deviation: Callable[[Sample], float | None] = lambda sample: None
    reads: tuple[str, ...] = ()
    places: tuple[str, ...] = PLACES
    distance: Callable[[Any], Any] | None = None

    @property
    def title(self) -> str:
        return self.name[0].upper() + self.name[1:]

    @property
    def less(self) -> bool:
        """Whether less of it is better."""
        return self.better == "less"

    def best(self, values: Sequence[float | int]) -> int:
        """The index of the best of some values; of the first, where several are equal."""
        return int(np.argmin(values) if self.less else np.argmax(values))


def measures(place: str, sample: Sample | None = None) -> list[Measure]:
    """The measures reported in a place, in the table's order; those that apply to a sample."""
    found = [m for m in MEASURES if place in m.places]
    if sample is None:
        return found
    return [m for m in found if all(getattr(sample, name) is not None for name in m.reads)]


def _bootstrapped(of: Callable[[Sample], Interval]) -> Callable[[Sample], Interval | None]:
    return lambda sample: of(sample) if sample.draws else None


def _frechet(sample: Sample) -> float | None:
    if sample.moments is not None:
        return sample.moments.frechet(sample.reference)
    return distances.frechet_rows(sample.rows, sample.real, sample.minimum)


@_bootstrapped
def _frechet_interval(sample: Sample) -> Interval:
    to = sample.reference
    low, high = interval.of_frechet(sample.rows, to.mean, to.cov, sample.draws)
    # Numbers of picture sets have always been recorded without this bound.
    return (max(low, 0.0) if sample.moments is None else low), high


@_bootstrapped
def _cmmd_interval(sample: Sample) -> Interval:
    ends = interval.of_kernel(gaussian, sample.rows, sample.real, False, sample.draws)
    return 1000 * ends[0], 1000 * ends[1]


@_bootstrapped
def _kid_interval(sample: Sample) -> Interval:
    return interval.of_kernel(cubic, sample.rows, sample.real, True, sample.draws)


@_bootstrapped
def _inception_interval(sample: Sample) -> Interval:
    return interval.of_inception_score(sample.logits(), len(sample.rows), draws=sample.draws)


def _share_interval(share: str, rows: str) -> Callable[[Sample], Interval]:
    """Wilson's interval of a share of the generated (`rows`) or of the real pictures (`real`)."""
    return lambda sample: interval.of_share(getattr(sample, share), len(getattr(sample, rows)))


def _in_clip(compute: Callable[[Sample], float], wanted: bool) -> Callable[[Sample], float | None]:
    """None outside of the spaces of CLIPs, or (`wanted` is False) in them."""
    return lambda s: compute(s) if isinstance(s.space, CLIPFeatures) is wanted else None


def _share_right(sample: Sample) -> float:
    return int(sample.right.sum()) / len(sample.right)


def _cosine_interval(sample: Sample) -> Interval | None:
    return interval.of_mean(sample.cosines) if len(sample.cosines) > 1 else None


_of_sets = partial(Measure, reads=("real",), places=(PICTURES,))
_of_scenes = partial(Measure, compute=_share_right, reads=("right",))

FRECHET = Measure(
    "frechet",
    "Fréchet distance",
    "less",
    _frechet,
    _frechet_interval,
    reads=("reference",),
    distance=lambda x: x,
)
CLIP_SCORE = Measure(
    "clip_score",
    "CLIP score",
    "more",
    lambda s: s.cosines.double().mean().item(),
    _cosine_interval,
    reads=("cosines",),
    distance=lambda x: 1 - x,
)
# Of captions with words or forms that training captions never use.
HELD_OUT_PHRASINGS = _of_scenes(
    "accuracy_held_out", "scene accuracy, held-out phrasings", "more", places=(SWEEPS,)
)
# Of captions of concepts in styles.
RETRIEVED = _of_scenes("retrieved", "retrieval of the true picture", "more", places=(SWEEPS,))
IN_STYLE = _of_scenes("in_style", "pictures in the asked style", "more", places=(SWEEPS,))
ACCURACY = _of_scenes("accuracy", "scene accuracy", "more", places=(SWEEPS,))

MEASURES = (
    FRECHET,
    _of_sets(
        "cmmd",
        "CMMD",
        "less",
        _in_clip(lambda s: cmmd(s.rows, s.real), True),
        _cmmd_interval,
    ),
    _of_sets("kid", "KID", "less", _in_clip(lambda s: kid(s.rows, s.real), False), _kid_interval),
    _of_sets(
        "kid_subsets",
        "KID (subsets)",
        "less",
        _in_clip(lambda s: s.kid_subsets[0], False),
        deviation=lambda s: s.kid_subsets[1],
    ),
    *(
        _of_sets(key, key, "more", attrgetter(key), _share_interval(key, rows))
        for key, rows in (("precision", "rows"), ("recall", "real"), ("coverage", "real"))
    ),
    _of_sets(
        "density",
        "density",
        "more",
        lambda s: s.balls[0].mean().item(),
        lambda s: interval.of_mean(s.balls[0]),
    ),
    Measure(
        "inception_score",
        "Inception score",
        "more",
        lambda s: s.inception_score[0],
        _inception_interval,
        lambda s: s.inception_score[1],
        reads=("logits",),
        places=(PICTURES,),
    ),
    # Attribution computes these from the captions of one kind, which their keys name.
    _of_scenes("two", "scenes of two objects", "more", places=(ATTRIBUTION,)),
    _of_scenes("one", "scenes of one object", "more", places=(ATTRIBUTION,)),
    CLIP_SCORE,
    ACCURACY,
    HELD_OUT_PHRASINGS,
    RETRIEVED,
    IN_STYLE,
)

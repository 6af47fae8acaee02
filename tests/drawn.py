"""What the tests of properties draw, and how one is tested."""

import time
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import UnsatisfiedAssumption

from cascade.errors import UserError

settings.register_profile(
    "cascade",
    deadline=None,
    report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("cascade")

LETTERS = "aZ0 ,;:'\"\\/=%$#{}[]()&_-é" + "ßЖ漢ｱ😀\u0301\u2028\x85\x0b\x1c"
TEXT = st.text(st.one_of(st.sampled_from(LETTERS), st.characters(exclude_categories=["Cs"])))
PLAIN = st.text(st.sampled_from(LETTERS), min_size=1)
BROKEN = object()
SECONDS = 1.0  # for the examples of one property; ten times as long if slow


class OutOfTime(BaseException):
    """Ends a property; hypothesis takes no `BaseException` for a failure."""


def holds(examples, *drawn):
    """Makes a test of a claim(folder, *drawn): few examples, or ten times as many if slow.

    Ten examples are always tried, further ones as long as there is time, in the same order each
    time. Once an example has failed time does not count: it is tried again to make it smaller.
    """

    def test_of(claim):
        @pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
        def test(times, tmp_path):
            end, tried, failed = time.monotonic() + times * SECONDS, 0, False

            @settings(max_examples=examples * times)
            @given(st.tuples(*drawn))
            def every(values):
                nonlocal tried, failed
                try:
                    claim(tmp_path, *values)
                except UnsatisfiedAssumption:
                    raise
                except Exception:
                    failed = True
                    raise
                tried += 1
                # Only now: hypothesis would notice that an example drew less than before.
                if time.monotonic() > end and tried >= 10 and not failed:
                    raise OutOfTime

            with suppress(OutOfTime):
                every()

        return test

    return test_of


def or_refused(read, *args):
    """What a reader gives, or `BROKEN` if it refuses in one line."""
    try:
        return read(*args)
    except UserError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    return BROKEN


@st.composite
def damage(draw, data):
    """The same bytes cut short, or with some of them changed."""
    if draw(st.booleans()):
        return data[: draw(st.integers(0, len(data) - 1))]
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        out[draw(st.integers(0, len(out) - 1))] = draw(st.integers(0, 255))
    return bytes(out)

"""Times of functions that take turns, so that other processes slow down all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch

Clock = Callable[[], float]
Runs = Mapping[str, Callable[[], object]]  # by name


def wall(device: torch.device) -> Clock:
    """A clock that first waits for what a GPU was given."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def rounds(runs: Runs, count: int, clock: Clock = time.process_time) -> dict[str, list[float]]:
    """The seconds that each function takes in each round."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(count):
        for name, run in runs.items():
            start = clock()
            run()
            took[name].append(clock() - start)
    return took


def fastest(runs: Runs, count: int, clock: Clock = time.process_time) -> dict[str, float]:
    """The seconds of each function in its best round."""
    return {name: min(seconds) for name, seconds in rounds(runs, count, clock).items()}

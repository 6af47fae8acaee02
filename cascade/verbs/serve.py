"""`cascade serve`: a page on which to paint, edit, compare and watch."""

import argparse
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.serve.limits import Limits, bytes_of, check_address
from cascade.serve.line import Line
from cascade.serve.places import Places

LATEST = 5.0  # seconds after which a device is opened though nobody loaded a page


def main(args: argparse.Namespace) -> None:
    limits = Limits(args.most_pictures, args.longest, args.most_steps, bytes_of(args.memory))
    roots = [Path(folder) for folder in args.folders]
    for root in roots:
        if not root.exists():
            raise UserError(f"{root} does not exist: name folders that hold models or runs")
    places = Places(roots)
    if not places.found():
        raise UserError(f"no model, run or sweep in {', '.join(map(str, roots))}: train one first")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install 'cascade-diffusion[web]'")
    password = os.environ.get("CASCADE_PASSWORD")
    check_address(args.host, password)
    from cascade.serve.page.server import run

    line = Line(lambda number: opened(line, limits, number), limits.most_waiting, limits.patience)

    def told(url: str) -> None:
        print(f"{url} (end it with Ctrl-C)", flush=True)
        # The first page starts the devices once it is loaded, which importing torch would delay.
        later = threading.Timer(LATEST, line.start)
        later.daemon = True
        later.start()

    run(line, places, limits, args.host, args.port, password, told)


def opened(line: Line, limits: Limits, number: int) -> Any:
    """Open a device; the first one opens the others. Here torch is imported."""
    import torch

    from cascade.serve.engine import Engine

    if torch.cuda.is_available():
        torch.cuda.set_device(number)
        line.start(torch.cuda.device_count())
    return Engine(limits)

"""Import torch and query CUDA in a separate process.

A driver or a network disk that hangs or crashes then affects that process alone. It runs this
module, and prints what it found as JSON.
"""

import ctypes
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cascade.doctor.finding import Finding, note, problem, warning

MODULES = (
    *("torch", "torchvision", "lightning", "transformers", "open_clip", "hydra", "webdataset"),
    *("torchmetrics", "jaxtyping", "numpy", "scipy", "PIL", "rich", "matplotlib", "safetensors"),
    *("sentencepiece",),
)


def started(modules: Sequence[str]) -> subprocess.Popen:
    """Start the process that imports these modules, of which the first is torch."""
    command = [sys.executable, "-m", __name__, *modules]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen, seconds: float) -> dict[str, Any] | str | None:
    """What the process found; a text if it crashed, None if it did not end in time."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting: a process that hangs in a driver does not die
        return None
    try:
        return json.loads(out.strip().split("\n")[-1])
    except ValueError:
        last = err.strip().split("\n")[-1] or "it printed nothing"
        return f"exit code {process.returncode}: {last}"


def imports(saw: dict[str, Any] | str | None) -> Iterator[Finding]:
    """Report modules that cannot be imported, and whether CUDA works."""
    if saw is None:
        yield warning(
            "torch was not imported in time, or its CUDA hangs",
            "ask again (a first import from a network disk takes long), then with --full; if "
            "nvidia-smi hangs as well, restart the machine",
        )
        return
    if isinstance(saw, str):
        yield problem(f"torch cannot be imported ({saw})", "install it again")
        return
    for name, reason in saw["broken"].items():
        yield problem(f"{name} cannot be imported ({reason})", "install it again")
    if "torch" not in saw["broken"]:
        yield from cuda(saw)


def cuda(saw: dict[str, Any]) -> Iterator[Finding]:
    """Compare what torch's CUDA finds with what the machine has."""
    built, driver = saw["built"], saw["driver"]
    if saw["devices"]:
        yield note(f"CUDA {built}: {', '.join(saw['devices'])}")
        for name in saw["unsupported"]:
            yield problem(f"this torch has no code for {name}", "install a build of torch for it")
    elif not saw["card"]:
        yield note("no NVIDIA GPU: everything runs on CPUs")
    elif saw["hidden"]:
        yield note("CUDA_VISIBLE_DEVICES hides the GPUs: everything runs on CPUs")
    elif built is None:
        yield warning(
            "this torch is built for CPUs, and the machine has an NVIDIA GPU",
            "install a build of torch with CUDA",
        )
    else:
        too_old = driver and driver // 1000 < int(built.split(".")[0])
        why = f"the driver is of CUDA {driver // 1000}.{driver % 1000 // 10}" if too_old else ""
        yield problem(
            f"the GPU cannot be used by torch, which is built for CUDA {built} "
            f"({why or saw['complaint'] or 'no reason given'})",
            f"install a driver of CUDA {built} or newer, or a build of torch for the old one",
        )


def _see(modules: Sequence[str]) -> dict[str, Any]:
    broken: dict[str, str] = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            broken[name] = f"{type(error).__name__}: {first}"
    return {"broken": broken, **({} if "torch" in broken else _cuda())}


def _cuda() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    codes = torch.cuda.get_arch_list() if count else []
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    able = [torch.cuda.get_device_capability(i) for i in range(count)]
    return {
        "built": torch.version.cuda,
        "driver": _driver(),
        "card": Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"),
        "devices": names,
        "unsupported": [name for name, of in zip(names, able) if not _runs(of, codes)],
        "complaint": str(complaints[0].message).split("\n")[0] if complaints else "",
    }


def _driver() -> int:
    """The newest CUDA version that the driver supports (13020: 13.2); 0 without a driver."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return 0
    return number.value


def _runs(capability: tuple[int, int], codes: Sequence[str]) -> bool:
    """Whether binary code (sm_90: 9.0 to 9.x) or PTX (compute_80: from 8.0) runs on a device."""
    split = (code.rstrip("af").partition("_") for code in codes)
    known = [(kind, (int(of[:-1]), int(of[-1]))) for kind, _, of in split if of.isdigit()]
    return not known or any(
        of <= capability and (kind == "compute" or of[0] == capability[0]) for kind, of in known
    )


if __name__ == "__main__":
    print(json.dumps(_see(sys.argv[1:])))

"""The machine that a benchmark runs on: what it is, who else uses it, what memory a process takes."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_VERSIONED = (
    "keras",
    "keras-hub",
    "tensorflow",
    "jax",
    "torch",
    "torchvision",
    "segment-anything-py",
    "transformers",
    "numpy",
)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "XLA_FLAGS")


def set_environment() -> None:
    """Before Keras is imported: its backend, and a GPU that torch and JAX can share."""
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu_info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu_info.read_text()) if cpu_info.exists() else None
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions,
        "backend": os.environ.get("KERAS_BACKEND", "tensorflow"),
        "accelerators": accelerators(),
        "gpus": gpu_names(),
        "threads": {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
    }


def accelerators() -> list[str]:
    """Devices other than CPUs that the backend sees."""
    import keras

    return [device for device in keras.distribution.list_devices() if not device.lower().startswith("cpu")]


def gpu_names() -> list[str]:
    """The NVIDIA GPUs of the machine, whoever uses them."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.splitlines()


def print_machine(machine: dict[str, Any]) -> None:
    """Three lines."""
    cpu, cores, ram_gib, load = (machine[key] for key in ("cpu", "cores", "ram_gib", "load_average"))
    print(f"{cpu}, {cores} cores, {ram_gib} GiB, load average {load} at the start")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = ", ".join(f"{name}={value}" for name, value in machine["threads"].items()) or "the libraries' own choice"
    print(f"Python {machine['python']}, {versions}; threads: {threads}")
    gpus = f"; GPUs of the machine: {'; '.join(machine['gpus'])}" if machine["gpus"] else ""
    print(f"backend {machine['backend']} on {', '.join(machine['accelerators']) or 'CPU'}{gpus}")


class OtherProcesses:
    """What share of the machine's CPU time other processes have used since this object was made.

    They do not slow both sides alike: torch's threads wait for each other at every loop, so that one that is kept from
    its core keeps all of them. With a busy neighbour the reference was seen to take eight times as long, ours three to
    four.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """From 0 to 1."""
        wall, busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return max(busy - own, 0.0) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: wall time, CPU time of all processes, and of this one."""
        user, nice, system, _, _, interrupts, soft_interrupts, stolen = (
            int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:9]
        )
        busy = user + nice + system + interrupts + soft_interrupts + stolen
        return time.perf_counter(), busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def peak_rss_bytes() -> int:
    """Highest resident memory of this process since it began, or since reset_peak_rss."""
    return _memory_field("VmHWM")


def rss_bytes() -> int:
    """Resident memory of this process now."""
    return _memory_field("VmRSS")


def _memory_field(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        raise RuntimeError(f"/proc/self/status has no {name}: memory can be measured on Linux only")
    return int(found[1]) * 1024


def reset_peak_rss() -> bool:
    """Starts a new high-water mark, so that loading and compiling are not counted. False where Linux forbids it."""
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def device_peak_bytes(side: str) -> int | None:
    """Highest memory in use on the accelerator, as the side's framework counts it; None without one."""
    import keras

    if side != "ours":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if not accelerators():
        return None
    if keras.backend.backend() == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import tensorflow

    return tensorflow.config.experimental.get_memory_info("GPU:0")["peak"]

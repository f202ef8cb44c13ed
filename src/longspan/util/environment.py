"""The record of what a result depends on besides its settings: machine, library versions, command line."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from importlib.metadata import version
from typing import Any

import psutil
import torch

from longspan.util.version import __version__


def machine(device: torch.device) -> dict[str, Any]:
    """Facts of the device and the host.

    Memory is in bytes; `device_memory` is what a run can use of it.
    """
    facts: dict[str, Any] = {
        "device": device.type,
        "device_name": _processor_name(),
        "device_memory": _host_memory(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_memory": _host_memory(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device_name": properties.name,
            "device_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return facts


def versions() -> dict[str, str]:
    """Versions of this package, torch, transformers and Python."""
    return {
        "longspan": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command that started this process, quoted for a shell."""
    return shlex.join(sys.argv)


def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_memory() -> int:
    """Bytes of memory, or the limit of the container where that is smaller."""
    memory = psutil.virtual_memory().total
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{limit}") as file:
            memory = min(memory, int(file.read()))
    return memory

"""A description of the machine and the versions with which something was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Of a container: its limit and what is in use, of cgroups 2 and 1.
CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device) -> int | None:
    """How many bytes of memory are free on a device; None where that cannot be said."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused  # torch's allocator has some of it
    limits, info = [], Path("/proc/meminfo")
    if info.is_file():
        limits += [1024 * int(n) for n in re.findall(r"MemAvailable:\s*(\d+)", info.read_text())]
    for names in CGROUPS:
        limit, used = (Path("/sys/fs/cgroup", name) for name in names)
        with contextlib.suppress(OSError, ValueError):  # a limit of "max" is none
            limits.append(int(limit.read_text()) - int(used.read_text()))
    return min(limits, default=None)


def describe_run(command: str, device: torch.device) -> dict[str, Any]:
    """The fields at the head of every file of results."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.is_file() else []
    name = next(iter(names), platform.processor() or platform.machine())
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    versions: dict[str, str | None] = {"python": platform.python_version()}
    # torch itself names its build (+cu130), which its CUDA wheels' metadata leaves out.
    versions["torch"] = str(torch.__version__)
    for name in ("triton", "transformers", "dsb-kernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # Triton has no build here, or this is a checkout
            versions[name] = None
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine,
        "versions": versions,
    }

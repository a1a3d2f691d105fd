"""A description of the machine and the versions with which something was measured."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names of the device and the CPU, cores, threads and operating system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((v.strip() for k, _, v in lines if k.strip() == "model name"), name)
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else name,
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide what was measured."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    # torch itself names its build (+cu130), which its CUDA wheels' metadata leaves out.
    versions["torch"] = str(torch.__version__)
    for name in ("triton", "transformers", "dsb-kernels"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # Triton has no build here, or this is a checkout
            versions[name] = None
    return versions


def describe_run(command: str, device: torch.device) -> dict[str, Any]:
    """The fields at the head of every file of results."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(device),
        "versions": describe_versions(),
    }

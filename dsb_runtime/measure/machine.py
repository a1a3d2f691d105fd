"""A description of the machine and the versions with which something was measured."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


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

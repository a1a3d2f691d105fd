"""`dsb serve`: OpenAI's API over HTTP, on a `BatchEngine`. It needs the extra `serve`."""

import os
from pathlib import Path

from dsb_runtime.demo import MODEL_DIR

MAX_QUEUE = 256  # how many rows may wait, where nobody says
KEY = "DSB_API_KEY"  # the environment variable that may hold the key, which `ps` does not show


def served_name(model: str) -> str:
    """What clients call the model: a hub id, a folder's last name as it was typed (also where that
    is a link), or `embedded`."""
    if Path(model) == MODEL_DIR:
        return "embedded"
    return Path(os.path.abspath(model)).name if Path(model).is_dir() else model

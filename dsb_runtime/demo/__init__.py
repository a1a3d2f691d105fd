"""The embedded model: a small masked diffusion LM that solves arithmetic word problems.

``MODEL_DIR`` holds its weights, configuration and tokenizer in the LLaDA hub format, so that it
loads through the very path that LLaDA-8B takes. ``problems`` makes the problems it solves,
``train`` made its weights.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"

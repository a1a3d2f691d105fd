"""The embedded model: a small masked diffusion LM that solves arithmetic word problems.

`MODEL_DIR` holds its weights, configuration and tokenizer in the LLaDA hub format, so that it
loads as LLaDA-8B does. `problems` makes the problems that it solves; `tools/embedded_model` trained
its weights.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"

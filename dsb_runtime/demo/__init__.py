"""The embedded models: small masked diffusion LMs for arithmetic word problems and for Sudoku.

`MODEL_DIR` (word problems) and `SUDOKU_DIR` hold weights, configuration and tokenizer in the LLaDA
hub format, so that they load as LLaDA-8B does. `problems` and `sudoku` make what they solve;
`tools/embedded_model` trained their weights.
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
SUDOKU_DIR: Path = MODEL_DIR.with_name("sudoku_model")

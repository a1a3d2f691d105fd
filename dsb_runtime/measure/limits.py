"""The limit of a decoding step: its linear layers alone, and its weights at copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class StepRows:
    """What one forward has to multiply, over all batch rows."""

    kind: str  # "window", "response" (the prompt's K/V stay) or "refresh" (every position)
    rows: int  # rows through the layers
    scored: int  # rows through the LM head


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `run` returns, and its seconds."""
    synchronize(device)
    began = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - began


class LinearLayers:
    """The linear layers of a model's steps, with nothing between them.

    What follows the last layer's keys and values is read at the scored rows alone, so that it is
    multiplied with those alone.
    """

    def __init__(self, model: PreTrainedModel, most_rows: int) -> None:
        self.full: list[Tensor] = []  # multiplied with all rows of a step
        self.scored: list[Tensor] = [model.lm_head.weight]  # with those to be scored
        last = len(model.model.layers) - 1
        for index, layer in enumerate(model.model.layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    late = index == last and not name.endswith(("k_proj", "v_proj"))
                    (self.scored if late else self.full).append(module.weight)
        weights = self.full + self.scored
        self.bytes = sum(w.numel() * w.element_size() for w in weights)
        self.inputs = {
            width: torch.randn(most_rows, width, device=model.device).to(model.dtype)
            for width in {w.shape[1] for w in weights}
        }

    def run(self, step: StepRows) -> None:
        for weights, rows in ((self.full, step.rows), (self.scored, step.scored)):
            for weight in weights:
                linear(self.inputs[weight.shape[1]][:rows], weight)


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes per second, read plus written, of a large copy on the GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    size = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
    # Data copies slower than zeros, which is what fresh memory holds.
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[1] for _ in range(12)]
    return 2 * size / statistics.median(seconds[2:])

"""The floor of a decoding run: its linear layers alone, on the same numbers of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ForwardRows:
    """Rows of one forward: `hidden` go through the layers, `scored` through the LM head."""

    hidden: int
    scored: int


class LinearFloor:
    """Every linear layer of a model's forwards of up to `rows` rows, with nothing between them."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.weights = [
            module.weight for module in model.model.modules() if isinstance(module, nn.Linear)
        ]
        self.head = model.lm_head.weight
        widths = {w.shape[1] for w in self.weights} | {self.head.shape[1]}
        self.inputs = {
            width: torch.randn(rows, width, device=self.head.device).to(self.head.dtype)
            for width in widths
        }

    @torch.no_grad()
    def run(self, forwards: list[ForwardRows]) -> None:
        """Multiply each weight with as many rows as each forward has."""
        for rows in forwards:
            for weight in self.weights:
                linear(self.inputs[weight.shape[1]][: rows.hidden], weight)
            linear(self.inputs[self.head.shape[1]][: rows.scored], self.head)

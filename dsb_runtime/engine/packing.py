"""Packing: linear layers with the same input (q, k, v or gate, up) become one matmul.

Their weights are moved into one storage, and the model's own parameters become views of it. They
stay the same `Parameter` objects with the same values. Nothing is stored twice, and a write to a
parameter changes the packed weight too. Moving the model (`.to`) gives each parameter a storage of
its own again, so `packed` looks each time where the parameters lie, and packs them anew if needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsb_runtime.engine.graphs import CAPTURING
from dsb_runtime.engine.turns import Turns

PACKING = Turns()  # two threads may pack the same model


def neighbours(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other in one storage, without a gap."""
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in itertools.pairwise(tensors)
    )


def packed(parameters: Sequence[Tensor]) -> Tensor:
    """Return the parameters (n_i, ...), one after the other, as one tensor (sum n_i, ...), of which
    they become views. After an interrupt each of them is in its old place or its new one, with the
    same values. Inference mode must be off: a tensor made in it can never be trained."""

    def move() -> None:
        old = [p.data for p in parameters]
        if neighbours(old):
            return
        whole = torch.cat(old)
        if whole.is_cuda:  # on other streams, what the parameters point to is read without a wait
            torch.cuda.current_stream(whole.device).synchronize()
        parts = whole.split([len(p) for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
        if whole.is_cuda:  # other streams may still read `old`, whose memory is given back now
            CAPTURING.run(lambda: torch.cuda.synchronize(whole.device))

    if not neighbours([p.data for p in parameters]):
        PACKING.run(move)
    first = parameters[0].data
    length = sum(len(p) for p in parameters)
    return first.as_strided((length, *first.shape[1:]), first.stride())


def packed_linear(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """The weight (sum out, in) and the bias (sum out,) or None of linear layers that share their
    input."""
    weight = packed([linear.weight for linear in linears])
    biases: list[Any] = [linear.bias for linear in linears]
    return weight, None if biases[0] is None else packed(biases)

"""One matmul where a layer has several with the same input: q, k, v and gate, up.

Their weights are moved into one storage and the model's own parameters become views of it: the
same `Parameter` objects with the same values, nothing is stored twice, and a write to one is seen
through the other. Where the parameters lie is looked up each time: moving the model (`.to`) gives
each a storage of its own again, and then they are packed anew.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PACKING = threading.Lock()  # two threads that meet a model for the first time


def neighbours(tensors: Sequence[Tensor]) -> bool:
    """Whether contiguous tensors follow each other in one storage, without a gap."""
    return all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.nbytes == b.data_ptr()
        for a, b in itertools.pairwise(tensors)
    )


def packed(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters (n_i, ...) one after the other as one tensor (sum n_i, ...); afterwards they
    are views of it."""
    first = parameters[0].data
    if not neighbours([p.data for p in parameters]):
        # Not in inference mode, which a caller may be in: its tensors can never be trained.
        with PACKING, torch.inference_mode(False), torch.no_grad():
            if not neighbours([p.data for p in parameters]):
                whole = torch.cat([p.data for p in parameters])
                parts = whole.split([len(p) for p in parameters])
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.data = part
                first = parameters[0].data
    length = sum(len(p) for p in parameters)
    return first.as_strided((length, *first.shape[1:]), first.stride())


def packed_linear(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight (sum out, in) and bias (sum out,) of linear layers that share their input."""
    weight = packed([linear.weight for linear in linears])
    biases: list[Any] = [linear.bias for linear in linears]
    return weight, None if biases[0] is None else packed(biases)

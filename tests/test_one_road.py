"""One road: on a CPU a decoding step runs the definitions of ops, and nothing computes beside them.

A dispatch mode counts the operators of PyTorch that compute, once with and once without those that
run inside an op's definition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import dsb_runtime as dsb
from dsb_kernels.attention import window_attention
from dsb_kernels.commit import unmask_and_slide
from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.place import place_rows
from dsb_kernels.rope_kv import rope_write_kv
from tests import golden
from tests.golden import left_pad, prompts
from tests.recorded import is_view

A_STEP = {place_rows: 1, lm_head_confidence: 1, unmask_and_slide: 1}
A_LAYER = {window_linear: 2, linear_add_norm: 2, rope_write_kv: 1, window_attention: 1}
# What a forward computes itself: the embedding, the first layer's norm (RMSNorm in parts), and
# which tokens are scored.
BESIDE = {"embedding", "_fused_rms_norm", "pow", "mean", "add", "rsqrt", "mul", "index_select"}


class Outside(TorchDispatchMode):
    """The operators that run while no definition does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.seen = 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside and not is_view(func):
            self.seen.add(func._schema.name.split("::")[1].rstrip("_"))
        return func(*args, **(kwargs or {}))


def counted(definition: Callable, counts: Counter, name: str, mode: Outside) -> Callable:
    def run(*args, **kwargs):
        counts[name] += 1
        mode.inside += 1
        try:
            return definition(*args, **kwargs)
        finally:
            mode.inside -= 1

    return run


@pytest.mark.parametrize("cache", ["dsb", "dual", "none"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_cpu_runs_the_definitions_and_nothing_beside_them(monkeypatch, cache, count):
    model, counts, mode = golden.model("llada"), Counter(), Outside()
    for op in A_STEP | A_LAYER:
        run = counted(op.definition, counts, op.__name__, mode)
        monkeypatch.setattr(op, "definition", run)
    step = dsb.engine.step.Step.__call__

    def recorded(*args):
        with mode:
            step(*args)

    monkeypatch.setattr(dsb.engine.step.Step, "__call__", recorded)
    ids, mask = left_pad(prompts(count))
    out = dsb.generate(model, ids, attention_mask=mask, gen_length=16, block_length=8, cache=cache)
    per_step = A_STEP | {op: n * len(model.model.layers) for op, n in A_LAYER.items()}
    assert counts == {op.__name__: n * out.nfe for op, n in per_step.items()}
    assert mode.seen <= BESIDE, mode.seen - BESIDE

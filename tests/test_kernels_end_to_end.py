"""Every op of the step run by its Triton kernel: golden trajectories in float32, and what each
forward of a decoding computes in bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_kernels.attention import window_attention
from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_kernels.place import Layout
from dsb_kernels.rope_kv import rope_write_kv
from dsb_runtime.engine import forward, layers, step
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.forward import Backbone
from dsb_runtime.engine.sampling import propose
from tests import golden
from tests.mutations import DEVICE, kernels

# The kernels know no families: these differ in settings and in heads per KV head.
METHODS = [("llada", "naive"), ("dream", "dual_cache"), ("dream", "dsb_greedy"),
           ("llada", "dsb_cache_const")]  # fmt: skip


@pytest.mark.slow
def test_trajectory():
    with kernels():
        golden.check_trajectory(
            golden.generate_of("llada"), *golden.shortest("llada", "dsb_cache_greedy")
        )


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), METHODS)
def test_tokens_are_the_definitions(family, method):
    """For the other methods on less than a recorded trajectory: the interpreter takes seconds for
    each forward and grows with its length, and the definitions reproduce all trajectories."""
    golden.check_kernels(golden.generate_of(family), family, method)


OPS = [(forward, rope_write_kv), (forward, window_attention)]
OPS += [(layers, window_linear), (layers, linear_add_norm)]  # where the engine finds each op


def unchecked(op: Callable[..., Any]) -> Callable[..., Tensor]:
    """The definition of an op in whatever dtype: the op's own checks refuse float64."""

    def run(*args: Any, **options: Any) -> Tensor:
        result = op.definition(*args, **options)  # type: ignore[attr-defined]
        return result[0] if op is window_attention else result  # without the log-sum-exp

    return run


class Errors:
    """How far the kernels, and the definitions, are from the definitions in float64: in every
    forward of a decoding by kernels, each from the same canvas and the same K/V. Tokens are not
    compared: rounding may change them."""

    def __init__(self, model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
        self.wide, self.patch = copy.deepcopy(model).double(), patch
        self.squares: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.forward = Backbone.__call__
        patch.setattr(Backbone, "__call__", lambda *args, **options: self.run(*args, **options))
        patch.setattr(step, "propose", self.propose)

    def run(self, backbone: Backbone, layout: Layout, cache: KVCache, **options: bool) -> Tensor:
        """In place of `Backbone.__call__`: hidden states by kernels."""
        plain, wide = (
            replace(cache, keys=[copy_of(x) for x in cache.keys],
                    values=[copy_of(x) for x in cache.values])
            for copy_of in (Tensor.clone, Tensor.double)
        )  # fmt: skip
        with self.patch.context() as patch:
            for module, op in OPS:
                patch.setattr(module, op.__name__, unchecked(op))
            wide_backbone = Backbone(self.wide, len(backbone.cos_sin))
            self.plain = self.forward(backbone, layout, plain, **options)
            self.exact = self.forward(wide_backbone, layout, wide, **options)
        hidden = self.forward(backbone, layout, cache, **options)
        self.add("K/V", *(torch.stack([*c.keys, *c.values]) for c in (cache, plain, wide)))
        return hidden

    def propose(
        self, hidden: Tensor, lm_head: torch.nn.Linear, scored: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        """In place of `propose`: tokens and confidences by kernels."""
        token, confidence = propose(hidden, lm_head, scored, *args)
        plain, exact, index = self.plain[scored], self.exact[scored], token[scored][:, None]
        self.add("hidden", hidden[scored], plain, exact)
        plain = linear(plain, lm_head.weight).float().softmax(-1).gather(-1, index)
        exact = linear(exact, self.wide.lm_head.weight).softmax(-1).gather(-1, index)
        self.add("confidence", confidence[scored][:, None], plain, exact)
        return token, confidence

    def add(self, name: str, kernel: Tensor, plain: Tensor, exact: Tensor) -> None:
        squares = tuple((x.double() - exact).square().flatten() for x in (kernel, plain))
        assert exact.dtype == torch.float64
        self.squares.setdefault(name, []).append(squares)

    def ratio(self, name: str) -> float:
        """The kernels' error over the definitions', root mean squares over all forwards."""
        kernel, plain = (torch.cat(x).mean() for x in zip(*self.squares[name], strict=True))
        return (kernel / plain).sqrt().item()


@pytest.mark.slow
def test_bfloat16_error_is_at_most_twice_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dsb.load_model(golden.DATA / "dream", dtype="bfloat16", device=DEVICE)
    errors, kinds = Errors(model, monkeypatch), set()
    ids, mask = (t.to(DEVICE) for t in golden.left_pad([row[:6] for row in golden.prompts(2)]))
    with kernels():
        dsb.Engine(model, graphs=False).generate(
            ids, attention_mask=mask, gen_length=4, block_length=4, steps=2,
            on_step=lambda event: kinds.add(event.kind),
        )  # fmt: skip
    assert kinds == {"refresh", "window"}
    for name in ("hidden", "confidence", "K/V"):
        assert errors.ratio(name) <= 2, name

"""One op at one shape, with its contenders: they are checked, then timed.

The check divides a contender's error against the definition in float64 by the error that is
allowed. That is 1e-5, or twice the error of the definition in the case's own precision where that
is more; integers must be equal. Memory is filled with NaN before the checked call, so that elements
which a kernel does not write show.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from dsb_runtime.measure.timing import Call, copy_bandwidth, time_call

DEFINITIONS = ("definition", "definition compiled")
OTHERS_MAY = 2.0  # times the error that the op may have: they round at other places


def on_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if on_gpu() else "cpu")


def timed_precision() -> str:
    """The dtype of what is timed: 16 bits on a GPU; a CPU would emulate them."""
    return "bfloat16" if on_gpu() else "float32"


def randn(*size: int, precision: str | None) -> Tensor:
    dtype = getattr(torch, precision or timed_precision())
    return torch.randn(*size, device=device(), dtype=dtype)


@functools.lru_cache(maxsize=1)
def compiled(function: Callable[..., Any], *sizes: Any) -> Callable[..., Any]:
    """`function` under torch.compile for tensors of these sizes, once for all input sets. Without
    the reset, compilations for other sizes would count against the compiler's limit, after which it
    silently runs the function itself. On a CPU the graph is traced and not made into C++, which
    takes longer than everything else there."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="inductor" if on_gpu() else "eager")


@dataclass
class Case:
    """One call of an op at one shape."""

    op: Any  # a public function, or one with a `definition` of its own
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)  # what computes the same
    written: tuple[Tensor, ...] = ()  # arguments that a call changes; restored between calls
    bytes: int = 0  # how many a call has to read and write
    flops: int = 0
    # This measures the error of a result over the allowed error where integers may differ.
    error: Callable[[Any], float] | None = None
    definition: Any = None  # what a result is held against: that of the op where it is None

    def __post_init__(self) -> None:
        if self.definition is None:
            self.definition = self.op.definition
        self.before = [tensor.clone() for tensor in self.written]

    def restore(self) -> None:
        for tensor, before in zip(self.written, self.before, strict=True):
            tensor.copy_(before)

    def call(self, contender: str) -> Call:
        """The call of a contender: "op", "definition", "definition compiled" or one of others."""
        if contender in self.others:
            run = self.others[contender]
        else:
            function = self.op if contender == "op" else self.definition
            if contender == "definition compiled":
                sizes = [x.shape for x in self.args if isinstance(x, Tensor)]
                function = compiled(function, *sizes)
            run = functools.partial(function, *self.args, **self.options)
        return Call(run, self.restore if self.written else None)


def poison() -> None:
    """Fill the memory that the allocator hands out next with NaN."""
    if on_gpu():
        torch.cuda.empty_cache()
        blocks = [torch.full((n,), torch.nan, device="cuda") for n in (1 << 26, *[1 << 14] * 256)]
        del blocks


def relative_error(result: Tensor, exact: Tensor) -> float:
    """||result - exact|| / ||exact||; infinite where anything is not a number."""
    value = (result.double() - exact).norm().item() / (exact.norm().item() or 1.0)
    return math.inf if math.isnan(value) else value


def allowed_error(plain: Tensor, exact: Tensor) -> float:
    """The error that is allowed where the definition gives `plain` in the case's own precision and
    `exact` in float64."""
    return max(1e-5, 2 * relative_error(plain, exact))


def by_definition(case: Case, change: Callable[[Tensor], Tensor], count: int) -> list[Tensor]:
    """The first `count` results of the definition on changed copies of the arguments (it may return
    more than the op does), then the arguments that it wrote."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), change(tensor))

    args, options = tree_map_only(Tensor, copy, (case.args, case.options))
    result = case.definition(*args, **options)
    return [*tensors_of(result)[:count], *(copies[id(tensor)] for tensor in case.written)]


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


@torch.no_grad()
def check(case: Case, contender: str) -> float:
    """The error of a contender over the error that it may have, at most 1 where it is right."""
    call = case.call(contender)
    poison()
    result = call.run()
    if case.error is not None:
        return case.error(result) / (1.0 if contender == "op" else OTHERS_MAY)
    count = len(tensors_of(result))
    results = [tensor.clone() for tensor in (*tensors_of(result), *case.written)]
    case.restore()
    exact = by_definition(case, lambda t: t.double() if t.is_floating_point() else t.clone(), count)
    plain = by_definition(case, torch.clone, count)
    worst = 0.0
    for tensor, by_plain, by_exact in zip(results, plain, exact, strict=True):
        if by_exact.is_floating_point():
            error = relative_error(tensor, by_exact) / allowed_error(by_plain, by_exact)
        else:
            error = 0.0 if torch.equal(tensor, by_exact) else math.inf
        worst = max(worst, error)
    return worst / (1.0 if contender == "op" else OTHERS_MAY)


def time_contender(make: Callable[[], Case], contender: str) -> dict[str, float]:
    """The figures of a contender at the shape of the cases that `make` makes."""
    case = make()
    times = time_call(lambda: make().call(contender), case.bytes, device())
    figures = {
        "cold_us": round(1e6 * times.cold, 2),
        "warm_us": round(1e6 * times.warm, 2),
        "bandwidth_share": round(case.bytes / times.cold / copy_bandwidth(device()), 4),
    }
    if case.flops:
        figures["tflops"] = round(1e-12 * case.flops / times.cold, 3)
    return figures

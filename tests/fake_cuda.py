"""A CUDA made of metadata, to run what a GPU would run where there is none.

Fake tensors have a shape, a dtype, strides and the device "cuda", but no values: a step does here
all that it does on a GPU up to what a kernel computes. Beyond what torch's fake tensors check
themselves, `FakeCuda` refuses what a captured step cannot hold: an operator that takes or makes a
CPU tensor, and a tensor that the host reads. Launches of our kernels are bound to their signature
and specialised as on a GPU; compiling is where they stop.

Not seen here: values, what a kernel reads and writes, and which of its own kernels torch takes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

import dsb_kernels
from dsb_kernels._launch import PDL_OPTIONS
from tools.compile_report.cases import collect_cases

SM_COUNT = 132  # of an H100


DRIVER = SimpleNamespace(  # what a launch asks of a GPU's driver
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)
OPERATORS = {
    Tensor.contiguous: torch.ops.aten.contiguous,
    Tensor.copy_: torch.ops.aten.copy_,
    Tensor.__invert__: torch.ops.aten.bitwise_not,
    Tensor.__int__: torch.ops.aten._local_scalar_dense,
}


class Bindings(TorchFunctionMode):
    """By operators: methods of a CPU build of torch that refuse a CUDA tensor before they ask
    whether it is a fake one, which are those above, x[...] and x[...] = v."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        indexing = func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_cuda
        if not indexing:
            return OPERATORS.get(func, func)(*args, **(kwargs or {}))
        x, index, *value = args
        x, indices = self.view(x, index if isinstance(index, tuple) else (index,))
        assert all(i is None or i.is_cuda for i in indices), "an index on the host"
        if value and not isinstance(value[0], Tensor):
            value = [x.new_full((), value[0])]
        if not indices:
            return torch.ops.aten.copy_(x, *value) if value else x
        if value:
            return torch.ops.aten.index_put_(x, indices, *value)
        return torch.ops.aten.index(x, indices)

    @staticmethod
    def view(x: Tensor, index: tuple) -> tuple[Tensor, list[Tensor | None]]:
        """What is left to index by tensors, and those tensors by dimension."""
        if any(i is Ellipsis for i in index):
            ellipsis = [i is Ellipsis for i in index].index(True)
            named = sum(i is not None for i in index) - 1
            index = (*index[:ellipsis], *[slice(None)] * (x.ndim - named), *index[ellipsis + 1 :])
        indices: list[Tensor | None] = []
        for i in index:
            dim = len(indices)
            if isinstance(i, int):
                x = x.select(dim, i)
                continue
            if i is None:
                x = x.unsqueeze(dim)
            elif isinstance(i, slice):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
            indices.append(i if isinstance(i, Tensor) else None)
        return x, indices if any(i is not None for i in indices) else []


class FakeCuda(TorchDispatchMode):
    """Fake CUDA tensors live inside; `step()` is what a graph would capture."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []  # what the host reads next; after that it reads zeros
        self.inside = False
        self.calls: list[str] = []  # kernels and torch's operators of the last step, in order
        self.devices: list[torch.device] = []  # made current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.inside:
            return self.answers.pop(0) if self.answers else 0
        if self.inside and func.namespace == "dsb":  # what an op of ours calls is seen as well
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)) if self.inside else ():
            assert not isinstance(value, Tensor) or value.is_cuda, f"{func}: a CPU tensor in a step"
        if self.inside and func.namespace == "aten" and not func.is_view:
            self.calls.append(func._schema.name.removeprefix("aten::"))
        return result

    @property
    def launched(self) -> Counter[str]:
        """How often the last step launched each kernel."""
        return Counter(self.calls)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside, nothing may touch the host."""
        self.inside = True
        self.calls.clear()
        try:
            yield
        finally:
            self.inside = False

    def hook(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """What Triton calls before it compiles. True: it does not."""
        types = {n: t.replace("u1", "i1") for n, t in compile["signature"].items()}
        fits = [
            all(kind in (case.get(name, kind), "constexpr") for name, kind in types.items())
            for case in compiled_types()[fn.name]
        ]
        assert any(fits), f"{fn.name}: compiled for the chips with other types than {types}"
        self.calls.append(fn.name)
        return True


@functools.cache
def compiled_types() -> dict[str, list[dict[str, str]]]:
    """By kernel: the types of its arguments in the launches that are compiled for the chips."""
    types: dict[str, list[dict[str, str]]] = {}
    for case in collect_cases():
        types.setdefault(case.kernel.__name__, []).append(dict(case.signature))
    return types


class Launcher:
    """Binds the arguments of a launch and compiles its kernel, or stops before that where a
    `FakeCuda` is active. It stands in place of what `wrap_triton` returns."""

    compiled: Callable[[str, Any], None] = staticmethod(lambda name, kernel: None)

    def __init__(self, kernel: Any) -> None:
        # Without a GPU the tests' kernels are the interpreter's, which binds in its own way.
        self.kernel = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            assert 0 < grid[0] < 2**31 and all(0 < n < 65536 for n in grid[1:]), grid
            assert all(a.is_cuda for a in args if isinstance(a, Tensor)), "a CPU tensor in a launch"
            bound = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in args]
            options |= PDL_OPTIONS  # as `OnDevice` adds for an H100
            self.compiled(self.kernel.__name__, self.kernel.warmup(*bound, grid=grid, **options))

        return launch


def cuda(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Triton and torch find an H100. Its kernels cannot be launched."""
    properties = SimpleNamespace(multi_processor_count=SM_COUNT)
    with (
        mock.patch.object(triton.runtime.driver, "_active", DRIVER),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
    ):
        yield


@contextlib.contextmanager
def bound_launches() -> Iterator[None]:
    """Launches of our kernels go to `Launcher`."""
    with contextlib.ExitStack() as stack:
        for info in pkgutil.iter_modules(dsb_kernels.__path__, "dsb_kernels."):
            module = importlib.import_module(info.name)
            if hasattr(module, "wrap_triton"):
                stack.enter_context(mock.patch.object(module, "wrap_triton", Launcher))
        # As outside of a trace.
        stack.enter_context(torch._library.triton.set_wrap_triton_enabled(False))
        yield


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Everything inside runs as with a GPU."""
    fake = FakeCuda()

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        fake.devices.append(device)
        yield

    with (
        h100(),
        bound_launches(),
        mock.patch.object(torch.cuda, "device", device),
        mock.patch.object(torch.cuda, "current_stream", mock.Mock()),
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(torch.cuda, "Event", mock.Mock),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", fake.hook),
        torch.no_grad(),
        FakeTensorMode(),
        fake,
        Bindings(),
    ):
        yield fake


def on_gpu(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the fake GPU, in bfloat16."""
    # deepcopy takes these for copies that it has made.
    copies: dict[int, Any] = {id(b): cuda(*b.shape, dtype=b.dtype) for b in model.buffers()}
    for p in model.parameters():
        copies[id(p)] = nn.Parameter(cuda(*p.shape, dtype=torch.bfloat16), requires_grad=False)
    return copy.deepcopy(model, copies)

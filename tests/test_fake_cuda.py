"""The branches for a GPU, run without one on fake CUDA tensors.

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
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

import dsb_runtime as dsb
from dsb_kernels import score as row_state
from dsb_kernels.rows import Column, StepKind
from dsb_runtime.engine import layers
from dsb_runtime.engine.cache import WindowCache
from dsb_runtime.engine.graphs import HostCopy
from dsb_runtime.engine.loop import Session
from dsb_runtime.engine.step import StepShape
from tests import golden
from tests.test_attention_backend import cache_argument
from tests.test_patch import random_model
from tools.compile_report.report import collect_cases

ROWS, PROMPT, SHAPE = 3, 12, {"gen_length": 24, "block_length": 8}
LENGTH = PROMPT + SHAPE["gen_length"]

# --- a GPU made of metadata -------------------------------------------------------------------


class Driver:
    """What a launch asks of a GPU's driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


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
        left = sum(i is not None and i is not Ellipsis for i in index)
        indices: list[Tensor | None] = []
        for i in index:
            dim = len(indices)
            if i is None:
                x = x.unsqueeze(dim)
                indices.append(None)
                continue
            if i is Ellipsis:
                indices += [None] * (x.ndim - dim - left)
                continue
            left -= 1
            if isinstance(i, int):
                x = x.select(dim, i)
            elif isinstance(i, slice):
                x = torch.ops.aten.slice(x, dim, i.start, i.stop, i.step or 1)
                indices.append(None)
            else:
                indices.append(i)
        return x, indices if any(i is not None for i in indices) else []


class FakeCuda(TorchDispatchMode):
    """Fake CUDA tensors live inside; `step()` is what a graph would capture."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []  # what the host reads next; after that it reads zeros
        self.inside = False
        self.launched: Counter[str] = Counter()  # kernels of the last step
        self.devices: list[torch.device] = []  # made current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and not self.inside:
            return self.answers.pop(0) if self.answers else 0
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)) if self.inside else ():
            assert not isinstance(value, Tensor) or value.is_cuda, f"{func}: a CPU tensor in a step"
        return result

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Inside, nothing may touch the host."""
        self.inside = True
        self.launched.clear()
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
        self.launched[fn.name] += 1
        return True


@functools.cache
def compiled_types() -> dict[str, list[dict[str, str]]]:
    """By kernel: the types of its arguments in the launches that are compiled for the chips."""
    found: dict[str, list[dict[str, str]]] = {}
    for case in collect_cases():
        found.setdefault(case.kernel.__name__, []).append(dict(case.signature))
    return found


class Launcher:
    """A kernel whose launches end before they compile. In place of what `wrap_triton` returns."""

    def __init__(self, kernel: Any) -> None:
        # Without a GPU the tests' kernels are the interpreter's, which binds in its own way.
        self.kernel = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            assert 0 < grid[0] < 2**31 and all(0 < n < 65536 for n in grid[1:]), grid
            assert all(a.is_cuda for a in args if isinstance(a, Tensor)), "a CPU tensor in a launch"
            bound = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in args]
            self.kernel.warmup(*bound, grid=grid, **options)

        return launch


class Event:
    """A CUDA event that has always happened."""

    def record(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeCuda]:
    """The test runs as with a GPU."""
    fake = FakeCuda()

    @contextlib.contextmanager
    def device(device: torch.device) -> Iterator[None]:
        fake.devices.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    for name, module in list(sys.modules.items()):
        if name.startswith("dsb_kernels.") and hasattr(module, "wrap_triton"):
            monkeypatch.setattr(module, "wrap_triton", Launcher)
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", fake.hook)
    # The compiler wants a GPU to compile for.
    monkeypatch.setattr(layers, "fused_silu_mul", lambda: layers.silu_mul)
    for family in golden.FAMILIES:
        golden.model(family)  # read before anything is fake
    launches = torch._library.triton.set_wrap_triton_enabled(False)  # as outside of a trace
    with torch.no_grad(), launches, FakeTensorMode(), fake, Bindings():
        yield fake


def on_gpu(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A copy of a model on the fake GPU."""
    copies: dict[int, Any] = {}  # what deepcopy takes for copies that it has made
    for p in model.parameters():
        fake = torch.empty(p.shape, dtype=dtype, device="cuda")
        copies[id(p)] = nn.Parameter(fake, requires_grad=False)
    for b in model.buffers():
        copies[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="cuda")
    return copy.deepcopy(model, copies)


def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def session_of(gpu: FakeCuda, family: str, *, padded: bool = False, **settings: Any) -> Session:
    engine = dsb.Engine(on_gpu(golden.model(family)), capture=lambda run: run)
    config = dsb.DecodingConfig(**SHAPE, **settings)
    gpu.answers = [padded]  # the one thing that the host reads
    leftpad = integers(ROWS, dtype=torch.int32)
    session = engine.loop.session(config, integers(ROWS, PROMPT), leftpad, 0)
    assert not gpu.answers and session.step.padded is padded
    return session


def run(gpu: FakeCuda, session: Session, kind: str, rows: int, width: int) -> None:
    """A step, and what it must have launched."""
    with gpu.step():
        session.step(StepShape(StepKind[kind.upper()], rows, width, SHAPE["block_length"]))
    depth = len(session.step.backbone.layers)
    assert sum(n for name, n in gpu.launched.items() if "unmask" in name) == 1
    assert gpu.launched["_rope_write_kv_kernel"] == depth * (session.step.cache is not None)
    if kind != "refresh":
        assert gpu.launched["_attention_kernel"] == depth


# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_of_step(gpu, monkeypatch, family, padded, packed):
    if packed:  # the type of a fake Parameter is FakeTensor
        monkeypatch.setattr(layers, "is_plain", lambda module: True)
    session = session_of(gpu, family, padded=padded, refresh_policy="response")
    kind = layers.PackedLayer if packed else layers.ModuleLayer
    assert all(type(layer) is kind for layer in session.step.backbone.layers)
    for rows in (ROWS, 1):  # the whole batch, and some of it
        for kind, width in (("refresh", LENGTH), ("window", 16), ("response", 25)):
            run(gpu, session, kind, rows, width)
            assert gpu.launched["_lm_head_kernel"] == gpu.launched["combine_kernel"] == 1
            twice = (
                2 * len(session.step.backbone.layers) * packed
            )  # a layer: qkv and MLP, out, down
            assert rows * width <= layers.MAX_ROWS
            for kernel in ("_window_linear_kernel", "_split_linear_kernel", "_add_norm_kernel"):
                assert gpu.launched[kernel] == twice


SETTINGS = (
    {"cache": "none"}, {"cache": "dual", "schedule": "naive", "steps": 6}, {"temperature": 0.7},
    {"factor": 1.0, "stop_at_eos": True}, {"frechet": 0.25, "max_block_length": 8},
)  # fmt: skip
NUCLEUS = ({"top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5})


@pytest.mark.parametrize(
    ("family", "settings"),
    [(f, s) for f in golden.FAMILIES for s in SETTINGS] + [("dream", s) for s in NUCLEUS],
)
def test_settings(gpu, family, settings):
    session = session_of(gpu, family, **settings)
    cached = session.step.cache is not None
    kinds = (("refresh", LENGTH), *((("window", 16),) if cached else ()))
    for rows, (kind, width) in zip((ROWS, 1), kinds, strict=False):
        run(gpu, session, kind, rows, width)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_call_from_prompt_to_output(gpu, monkeypatch, family):
    """Checks, state, captures by class of shape, flags, output. What the flags say is a script."""
    script = [StepKind.REFRESH, StepKind.WINDOW, StepKind.WINDOW, StepKind.NOTHING]
    captured: list[Counter[str]] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with gpu.step():
            step()
        captured.append(gpu.launched.copy())
        return step

    def wait(self: HostCopy) -> Tensor:
        row = [1] * len(Column)
        row[Column.NEXT_KIND], row[Column.NUM_CANDIDATES] = script.pop(0), 8
        row[Column.START], row[Column.END], row[Column.FAILED] = 64, 72, 0
        gpu.answers = row * ROWS
        return self.values

    monkeypatch.setattr(HostCopy, "wait", wait)
    engine = dsb.Engine(on_gpu(golden.model(family)), capture=capture)
    prompts = integers(ROWS, PROMPT)
    gpu.answers = [0, 0, True]  # the ids' range; the mask is one
    out = engine.generate(prompts, attention_mask=prompts, temperature=0.5, **SHAPE)
    assert out.nfe == 3 and out.row_nfe == [3] * ROWS and not script
    assert out.sequences.is_cuda and out.sequences.shape == (ROWS, LENGTH)
    assert gpu.devices == [prompts.device]
    depth = len(engine.loop.backbone.layers)
    assert len(captured) == 2 and captured[1]["_attention_kernel"] == depth


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_patched_models_own_forward(gpu, kind):
    with unset_fake_temporarily():
        plain = dsb.patch(random_model(kind), family="llada", mask_id=511)
    model = on_gpu(plain)
    rows, depth = integers(2, dtype=torch.int32), model.config.num_hidden_layers
    cache = WindowCache(depth, 2, 16)
    for width in (None, 8):  # the canvas, a window
        cache.point(None, rows, rows, width)
        ids = integers(2, width or 16)
        with gpu.step():
            model(ids, position_ids=ids[:1], use_cache=True, **{cache_argument(model): cache})
        assert gpu.launched["_rope_write_kv_kernel"] == depth
        assert width is None or gpu.launched["_attention_kernel"] == depth


# --- what the fake GPU refuses ----------------------------------------------------------------


def host_read(x: Tensor) -> None:
    bool((x > 0).any())


REFUSED = {
    "a host read": host_read,
    "a CPU tensor beside others": lambda x: x + torch.zeros(4),
    "a CPU scalar tensor": lambda x: x * torch.tensor(2.0),
    "a tensor made on the CPU": lambda x: torch.arange(4),
    "a copy to the host": lambda x: x.cpu(),
    "an index on the host": lambda x: x[torch.tensor([1])],
    "a shape that does not fit": lambda x: x[None].addmm_(x[None], x[None]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_captured_step_cannot_hold_is_refused(gpu, name):
    x = torch.empty(4, device="cuda")
    refusals = AssertionError, RuntimeError, DataDependentOutputException
    with gpu.step(), pytest.raises(refusals):
        REFUSED[name](x)


@pytest.mark.parametrize("change", ["type", "count", "name", "device"])
def test_a_launch_that_does_not_fit_its_kernel_is_refused(gpu, change):
    arguments = [torch.empty(7, 6, 3, device="cuda"), None, None, None, None, 3, 7, 0]
    state = torch.empty(6, 3, device="cuda")
    options = {"PARTS": 8, "CONFIDENCE": "probability"}
    arguments[4] = state
    Launcher(row_state.combine_kernel)[(3,)](*arguments, **options)
    assert gpu.launched["combine_kernel"] == 1
    if change == "type":
        arguments[0] = arguments[0].double()
    elif change == "count":
        arguments.append(1)
    elif change == "name":
        options["PART"] = options.pop("PARTS")
    else:
        arguments[4] = torch.empty(6, 3)
    with pytest.raises((AssertionError, TypeError, KeyError)):
        Launcher(row_state.combine_kernel)[(3,)](*arguments, **options)

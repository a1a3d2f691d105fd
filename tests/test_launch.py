"""How kernels are launched, and that each waits for the kernel before it prior to any access."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dsb_kernels
from dsb_kernels import _launch as launching
from dsb_kernels import attention_kernel
from dsb_kernels._op import jit, tl

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

FOLDER = Path(dsb_kernels.__file__).parent
SAFE = ("prefetch", "_prefetch")  # how the names of functions begin that only prefetch
OF_TRITON = ("program_id", "num_programs", "arange", "cdiv", "minimum", "cast")  # no accesses


def test_launches_set_fp_fusion_explicitly():
    with torch._library.triton.set_wrap_triton_enabled(False):  # as in an eager call
        options = launching.launch_options(4, 2)
    assert options == {"num_warps": 4, "num_stages": 2, "PDL": False, "enable_fp_fusion": True}
    assert "enable_fp_fusion" not in launching.launch_options(4, 2)  # as while tracing


@pytest.mark.parametrize(
    ("capability", "variable"),
    [((8, 0), ""), ((8, 9), ""), ((9, 0), ""), ((12, 0), ""), ((9, 0), "0")],
)
def test_where_and_how_a_kernel_is_launched(capability, variable, monkeypatch):
    """On the device of its tensors, where Triton would take the current one. It begins before the
    kernel before it has ended where the GPU can do that."""
    where: list[torch.device] = []
    launched: list[tuple] = []

    def fn(x_ptr, n):
        pass

    @contextlib.contextmanager
    def device(device):
        where.append(device)
        yield
        where.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("DSB_PDL", variable)
    launching.overlaps.cache_clear()
    kernel = JITFunction(fn)
    run = lambda *a, grid, warmup, **o: launched.append((where[-1].index, grid, len(a), o))  # noqa: E731
    monkeypatch.setattr(kernel, "run", run)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    with torch._library.triton.set_wrap_triton_enabled(False):
        launching.wrap_triton(kernel)[(3,)](x, 2, num_warps=4)
    launching.overlaps.cache_clear()
    early = {"PDL": True, "launch_pdl": True} if capability >= (9, 0) and not variable else {}
    assert launched == [(1, (3,), 2, {"num_warps": 4, **early})] and where[-1] is None
    traced = launching.wrap_triton(kernel)
    assert type(traced).__name__ == "TraceableTritonKernelWrapper"


@jit
def count_lines(ptrs, mask, PDL: tl.constexpr):
    """In place of `prefetch`: add 1 where an address points to."""
    tl.atomic_add(ptrs, 1, mask=mask)


@jit
def odd_kib_kernel(
    ptr, stride, num_rows, steps, LINES: tl.constexpr, ROW_LINES: tl.constexpr,
):  # fmt: skip
    for step in range(steps):
        launching.prefetch_odd_kib(ptr, stride, num_rows, step, LINES, ROW_LINES, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="under the interpreter")
@pytest.mark.parametrize(
    ("rows", "columns", "lines"),
    [(13, 512, 32), (13, 512, 8), (5, 1100, 64), (1, 1024, 16), (40, 768, 16), (3, 300, 128)],
)
def test_all_programs_together_ask_for_the_odd_kib_of_every_row_once(
    rows, columns, lines, monkeypatch
):
    monkeypatch.setattr(launching, "prefetch", count_lines)
    counts = torch.zeros(rows, columns + 7, dtype=torch.int32)
    row_lines = launching.odd_lines(counts[:, :columns])
    odd_kib_kernel[(2, 3, 1)](counts, counts.stride(0), rows, 12, LINES=lines, ROW_LINES=row_lines)
    first = torch.arange(columns) % 32 == 0  # of a line of 128 bytes
    odd = torch.arange(columns) // 256 % 2 == 1  # KiB
    assert counts[:, columns:].sum() == 0
    assert torch.equal(counts[:, :columns], (first & odd).int().expand(rows, -1))
    assert row_lines == (first & odd).sum()


@jit
def span_kernel(ptr, first, end, SIZE: tl.constexpr):
    launching.prefetch_span(ptr, first, end, SIZE, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="under the interpreter")
@pytest.mark.parametrize(("first", "end", "size"), [(0, 500, 512), (64, 500, 128), (32, 40, 16)])
def test_a_span_asks_for_each_of_its_lines_once(first, end, size, monkeypatch):
    monkeypatch.setattr(launching, "prefetch", count_lines)
    counts = torch.zeros(512, dtype=torch.int32)
    span_kernel[(1,)](counts, first, end, SIZE=size)
    index = torch.arange(512)
    inside = (index >= first) & (index < min(end, first + size))
    assert torch.equal(counts, (inside & (index % 32 == 0)).int())


@jit
def keys_kernel(
    ptr, leftpad_ptr, stride, C, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr
):
    attention_kernel._prefetch_keys(
        ptr, ptr, leftpad_ptr, 1, tl.program_id(0), stride, C, HEAD_DIM, SPLITS, BLOCK_N, HEAD_DIM,
        True,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="under the interpreter")
@pytest.mark.parametrize("leftpad", [None, 0, 240, 1180, 1280, -7, 5000])  # the last two are stale
def test_each_split_asks_for_the_first_keys_that_it_visits(leftpad, monkeypatch):
    monkeypatch.setattr(launching, "prefetch", count_lines)
    C, splits, size = 1280, 4, 64
    counts = torch.zeros(C + size, size, dtype=torch.int32)
    where = None if leftpad is None else torch.tensor([9, leftpad], dtype=torch.int32)
    keys_kernel[(splits,)](counts[32:], where, size, C, HEAD_DIM=size, SPLITS=splits, BLOCK_N=size)
    first = min(max(leftpad or 0, 0), C)
    share = -(-(C - first) // size // splits) * size  # of a split, in whole KV blocks
    asked = torch.zeros(C + size, dtype=torch.bool)
    asked[32 + first : 32 + C] = torch.arange(C - first) % share < 128
    assert torch.equal(counts[:, ::32] > 0, asked[:, None].expand(-1, 2))


def functions() -> Iterator[ast.FunctionDef]:
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                yield node


def launched_kernels() -> set[str]:
    """Names of all kernels that the package launches."""
    names = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrap_triton":
                names.add(ast.unparse(node.args[0]))
    return names


def called_before_waiting(kernel: ast.FunctionDef) -> list[str]:
    """What a kernel calls before `wait_for_previous(PDL)`, which is a statement of its body."""
    waits = [i for i, x in enumerate(kernel.body) if ast.unparse(x) == "wait_for_previous(PDL)"]
    assert len(waits) == 1, f"{kernel.name} waits {len(waits)} times"
    early = [node for x in kernel.body[: waits[0]] for node in ast.walk(x)]
    assert not any(isinstance(node, ast.Return) for node in early), kernel.name
    return calls(early)


def calls(nodes: Iterable[ast.AST]) -> list[str]:
    return [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]


def is_safe(call: str) -> bool:
    return call.startswith(SAFE) or call.removeprefix("tl.") in OF_TRITON or call.endswith(".to")


def unsafe_calls(kernel: ast.FunctionDef) -> list[str]:
    return [call for call in called_before_waiting(kernel) if not is_safe(call)]


def test_every_kernel_waits_before_it_loads_or_stores():
    """Before it waits, a kernel computes addresses and prefetches."""
    launched = launched_kernels()
    kernels = [f for f in functions() if f.name in launched]
    assert len(kernels) == len(launched) >= 12
    assert {k.name: unsafe_calls(k) for k in kernels if unsafe_calls(k)} == {}


def test_what_only_prefetches_neither_loads_nor_stores():
    """It may peek at what says where. It returns nothing, so that nothing else depends on that."""
    helpers = [f for f in functions() if f.name.startswith(SAFE)]
    assert len(helpers) == 5
    for helper in helpers:
        text = ast.unparse(helper)
        assert "tl.load(" not in text and "tl.store(" not in text
        assert not any(isinstance(node, ast.Return) for node in ast.walk(helper))
    assert [f.name for f in functions() if "peek" in calls(ast.walk(f))] == ["_prefetch_keys"]


@pytest.mark.parametrize(
    ("line", "unsafe"),
    [("y = tl.load(x)", ["tl.load"]), ("if y: tl.store(x, 1)", ["tl.store"]),
     ("y = helper(x)", ["helper"]), ("x += tl.program_id(0)", []), ("prefetch(x, y, PDL)", [])],
)  # fmt: skip
def test_the_rule_finds_an_access_before_the_wait(line, unsafe):
    source = f"def kernel(x, y, PDL):\n    {line}\n    wait_for_previous(PDL)"
    (kernel,) = ast.parse(source).body
    assert unsafe_calls(kernel) == unsafe


def test_a_kernel_that_does_not_wait_is_refused():
    (kernel,) = ast.parse("def kernel(x, PDL):\n    if x: wait_for_previous(PDL)").body
    with pytest.raises(AssertionError, match="waits 0 times"):
        unsafe_calls(kernel)

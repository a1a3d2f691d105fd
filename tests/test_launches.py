"""What a GPU would be asked to launch, on fake tensors: in processes without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsb_kernels import _op as dispatch

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed"),
]


def without_interpreter(code: str) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "Encountered an exception" not in result.stderr


TRACE_FOR_CUDA = """
import contextlib, torch, triton
from functorch.compile import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from dsb_kernels import linear_add_norm, rope_kv
from dsb_kernels import token_confidence as confidence
from dsb_kernels import lm_head as lm_head_confidence
from dsb_kernels import place as place_rows
from dsb_kernels import window_linear
from dsb_kernels import commit as unmask
from dsb_kernels import attention as window_attention
from dsb_kernels import attention_kernel as window_attention_kernel

class Driver:  # what tracing asks of a GPU's driver
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0

triton.runtime.driver.set_active(Driver())
window_attention_kernel.sm_count = lambda device: 132
with FakeTensorMode():
    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="cuda")
    q, k, c = (empty(2, *s, 128, dtype=torch.bfloat16) for s in ((8, 64), (2, 64), (2, 512)))
    row, flag = empty(2, dtype=torch.int32), empty(2, dtype=torch.bool)
    lists, table = empty(2, 8, dtype=torch.int32), empty(512, 128, dtype=torch.float32)
    canvas, token = empty(2, 100, dtype=torch.int64), empty(2, 32, dtype=torch.int64)
    confidence, position, commit = token.float(), token.int(), token > 0
    flags, x = empty(2, 10, dtype=torch.int32), empty(4, 64, dtype=torch.bfloat16)
    square, gain = empty(64, 64, dtype=torch.bfloat16), empty(64, dtype=torch.bfloat16)
ops, graphs = torch.ops.dsb, []

class Traced(Exception):
    pass

def keep(graph, _):
    graphs.append(graph)
    def stop(*args):  # running the graph needs the GPU
        raise Traced
    return make_boxed_func(stop)

def in_cache(q, c, row):
    rows, rest = (row, row, row), (None, None, None, None, 64, 1.0, None, False)
    return ops.window_attention(q, None, None, c, c, *rows, *rest)[0]

def fresh(q, k, c, row, lists):
    rows = (row, row, row, row, row, row)
    return ops.window_attention(q, k, k, c, c, *rows, lists, 64, 1.0, 4, True)

def rotate(q, k, table, c, row):
    return ops.rope_write_kv(q, k, k, table, c, c.clone(), row, row, None, row, True)

def unmask(canvas, token, confidence, row, flag, position, commit, flags):
    ints, bools = [row.clone() for _ in range(9)], [flag.clone() for _ in range(3)]
    record = commit.clone(), confidence.clone(), flags.clone()
    ops.unmask_and_slide(
        canvas, token, confidence, *ints, *bools, position, *record, flag, row, row,
        50, 32, None, "dsb", "dsb", 24, 0, "threshold", 0.9, 0, "select", 99, [3, 7], True, 2,
    )
    return record[0]

def place(canvas, row, position):
    return ops.place_rows(
        canvas, row, row, row, position, row, row, row, 0, 0, [1, 24, 8], 1, 50
    )

def score(x):
    return ops.token_confidence(x, None, [3], 0.0, None, None, "probability")

def score_hidden(x):
    return ops.lm_head_confidence(x, x, None, None, [], 0.0, None, None, "margin")

def linear(x, square):
    return ops.window_linear(x, square, None, True)

def add_linear(x, square, gain):
    return ops.linear_add_norm(x, square, x.clone(), gain, 1e-5)

calls = {
    in_cache: (q, c, row), fresh: (q, k, c, row, lists), rotate: (q, k, table, c, row),
    unmask: (canvas, token, confidence, row, flag, position, commit, flags),
    place: (canvas, row, position), score: (x,), score_hidden: (x,), linear: (x, square),
    add_linear: (x, square, gain),
}
for call, arguments in calls.items():
    with contextlib.suppress(Traced):
        aot_function(call, fw_compiler=keep)(*arguments)
names = [[str(n.target) for n in g.graph.nodes if n.op == "call_function"] for g in graphs]
launches = [sum("triton_kernel_wrapper" in name for name in graph) for graph in names]
assert launches == [2, 2, 1, 1, 1, 2, 2, 1, 2], names
"""


def test_cuda_calls_are_traced_to_kernel_launches() -> None:
    """What torch.compile sees of a step's ops are their kernels."""
    without_interpreter(TRACE_FOR_CUDA)


LAUNCH_FOR_CUDA = """
import re, torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor
from dsb_kernels import linear_add_norm, rope_kv
from dsb_kernels import token_confidence as confidence
from dsb_kernels import lm_head as lm_head_confidence
from dsb_kernels import place as place_rows
from dsb_kernels import score as row_state
from dsb_kernels import commit as unmask
from dsb_kernels import commit_kernel as unmask_kernel
from dsb_kernels import attention as window_attention
from dsb_kernels import window_linear
from dsb_kernels import attention_kernel as window_attention_kernel

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
launched = []

def before_commit(ptx):  # what precedes the first write to the canvas, which is of 64 bits
    accesses = re.findall(r"(?:ld|st)\\.global(?:\\.v2)?\\.b64|bar\\.sync", ptx)
    return accesses[[access[:2] for access in accesses].index("st") - 1]

class Warmup:  # everything that a launch does but the launch
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **options):
            assert all(0 < n < 2**31 for n in grid[:1]) and all(n < 65536 for n in grid[1:])
            args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            assert compiled.metadata.enable_fp_fusion
            assert compiled.metadata.shared <= 227 * 1024, (self.kernel.__name__, options)
            launched.append(self.kernel.__name__)
            if launched[-1] == "_unmask_kernel":  # whose threads read what they then overwrite
                assert before_commit(compiled.asm["ptx"]) == "bar.sync"
        return launch

for module in (confidence, linear_add_norm, lm_head_confidence, place_rows, row_state, rope_kv,
        unmask_kernel, window_attention_kernel, window_linear):
    module.wrap_triton = Warmup
window_attention_kernel.sm_count = lambda device: 132
(token_op, head_op, partial_op, combine_op, rope_op, unmask_op, attention_op, place_op, linear_op,
        norm_op) = (
    op._init_fn for op in (confidence._token_confidence_op,
        lm_head_confidence._lm_head_confidence_op, lm_head_confidence._lm_head_partial_op,
        row_state._combine_partials_op, rope_kv._rope_write_kv_op, unmask._unmask_and_slide_op,
        window_attention._window_attention_op, place_rows._place_rows_op,
        window_linear.window_linear.op, linear_add_norm._linear_add_norm_op))
with torch._library.triton.set_wrap_triton_enabled(False), FakeTensorMode():
    def cuda(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="cuda", dtype=dtype)
    for rows, V in ((1, 1), (1, 126464), (300, 1001)):
        eligible, seed = cuda(rows, dtype=torch.bool), cuda(dtype=torch.int64)
        ids, logits = cuda(rows, dtype=torch.int64), cuda(rows, V)
        token_op(logits, None, [], 0.0, None, None, "probability")
        token_op(logits, eligible, [0][: V - 1], 0.7, seed, ids, "margin")
    for rows, V, dtype in ((1, 16, torch.bfloat16), (128, 1001, torch.float32)):
        hidden, weight, bias = (cuda(*s, dtype=dtype) for s in ((rows, 128), (V, 128), (V,)))
        head_op(hidden, weight, bias, cuda(rows, dtype=torch.bool), [0], 0.0, None, None, "margin")
        partial_op(hidden, weight, None, None, [], 0.0, None, None, "probability", 7)
    assert len(launched) == 20, launched
    table = cuda(96, 128, dtype=torch.float32)
    for B, W, cache_batch in ((1, 1, 1), (3, 32, 5)):
        q, k, cache = cuda(B, 8, W, 128), cuda(B, 2, W, 128), cuda(cache_batch, 2, 96, 128)
        row, lists = cuda(B, dtype=torch.int32), cuda(B, 1, dtype=torch.int32)
        index = row if cache_batch > B else None
        rope_op(q, k, k, table, cache, cache, row, row, None, index, True)
        rope_op(q, k, k, table, cache, cache, row, row, row, index, False)
        attention_op(q, None, None, cache, cache, row, row, row, None, index, None, None,
            64, 1.0, 1, False)
        attention_op(q, k, k, cache, cache, row, row, row, row, index, row, lists,
            64, 1.0, None, True)
    assert len(launched) == 20 + 2 * 5, launched
    for parts, rows in ((1, 1), (72, 33)):
        partials = cuda(parts, row_state.PLANES, rows, dtype=torch.float32)
        combine_op(partials, None, [], "probability")
        combine_op(partials, cuda(rows, dtype=torch.bool), [0, 1], "margin")
    assert len(launched) == 20 + 2 * 5 + 4, launched
    for B, K, L in ((1, 1, 1), (3, 20, 300)):
        canvas = torch.empty_strided((B, L), (L + 4, 1), device="cuda", dtype=torch.int64)
        token = cuda(B, K, dtype=torch.int64)
        field, flag = cuda(B, dtype=torch.int32), cuda(B, dtype=torch.bool)
        position, scored = cuda(B, K, dtype=torch.int32), cuda(B, K, dtype=torch.float32)
        record = cuda(B, K, dtype=torch.bool), scored, cuda(B, 10, dtype=torch.int32)
        state = [field] * 9 + [flag] * 3 + [position, *record]
        tensors = canvas, token, scored, *state, flag, field
        for variant in (
            (None, "dsb", "dsb", 16, 0, "threshold", 0.9, 0, "select", 126336, [126081], True),
            (64, "dsb", "dsb", 16, 1, "frechet", 0.25, 0, "first", 151666, [1, 151643], True),
            (1, "dsb", "none", 0, 0, "factor", 1.0, 0, "select", 1, [], False),
            (None, "naive", "dual", 0, 1, "quota", 0.0, 1, "select", 5, [2], False),
        ):
            unmask_op(*tensors, None, L // 3, 16, *variant, 1)
            unmask_op(*tensors, field, L // 3, 16, *variant, 4)
        six = field, field, field, position, field, field, field
        for kind, shift in ((0, 1), (1, 0), (2, 1)):
            found = place_op(canvas, *six, kind, 0, [1, L, K], shift, L // 3)
            assert [tuple(x.shape) for x in found] == [(6, 1), (1,), (1, L), (K,), (K,), (K,)]
        place_op(canvas, *six, 0, 0, [B, 1, 1], 0, 0)
    each = ["_unmask_kernel"] * 8 + ["_place_rows_kernel"] * 4
    assert launched[34:] == each * 2, launched
    launched.clear()
    for rows, E, F, dtype in ((1, 1, 1, None), (1, 128, 192, None), (33, 100, 130, None),
            (300, 128, 1, torch.float32)):
        def made(*shape, dtype=dtype or torch.bfloat16):
            return cuda(*shape, dtype=dtype)
        x, gain = made(rows, E), made(F)
        linear_op(x, made(F, E), None)
        linear_op(x, made(F, E), gain)
        assert linear_op(x, made(2 * F, E), made(2 * F), gated=True).shape == (rows, F)
        assert norm_op(x, made(F, E), made(rows, F), gain, 1e-5).shape == (rows, F)
    each = ["_window_linear_kernel"] * 3 + ["_split_linear_kernel", "_add_norm_kernel"]
    assert launched == each * 4, launched
"""


def test_arguments_of_a_cuda_launch_bind_and_compile() -> None:
    """The interpreter binds arguments its own way: none is a constant because it is 1 or None."""
    without_interpreter(LAUNCH_FOR_CUDA)

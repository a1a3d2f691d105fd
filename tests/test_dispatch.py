"""The dispatch rule, registration and the shared argument checks."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsb_kernels import dispatch, tuning
from dsb_kernels.dispatch import check_choice, check_tensor, use_triton

ROOT = Path(__file__).parent.parent
CPU = torch.zeros(2)
pytestmark = pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed")


def on(device: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=device)


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        (None, "cpu", False), (None, "cuda", True),
        ("eager", "cpu", False), ("eager", "cuda", False), ("triton", "cuda", True),
    ],
)  # fmt: skip
def test_rule(monkeypatch, backend, device, expected):
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    if backend is not None:
        monkeypatch.setenv("DSB_BACKEND", backend)
    assert use_triton(on(device), None, on(device)) is expected


def test_mixed_devices_take_the_definition(monkeypatch):
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    assert not use_triton(on("cuda"), on("cpu"))


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("DSB_BACKEND", "triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    assert use_triton(CPU)
    assert not use_triton(on("cpu"))  # tracing sees the definition
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"^DSB_BACKEND=triton on CPU.*TRITON_INTERPRET=1$"):
        use_triton(CPU)


@pytest.mark.parametrize("value", ["cuda", "Triton", "1"])
def test_invalid_backend_is_named(monkeypatch, value):
    monkeypatch.setenv("DSB_BACKEND", value)
    with pytest.raises(ValueError, match=f"DSB_BACKEND='{value}': accepted are 'eager', 'triton'"):
        use_triton(CPU)


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it does not exist
import torch
import dsb_kernels.confidence, dsb_kernels.lm_head_confidence, dsb_kernels.rope_kv
import dsb_kernels.linear_add_norm, dsb_kernels.unmask, dsb_kernels.window_attention
import dsb_kernels.window_linear
from dsb_kernels.confidence import token_confidence
from dsb_kernels.lm_head_confidence import lm_head_confidence
x = torch.tensor([[0.0, 3.0, 1.0]])
token, confidence = token_confidence(x, banned=(1,))
assert token.tolist() == [2] and abs(confidence.item() - x.softmax(-1)[0, 2].item()) < 1e-6
assert lm_head_confidence(torch.eye(3), torch.eye(3))[0].tolist() == [0, 1, 2]
compiled = torch.compile(lambda x: token_confidence(x), backend="aot_eager", fullgraph=True)
assert compiled(x)[0].tolist() == [1]
"""


@pytest.mark.slow
def test_definitions_work_without_triton():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_launches_set_fp_fusion_explicitly():
    with torch._library.triton.set_wrap_triton_enabled(False):  # as in an eager call
        options = dispatch.launch_options(4, 2)
    assert options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    assert "enable_fp_fusion" not in dispatch.launch_options(4, 2)  # as while tracing


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Triton takes the current one."""
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
    kernel = dispatch.triton.runtime.jit.JITFunction(fn)
    run = lambda *a, grid, warmup, **o: launched.append((where[-1].index, grid, len(a), o))  # noqa: E731
    monkeypatch.setattr(kernel, "run", run)
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    with torch._library.triton.set_wrap_triton_enabled(False):
        dispatch.wrap_triton(kernel)[(3,)](x, 2, num_warps=4)
    assert launched == [(1, (3,), 2, {"num_warps": 4})] and where[-1] is None
    traced = dispatch.wrap_triton(kernel)
    assert type(traced).__name__ == "TraceableTritonKernelWrapper"


TRACE_FOR_CUDA = """
import contextlib, torch, triton
from functorch.compile import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from dsb_kernels import confidence, lm_head_confidence

class Driver:  # what tracing asks of a GPU's driver
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0

triton.runtime.driver.set_active(Driver())
with FakeTensorMode():
    x = torch.empty(4, 64, device="cuda")
graphs = []

class Traced(Exception):
    pass

def keep(graph, _):
    graphs.append(graph)
    def stop(*args):  # running the graph needs the GPU
        raise Traced
    return make_boxed_func(stop)

ops = torch.ops.dsb
for call in (
    lambda x: ops.token_confidence(x, None, [3], 0.0, None, None, "probability"),
    lambda x: ops.lm_head_confidence(x, x, None, None, [], 0.0, None, None, "margin"),
):
    with contextlib.suppress(Traced):
        aot_function(call, fw_compiler=keep)(x)
assert len(graphs) == 2
for graph in graphs:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper" in name for name in names) == 2, names
"""


LAUNCH_FOR_CUDA = """
import torch, triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor
from dsb_kernels import confidence, linear_add_norm, lm_head_confidence, place_rows, rope_kv
from dsb_kernels import row_state, unmask, unmask_kernel, window_attention
from dsb_kernels import window_attention_kernel, window_linear

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

triton.runtime.driver.set_active(Driver())
launched = []

class Warmup:  # everything that a launch does but the launch
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **options):
            assert all(0 < n < 2**31 for n in grid[:1]) and all(n < 65536 for n in grid[1:])
            args = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
            compiled = self.kernel.warmup(*args, grid=grid, **options)
            assert compiled.metadata.enable_fp_fusion
            launched.append(self.kernel.__name__)
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
        window_linear._window_linear_op, linear_add_norm._linear_add_norm_op))
with torch._library.triton.set_wrap_triton_enabled(False), FakeTensorMode():
    def cuda(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, device="cuda", dtype=dtype)
    for rows, V in ((1, 1), (1, 126464), (300, 1001)):
        eligible, seed = cuda(rows, dtype=torch.bool), cuda(dtype=torch.int64)
        ids, logits = cuda(rows, dtype=torch.int64), cuda(rows, V)
        token_op(logits, None, [], 0.0, None, None, "probability")
        token_op(logits, eligible, [0][: V - 1], 0.7, seed, ids, "margin")
    for rows, V in ((1, 16), (128, 1001)):
        hidden, weight, bias = cuda(rows, 128), cuda(V, 128), cuda(V)
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
    for rows, E, F in ((1, 1, 1), (1, 128, 192), (33, 100, 130), (300, 128, 1)):
        x, gain = cuda(rows, E), cuda(F)
        linear_op(x, cuda(F, E), None, False)
        linear_op(x, cuda(F, E), gain, False)
        assert linear_op(x, cuda(2 * F, E), cuda(2 * F), True).shape == (rows, F)
        assert norm_op(x, cuda(F, E), cuda(rows, F), gain, 1e-5).shape == (rows, F)
    each = ["_window_linear_kernel"] * 3 + ["_split_linear_kernel", "_add_norm_kernel"]
    assert launched == each * 4, launched
"""


def without_interpreter(code: str) -> subprocess.CompletedProcess:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_cuda_calls_are_traced_to_kernel_launches():
    """What torch.compile sees of a CUDA call are the kernels."""
    result = without_interpreter(TRACE_FOR_CUDA)
    assert result.returncode == 0, result.stderr
    assert "Encountered an exception" not in result.stderr


@pytest.mark.slow
def test_arguments_of_a_cuda_launch_bind_and_compile():
    """The interpreter binds arguments its own way: none is a constant because it is 1 or None."""
    result = without_interpreter(LAUNCH_FOR_CUDA)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": torch.float16, "shape": (2, 3)}, TypeError, "x has dtype float32: accepted are"),
        ({"shape": (3, 3)}, ValueError, r"x has shape \(2, 3\): accepted is \(3, 3\)"),
        ({"shape": ("...", "A", "B", "C")}, ValueError, r"accepted is \(..., A, B, C\)"),
        ({"shape": (2, 3), "device": torch.device("meta")}, ValueError, "x is on cpu: accepted is"),
    ],
)
def test_check_tensor_names_argument_value_and_what_is_accepted(options, error, words):
    with pytest.raises(error, match=f"op: .*{words}"):
        check_tensor("op", "x", torch.zeros(2, 3), **{"dtype": torch.float32, **options})


def test_check_tensor_strides():
    x = torch.zeros(4, 3).T
    for rule in ("contiguous", "unit_stride"):
        with pytest.raises(ValueError, match="op: x has stride"):
            check_tensor("op", "x", x, dtype=torch.float32, shape=(3, 4), **{rule: True})
    check_tensor("op", "x", x, dtype=(torch.float16, torch.float32), shape=("...", 4))


def test_check_choice():
    with pytest.raises(ValueError, match="op: rule='x': accepted are 'a', 'b'"):
        check_choice("op", "rule", "x", ("a", "b"))


def test_configuration_of_a_class_and_an_architecture(monkeypatch):
    small, large, own = (tuning.Config({"BLOCK": n}, num_warps=4) for n in (1, 2, 3))
    monkeypatch.setitem(tuning.CONFIGS, ("op", "any"), {8: small, 64: large})
    monkeypatch.setitem(tuning.CONFIGS, ("op", "sm_100"), {64: own})
    assert tuning.configuration("op", 8, "sm_90") is small
    assert tuning.configuration("op", 9, "sm_90") is large
    assert tuning.configuration("op", 1, "sm_100") is own
    with pytest.raises(ValueError, match="op: size 65: accepted is at most 64"):
        tuning.configuration("op", 65, "sm_90")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_89"),
    ],
)  # fmt: skip
def test_every_chip_takes_configurations_that_fit_it(monkeypatch, capability, architecture):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    architecture_of = tuning.architecture_of.__wrapped__  # which remembers what devices are
    assert architecture_of(torch.device("cuda", 0)) == architecture
    assert architecture in tuning.ARCHITECTURES
    assert architecture_of(torch.device("cpu")) == "sm_90"


def test_float32_has_configurations_of_its_own():
    """Its elements are twice as large, and a block's shared memory is not."""
    assert tuning.of_dtype("op", torch.bfloat16) == "op"
    wide = [op for op, _ in tuning.CONFIGS if op.endswith(" float32")]
    assert tuning.of_dtype("linear_add_norm", torch.float32) in wide
    narrow = {
        op for op, _ in tuning.CONFIGS if "BLOCK_K" in tuning.CONFIGS[op, "any"][1 << 62].blocks
    }
    assert narrow - set(wide) == {op.removesuffix(" float32") for op in wide} - {"window_attention"}

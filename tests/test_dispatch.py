"""The dispatch rule, registration and the shared argument checks."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsb_kernels import _configs as tuning
from dsb_kernels import _op as dispatch
from dsb_kernels._check import check_choice, check_tensor
from dsb_kernels._op import op, use_triton

ROOT = Path(__file__).parent.parent
CPU = torch.zeros(2)
pytestmark = pytest.mark.skipif(dispatch.triton is None, reason="Triton is not installed")


def on(device: str) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, device=device)


@pytest.mark.parametrize(
    ("backend", "devices", "expected"),
    [
        ("", "cpu cpu", False), ("", "cuda cuda", True), ("", "cuda cpu", False),
        ("eager", "cpu cpu", False), ("eager", "cuda cuda", False), ("triton", "cuda cuda", True),
    ],
)  # fmt: skip
def test_rule(monkeypatch, backend, devices, expected):
    monkeypatch.setenv("DSB_BACKEND", backend)
    first, second = map(on, devices.split())
    assert use_triton(first, None, second) is expected


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


# --- op: a public function out of a definition ------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """An object that travels through torch as a string."""

    values: tuple[float, ...]

    def encode(self) -> str:
        return ",".join(map(str, self.values))

    @staticmethod
    def decode(code: str) -> Weights:
        return Weights(tuple(map(float, code.split(","))))


def weigh_reference(
    x: torch.Tensor,
    weights: Weights,
    *,
    offset: torch.Tensor | None = None,
    skipped: Sequence[int] = (),
    scale: float = 2.0,
) -> torch.Tensor:
    """A docstring that becomes the public one."""
    factors = [0.0 if i in skipped else scale * w for i, w in enumerate(weights.values)]
    y = x * x.new_tensor(factors)
    return y if offset is None else y + offset


def fill_reference(x: torch.Tensor, value: float = 1.0) -> None:
    x.fill_(value)


def check_weigh(a: Any) -> None:
    check_tensor("weigh", "x", a.x, dtype=torch.float32, shape=("N", len(a.weights.values)))


launched: list[Any] = []


def launch_weigh(a: Any) -> torch.Tensor:
    launched.append(a)
    return weigh_reference(*a[:2], **{n: getattr(a, n) for n in a._fields[2:]})


weigh = op(weigh_reference, launch=launch_weigh, check=check_weigh)
fill = op(
    fill_reference,
    launch=lambda a: None,
    check=lambda a: None,
    finish=lambda a, result: len(a.x),
    mutates_args=("x",),
)
X, WEIGHTS = torch.ones(2, 3), Weights((1.0, 2.0, 3.0))


def test_an_op_has_the_schema_and_the_docstring_of_its_definition():
    schema = "dsb::weigh(Tensor x, str weights, Tensor? offset, SymInt[] skipped, float scale)"
    assert str(torch.ops.dsb.weigh.default._schema) == f"{schema} -> Tensor"
    schema = str(torch.ops.dsb.fill.default._schema)
    assert schema == "dsb::fill(Tensor(a0!) x, float value=1.) -> ()"
    assert weigh.__doc__ == weigh_reference.__doc__ and weigh.__name__ == "weigh"
    assert inspect.signature(weigh) == inspect.signature(weigh_reference)


def test_an_op_runs_its_definition_where_no_kernel_runs(monkeypatch):
    """Looked up when it is called, so that a test may count it."""
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    expected = torch.tensor([2.0, 0.0, 6.0]).expand(2, 3)
    assert torch.equal(weigh(X, WEIGHTS, skipped=(1,)), expected)
    monkeypatch.setattr(weigh, "definition", lambda *args, **kwargs: "the definition")
    assert weigh(X, WEIGHTS) == "the definition"
    x = torch.zeros(2)
    assert fill(x, value=3.0) == 2 and x.tolist() == [3.0, 3.0]  # finish makes the result


def test_an_op_launches_with_its_arguments_bound(monkeypatch):
    monkeypatch.setattr(dispatch, "use_triton", lambda *tensors: True)
    launched.clear()
    weigh(X, weights=WEIGHTS, offset=X)
    (a,) = launched
    assert a.weights == WEIGHTS and a.weights is not WEIGHTS  # it came as a string
    assert a.offset is X and tuple(a.skipped) == () and a.scale == 2.0


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((X,), {}, "missing 1 required positional argument: 'weights'"),
        ((X, WEIGHTS, X), {}, "takes 2 positional arguments and the rest by name; 3 were given"),
        ((X, WEIGHTS), {"shift": 1}, "unexpected keyword argument 'shift'"),
        ((X, WEIGHTS), {"x": X}, "multiple values for argument 'x'"),
        ((X.double(), WEIGHTS), {}, "x has dtype float64"),
    ],
)
def test_an_op_names_what_is_wrong_with_its_arguments(args, kwargs, words):
    with pytest.raises(TypeError, match=f"^weigh.*{words}"):
        weigh(*args, **kwargs)


def test_a_definition_with_a_default_before_none_is_refused():
    def bad_reference(x: torch.Tensor, y: int = 0, *, z: int) -> torch.Tensor:
        return x

    with pytest.raises(TypeError, match="bad: a parameter without a default follows one with a"):
        op(bad_reference, launch=launch_weigh, check=check_weigh)


def test_an_op_passes_torchs_checks_and_is_traced_whole():
    torch.library.opcheck(torch.ops.dsb.weigh, (X, WEIGHTS.encode(), X, [1], 2.0))
    torch.library.opcheck(torch.ops.dsb.fill, (X.clone(),))

    def both(x: torch.Tensor) -> torch.Tensor:
        y = weigh(x, WEIGHTS, skipped=(0,))
        fill(y[0], 7.0)
        return y

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X), both(X))


COMPILED = """
import torch
from dsb_kernels.token_confidence import token_confidence
print(torch.compile(token_confidence, fullgraph=True)(torch.tensor([[0.0, 3.0, 1.0]]))[0].item())
"""


@pytest.mark.slow
def test_what_torch_compile_kept_on_disk_does_not_outlive_the_code_of_an_op(tmp_path):
    shutil.copytree(ROOT / "dsb_kernels", tmp_path / "dsb_kernels")
    environment = {"PYTHONPATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    edited = tmp_path / "dsb_kernels" / "token_confidence.py"
    chosen = []
    for line in ("return token, c", "return token + 1, c"):
        edited.write_text(edited.read_text().replace("return token, c", line))
        run = subprocess.run(
            [sys.executable, "-c", COMPILED], cwd=tmp_path, env=os.environ | environment,
            capture_output=True, text=True,
        )  # fmt: skip
        chosen.append(run.stdout.strip() or run.stderr)
    assert chosen == ["1", "2"]


# --- without Triton; launches ------------------------------------------------------------------

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it fails, as where it does not exist
import torch
import dsb_kernels.token_confidence, dsb_kernels.lm_head, dsb_kernels.rope_kv
import dsb_kernels.linear, dsb_kernels.commit, dsb_kernels.attention, dsb_kernels.place
from dsb_kernels.token_confidence import token_confidence
from dsb_kernels.lm_head import lm_head_confidence
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


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": torch.float16, "shape": (2, 3)}, TypeError, "x has dtype float32: accepted are"),
        ({"shape": (3, 3)}, ValueError, r"x has shape \(2, 3\): accepted is \(3, 3\)"),
        ({"shape": ("...", "A", "B", "C")}, ValueError, r"accepted is \(..., A, B, C\)"),
        ({"shape": (2, 3), "device": torch.device("meta")}, ValueError, "x is on cpu: accepted is"),
        ({"shape": (2, 3), "contiguous": True}, ValueError, "x has stride"),
        ({"shape": (2, 3), "unit_stride": True}, ValueError, "x has stride"),
    ],
)
def test_check_tensor_names_argument_value_and_what_is_accepted(options, error, words):
    x = torch.zeros(3, 2).T
    with pytest.raises(error, match=f"op: .*{words}"):
        check_tensor("op", "x", x, **{"dtype": torch.float32, **options})
    check_tensor("op", "x", x, dtype=(torch.float16, torch.float32), shape=("...", 3))


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
    wide = {op.removesuffix(" float32") for op, _ in tuning.CONFIGS if op.endswith(" float32")}
    assert tuning.of_dtype("linear_add_norm", torch.float32) == "linear_add_norm float32"
    tiled = {op for op, _ in tuning.CONFIGS if not op.endswith(" float32")
             and "BLOCK_K" in tuning.CONFIGS[op, "any"][tuning.INFINITY].blocks}  # fmt: skip
    assert tiled == wide - {"window_attention"}

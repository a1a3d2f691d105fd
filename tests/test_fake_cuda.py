"""Every kind of step on a CUDA made of metadata (`tests/fake_cuda.py`): what it launches, and that
nothing in it touches the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton")

import dsb_runtime as dsb
from dsb_kernels import score
from dsb_kernels.linear import MAX_TOKENS
from dsb_kernels.rows import Column, StepKind
from dsb_runtime.engine import layers, sampling
from dsb_runtime.engine.graphs import HostCopy, refresh_class
from dsb_runtime.engine.packing import packed
from dsb_runtime.engine.session import Session
from dsb_runtime.engine.step import StepShape
from tests import golden
from tests.fake_cuda import FakeCuda, Launcher, cuda, fake_cuda, on_gpu

ROWS, PROMPT, SHAPE = 3, 12, {"gen_length": 24, "block_length": 8}
LENGTH = PROMPT + SHAPE["gen_length"]
# What follows attention in a layer, with the q, k and v of the next one.
ADD_NORM = ["_split_linear_kernel", "_add_norm_kernel"]
FEW = [*ADD_NORM, "_window_linear_kernel", *ADD_NORM, "_window_linear_kernel"]
AFTER_CUBLAS = ["addmm_", "_add_norm_kernel", "linear"]
MANY = [*AFTER_CUBLAS, "_silu_mul_kernel", *AFTER_CUBLAS]


@pytest.fixture
def gpu(monkeypatch) -> Iterator[FakeCuda]:
    """The test runs as with a GPU."""
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    for family in golden.FAMILIES:
        golden.model(family)  # read before anything is fake
    # The type of a fake Parameter is FakeTensor, so that no head would be plain.
    monkeypatch.setattr(sampling, "is_plain_linear", lambda module: True)
    with fake_cuda() as fake:
        yield fake


def session_of(
    gpu: FakeCuda, family: str, *, rows: int = ROWS, padded: bool = False, **settings: Any
) -> Session:
    engine = dsb.Engine(on_gpu(golden.model(family)), capture=lambda run: run)
    config = dsb.DecodingConfig(**SHAPE, **settings)
    gpu.answers = [SHAPE["block_length"], padded]  # what the host reads: candidates and padding
    leftpad = cuda(rows, dtype=torch.int32)
    session = engine.loop.session(config, cuda(rows, LENGTH), leftpad)
    assert not gpu.answers and session.step.padded is padded
    return session


def run(gpu: FakeCuda, session: Session, kind: str, rows: int, width: int) -> None:
    """A step, and what it must have launched."""
    with gpu.step():
        session.step(StepShape(StepKind[kind.upper()], rows, width, SHAPE["block_length"]))
    depth = len(session.step.backbone.layers)
    assert gpu.launched["_unmask_kernel"] == 1
    assert gpu.launched["_rope_write_kv_kernel"] == depth * (session.step.cache is not None)
    if kind != "refresh":
        assert gpu.launched["_attention_kernel"] == depth


def test_definitions_are_not_captured(gpu, monkeypatch):
    """They read values on the host."""
    model = on_gpu(golden.model("llada"))
    assert dsb.Engine(model).loop.capture is not None
    monkeypatch.setenv("DSB_BACKEND", "eager")
    assert dsb.Engine(model).loop.capture is None
    with pytest.raises(ValueError, match="graphs=True: no kernels run here; expected False"):
        dsb.Engine(model, graphs=True)


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
    # Twice in a layer: for qkv and the MLP's first half, or for what adds to the residual.
    linears = dict.fromkeys(FEW, 2 * len(session.step.backbone.layers) * packed)
    for rows in (ROWS, 1):  # the whole batch, and some of it
        for kind, width in (("refresh", LENGTH), ("window", 16), ("response", 25)):
            run(gpu, session, kind, rows, width)
            assert gpu.launched["_lm_head_kernel"] == gpu.launched["combine_kernel"] == 1
            assert {kernel: gpu.launched[kernel] for kernel in linears} == linears


def test_a_captured_refresh_takes_the_same_kernels_for_every_length(gpu, monkeypatch):
    """Aligned to a class of lengths (112) or not."""
    monkeypatch.setattr(layers, "is_plain", lambda module: True)
    engine = dsb.Engine(on_gpu(golden.model("llada")), capture=lambda run: run)
    config, launched = dsb.DecodingConfig(**SHAPE), []
    for length in (100, 101, 112):
        gpu.answers = [SHAPE["block_length"]]
        leftpad = cuda(1, dtype=torch.int32)
        session = engine.loop.session(config, cuda(1, length), leftpad, roomy=True)
        assert session.state.canvas.shape == (1, 112) and not gpu.answers
        run(gpu, session, "refresh", 1, refresh_class(length, 112))
        launched.append(gpu.launched)
    assert launched[0] == launched[1] == launched[2] and len(engine.loop.sessions) == 1
    assert launched[0]["_attention_kernel"] == len(session.step.backbone.layers)


@pytest.mark.parametrize(("width", "expected"), [(32, FEW), (33, MANY)])
def test_torchs_products_serve_more_tokens_than_our_kernels_do(gpu, monkeypatch, width, expected):
    """A layer is eight kernels, or nine for many tokens; the splits of attention are one more."""
    monkeypatch.setattr(layers, "is_plain", lambda module: True)
    run(gpu, session_of(gpu, "llada", rows=4), "window", 4, width)
    assert (4 * width > MAX_TOKENS) == (expected is MANY)
    calls = [name for name in gpu.calls if "kernel" in name or name in MANY]
    first, second, _ = (i for i, name in enumerate(calls) if name == "_rope_write_kv_kernel")
    assert calls[first + 1 : second] == ["_attention_kernel", "_combine_kernel", *expected]


def test_no_stream_sees_packed_weights_before_they_are_there(gpu, monkeypatch):
    """Nor is memory given back that another stream may read."""
    weights = [torch.nn.Parameter(cuda(n, 4, dtype=torch.float32)) for n in (3, 2)]
    old, waits = StorageWeakRef(weights[0].untyped_storage()), []

    def wait(what: str) -> None:
        places = {w.data.untyped_storage()._cdata for w in weights}
        waits.append((what, len(places), old.expired()))

    stream = SimpleNamespace(synchronize=lambda: wait("stream"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: wait("device"))
    packed(weights)
    assert waits == [("stream", 2, False), ("device", 1, False)] and old.expired()


SETTINGS = (
    {"cache": "none"}, {"cache": "dual", "schedule": "naive", "steps": 6}, {"temperature": 0.7},
    {"confidence": "margin"}, {"confidence": "entropy", "temperature": 0.7, "steps": 6},
    {"factor": 1.0, "stop_at_eos": True}, {"frechet": 0.25, "max_block_length": 8},
    {"context_masks": 4}, {"stop_at_eos": True, "eos_bound": True, "cfg_scale": 1.5},
)  # fmt: skip
NUCLEUS = (
    {"top_p": 0.9, "confidence": "entropy", "steps": 6},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5},
)


@pytest.mark.parametrize(
    ("family", "settings"),
    [(f, s) for f in golden.FAMILIES for s in SETTINGS] + [("dream", s) for s in NUCLEUS],
)
def test_settings(gpu, family, settings):
    session = session_of(gpu, family, **settings)
    run(gpu, session, "refresh", ROWS, LENGTH)
    if session.step.cache is not None:
        run(gpu, session, "window", 1, 16)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_call_from_prompt_to_output(gpu, monkeypatch, family):
    """Checks, state, captures by class of shape, flags, output. What the flags say is a script."""
    script = [StepKind.REFRESH, StepKind.WINDOW, StepKind.WINDOW, StepKind.NOTHING]
    captured: list[Counter[str]] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with gpu.step():
            step()
        captured.append(gpu.launched)
        return step

    def wait(self: HostCopy) -> Tensor:
        row = [1] * len(Column)
        row[Column.NEXT_KIND], row[Column.NUM_CANDIDATES] = script.pop(0), 8
        row[Column.START], row[Column.END], row[Column.FAILED] = 64, 72, 0
        row[Column.RESPONSE_END] = 64 + SHAPE["gen_length"]
        gpu.answers = row * ROWS
        return self.values

    monkeypatch.setattr(HostCopy, "wait", wait)
    monkeypatch.setattr(layers, "is_plain", lambda module: True)  # the steps of others stay direct
    engine = dsb.Engine(on_gpu(golden.model(family)), capture=capture)
    prompts = cuda(ROWS, PROMPT)
    # The ids' range; the attention mask is one, of left padding and no row that is all padding; no
    # mask id in a prompt; candidates.
    gpu.answers = [0, 0, True, False, False, False, SHAPE["block_length"]]
    out = engine.generate(prompts, attention_mask=prompts, temperature=0.5, **SHAPE)
    assert out.nfe == 3 and out.row_nfe == [3] * ROWS and not script
    assert out.sequences.is_cuda and out.sequences.shape == (ROWS, LENGTH)
    assert gpu.devices == [prompts.device]
    depth = len(engine.loop.backbone.layers)
    assert len(captured) == 2 and captured[1]["_attention_kernel"] == depth


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_patched_models_own_forward(gpu, kind):
    with unset_fake_temporarily():
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        config = getattr(transformers, f"{kind}Config")(**sizes, **heads)
        plain = getattr(transformers, f"{kind}ForCausalLM")(config)
        plain = dsb.patch(plain, family="llada", mask_id=511)
    model, ids = on_gpu(plain), cuda(2, 16)
    with gpu.step():
        model(ids, position_ids=ids[:1], use_cache=False)


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.arange(4),
        lambda x: x.cpu(),
        lambda x: x[torch.tensor([1])],
        lambda x: Launcher(score.combine_kernel)[(3,)](
            x.double(), None, None, None, x, 3, 7, 0, CONFIDENCE="probability", PARTS=8
        ),
    ],
    ids=["read", "a CPU tensor", "one made there", "a copy", "an index", "another type"],
)
def test_what_a_captured_step_cannot_hold_is_refused(gpu, refused):
    x = cuda(6, dtype=torch.float32)
    refusals = AssertionError, RuntimeError, TypeError, DataDependentOutputException
    with gpu.step(), pytest.raises(refusals):
        refused(x)

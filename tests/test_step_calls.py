"""What a step asks of the device: no host reads and few calls.

Counted from the operators that a dispatch mode sees. A device kernel is one matmul, one custom op
(linear_add_norm is two, and attention, with split-KV, one more) or one run of elementwise operators
that a compiler fuses; on a GPU RMSNorm is one operator.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dsb_runtime as dsb
from dsb_kernels.rows import StepKind
from dsb_runtime.engine.step import StepShape
from dsb_runtime.families import LLADA, DiffusionInfo
from tests.mutations import kernels
from tests.recorded import Call, Recording, is_view

SHAPES = {
    "window": StepShape(StepKind.WINDOW, 1, 24, 8),
    "refresh": StepShape(StepKind.REFRESH, 1, 40, 8),
    "response": StepShape(StepKind.RESPONSE, 1, 25, 8),
}


def model_of(layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="dsb",
    )  # fmt: skip
    config.is_causal = False
    model = LlamaForCausalLM(config).eval()
    model.dsb = DiffusionInfo(LLADA, 127, (1,))
    return model


def record(model: PreTrainedModel, kind: str, rows: int = 2) -> Recording:
    """A step of one row out of `rows`, as it is recorded."""
    engine = dsb.Engine(model, graphs=False)
    config = dsb.DecodingConfig(
        gen_length=24, block_length=8, refresh_policy="response", stop_at_eos=True
    )
    ids = torch.tensor([*range(2, 18), *[127] * 24]).repeat(rows, 1)
    with torch.no_grad():
        canvas = torch.cat([ids, torch.full((rows, 24), model.dsb.mask_id)], 1)
        session = engine.loop.session(config, canvas, torch.tensor([3] + [0] * (rows - 1)).int())
        with Recording() as recording:
            session.step(SHAPES[kind])
    return recording


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_no_step_reads_on_the_host(kind, layers):
    """Nor does a step of any rule or sampling, nor do shapes depend on data: see `Recorder`, by
    which test_engine.py captures."""
    recording = record(model_of(layers), kind)
    assert len(recording.calls) > 20 * layers and recording.host_reads() == []


def test_host_reads_are_seen():
    with Recording() as recording:
        x = torch.arange(4)
        x.sum().item(), x.nonzero(), bool(x.any())
    assert len(recording.host_reads()) == 3


def cache_writes(recording: Recording) -> list[int]:
    """Where each layer of a recorded step writes the cache."""
    return [i for i, name in enumerate(recording.names) if name == "dsb.rope_write_kv"]


def device_kernels(calls: list[Call]) -> list[str]:
    """Those of a list of operators, by name."""
    text = " ".join(f._schema.name.split("::")[1] for f, *_ in calls if not is_view(f)) + " "
    for operators, names in KERNELS.items():
        text = text.replace(f"{operators} ", f"{names} ")
    return text.split()


ADD_NORM = ["split_linear", "residual+rms_norm"]
KERNELS = {"pow mean add_ rsqrt mul mul": "rms_norm", "linear_add_norm": " ".join(ADD_NORM)}
AFTER_ATTENTION = [*ADD_NORM, "window_linear", *ADD_NORM]  # the MLP's first half with SiLU * mul


def test_a_window_steps_layer_is_eight_kernels_and_at_most_25_calls():
    with kernels():
        recording = record(model_of(4), "window", rows=1)
    _, second, third, _ = cache_writes(recording)
    calls = recording.calls[second:third]
    assert len(calls) <= 25, calls
    assert device_kernels(calls) == [
        "rope_write_kv", "window_attention", *AFTER_ATTENTION, "window_linear"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_attention_is_told_of_the_weight_that_follows_it_but_at_a_refresh(kind):
    model = model_of(2)
    with kernels():
        recording = record(model, kind, rows=1)
    given = [
        {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for func, args, *_ in recording.calls
        if func._schema.name == "dsb::window_attention"
    ]
    weights = [layer.self_attn.o_proj.weight.data_ptr() for layer in model.model.layers]
    told = [weight in some for weight, some in zip(weights, given, strict=True)]
    assert told == [kind != "refresh"] * 2


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_step_is_few_kernels_outside_its_layers(kind, rows):
    """The whole of a step's bookkeeping is two launches, whatever its kind and whichever of the
    batch's rows take part; the last layer takes the scored rows out of q and the residual."""
    with kernels():
        recording = record(model_of(4), kind, rows=rows)
    first, *_, last = cache_writes(recording)
    before = device_kernels(recording.calls[:first])
    assert before == ["place_rows", "embedding", "rms_norm", "window_linear"]
    assert device_kernels(recording.calls[last:]) == [
        "rope_write_kv", "index_select", "index_select", "window_attention", *AFTER_ATTENTION,
        "lm_head_confidence", "unmask_and_slide",
    ]  # fmt: skip

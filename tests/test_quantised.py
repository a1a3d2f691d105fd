"""Quantised layers: tokens are those of a loop over the model's own forward."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GPTQConfig

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import write_adapted, write_changed
from tests.test_wrapped import PROMPT, decode_alone, whole_canvas


class PackedLinear(nn.Module):
    """A linear layer in GPTQ's layout (4 bits, one group): eight weights in an int32, and no
    `weight`, as in the classes of gptqmodel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scales = nn.Buffer(weight.abs().amax(1) / 7)
        number = (weight / self.scales[:, None]).round().long().T + 8  # (in, out), 1 to 15
        parts = number.view(-1, 8, self.out_features) << (4 * torch.arange(8))[:, None]
        self.qweight = nn.Buffer(parts.sum(1).int())  # the sum wraps into the sign, as packing does
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        number = (self.qweight[:, None] >> (4 * torch.arange(8))[:, None]) & 15
        weight = (number.flatten(0, 1) - 8).float() * self.scales
        return nn.functional.linear(x, weight.T, self.bias)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_layers_without_a_weight_are_called(family: str) -> None:
    model = copy.deepcopy(golden.model(family))
    plain = decode_alone(model)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, PackedLinear(module))
    assert decode_alone(model) == whole_canvas(model, PROMPT, 4, 8) != plain
    cached = dsb.generate(model, PROMPT, gen_length=8, block_length=4)
    assert not (cached.sequences == model.dsb.mask_id).any()


def test_nf4(tmp_path: Path) -> None:
    """Blocks of 64 weights divide every width here, which bitsandbytes needs on a CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    write_adapted(tmp_path, "a2d-llama", hidden_size=128, intermediate_size=192)
    plain = dsb.load_model(tmp_path, dtype="float32", device="cpu")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = dsb.load_model(tmp_path, dtype="float32", quantization_config=config)
    assert isinstance(model.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    expected = whole_canvas(model, PROMPT, 4, 8)
    assert decode_alone(model) == expected != decode_alone(plain)


def test_what_gptq_needs_is_said_in_one_line(tmp_path: Path) -> None:
    with golden.refusal("config.json has quantization_config", "dsb_runtime.patch"):
        dsb.load_model(write_changed(tmp_path, quantization_config={"quant_method": "gptq"}))
    try:
        import optimum  # noqa: F401
    except ImportError:
        with golden.refusal("requires optimum", kind=ImportError):
            dsb.load_model(golden.DATA / "llada", quantization_config=GPTQConfig(bits=4))

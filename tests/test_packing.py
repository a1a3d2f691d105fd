"""Packed matmuls: one storage for what was several weights, and the same model around it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_runtime.engine.layers import ModuleLayer, PackedLayer, layers_of
from dsb_runtime.engine.packing import neighbours, packed
from tests import golden
from tests.golden import prompts
from tests.random_models import KINDS, random_model

SHAPE = {"gen_length": 24, "block_length": 8}


def storages(model: PreTrainedModel) -> int:
    """Bytes of all distinct storages behind a model's parameters."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_twice_and_parameters_keep_their_identity(kind):
    model = random_model(kind)
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    size, ids = storages(model), torch.arange(2, 14)[None]
    logits = model(ids).logits
    layers = layers_of(model.model)
    assert all(isinstance(layer, PackedLayer) for layer in layers)
    for name, parameter in model.named_parameters():
        original, value = before[name]
        assert parameter is original and torch.equal(parameter, value)
    assert storages(model) == size
    assert torch.equal(model(ids).logits, logits)
    # Written through one, seen through the other.
    attn = model.model.layers[0].self_attn
    with torch.no_grad():
        attn.k_proj.weight.zero_()
    rows = slice(attn.q_proj.out_features, attn.q_proj.out_features + attn.k_proj.out_features)
    assert not layers[0].qkv_weight[rows].any() and layers[0].qkv_weight.any()


def test_weights_are_moved_only_where_they_are_not_packed_already():
    """Parts of one storage in another order, or with a gap, are neighbours by chance at most."""
    weights = [torch.nn.Parameter(torch.randn(n, 4)) for n in (3, 2, 5)]
    expected = torch.cat([w.detach() for w in weights])
    first = packed(weights)
    assert torch.equal(first, expected) and neighbours([w.data for w in weights])
    assert packed(weights).data_ptr() == first.data_ptr()
    weights[1].data = weights[1].data.clone()
    whole = torch.arange(24.0).view(6, 4)
    other = ([torch.nn.Parameter(part) for part in parts]
             for parts in ([whole[3:], whole[:3]], [whole[:2], whole[3:]]))  # fmt: skip
    for parts in (weights, *other):
        expected = torch.cat([part.detach() for part in parts])
        assert not neighbours([part.data for part in parts])
        again = packed(parts)
        assert torch.equal(again, expected) and again.data_ptr() != first.data_ptr()


def test_a_packed_model_is_saved_and_loaded_as_before(tmp_path):
    model = copy.deepcopy(golden.model("dream"))
    expected = dsb.generate(model, prompts(1)[0][None], **SHAPE).sequences
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in golden.model("dream").state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    out = dsb.generate(dsb.load_model(tmp_path, dtype="float32"), prompts(1)[0][None], **SHAPE)
    assert torch.equal(out.sequences, expected)


def test_gradients_and_an_optimiser_step_go_through_packed_weights():
    model = random_model("Llama")
    other = copy.deepcopy(model)
    layers_of(model.model)
    ids = torch.arange(2, 14)[None]
    for m in (model, other):
        optimiser = torch.optim.SGD(m.parameters(), lr=0.1)
        m(ids, labels=ids).loss.backward()
        optimiser.step()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class Scaled(torch.nn.Linear):
    """A linear layer that does more, as adapters and quantisation do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.5


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("how", ["subclass", "hook", "bias"])
def test_layers_that_are_not_plain_run_module_by_module(family, how):
    """Their own forward decides; the tokens are those of a plain model with the same effect."""
    model = copy.deepcopy(golden.model(family))
    plain = copy.deepcopy(model)
    for i, (layer, twin) in enumerate(zip(model.model.layers, plain.model.layers, strict=True)):
        if how == "subclass":
            layer.self_attn.q_proj.__class__ = Scaled
            with torch.no_grad():
                twin.self_attn.q_proj.weight.mul_(1.5)
                if twin.self_attn.q_proj.bias is not None:
                    twin.self_attn.q_proj.bias.mul_(1.5)
        elif how == "hook" and i == 0:
            layer.mlp.register_forward_hook(lambda module, args, out: out * 2)
            with torch.no_grad():
                twin.mlp.down_proj.weight.mul_(2)
        elif how == "bias":
            layer.mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(64))
    assert all(isinstance(layer, ModuleLayer) for layer in layers_of(model.model))
    assert all(isinstance(layer, PackedLayer) for layer in layers_of(plain.model))
    for prompt in prompts(2):
        a, b = (dsb.generate(m, prompt[None], **SHAPE) for m in (model, plain))
        assert torch.equal(a.sequences, b.sequences) and a.nfe == b.nfe

"""load_model(adapter=...): the tokens of PEFT's own model, or one line that names the adapter."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsb_runtime as dsb
from dsb_runtime.families import LAYER_NAMES
from tests import golden
from tests.checkpoints import write_chat_model
from tests.commands import refused
from tests.test_wrapped import PROMPT, decode_alone, whole_canvas

peft = pytest.importorskip("peft", reason="needs the extra: pip install .[peft]")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[5, 6, 7, 511]])


def load(family: str, folder: Any, **more: Any) -> Any:
    where = {} if "device_map" in more else {"device": "cpu"}
    return dsb.load_model(
        golden.DATA / family, **{"dtype": "float32", **where, **more, "adapter": folder}
    )


def write_adapter(folder: Path, family: str = "llada", **settings: Any) -> Any:
    """Save an adapter of random weights; returns PEFT's model with it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"init_lora_weights": False, "lora_alpha": 64, **settings})
    model = peft.get_peft_model(copy.deepcopy(golden.model(family)), config)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any] = dict, **fields: Any) -> None:
    """Rewrite an adapter's weights and config; `...` removes a field."""
    config = {**json.loads((folder / CONFIG).read_text()), **fields}
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
        {"target_modules": ["lm_head", "up_proj"], "use_dora": True},
        {"target_modules": ["embed_tokens", "up_proj"], "rank_pattern": {"1.mlp.up_proj": 2}},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"], "use_rslora": True},
        {"target_modules": ["o_proj"], "layers_to_transform": [1], "init_lora_weights": True,
         "trainable_token_indices": [6, 7, 511]},
    ],
)  # fmt: skip
def test_the_tokens_are_those_of_pefts_own_model(tmp_path, family, settings):
    theirs = write_adapter(tmp_path, family, **settings)
    ours = load(family, tmp_path)
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert decode_alone(ours) == whole_canvas(theirs.get_base_model(), PROMPT, 4, 8)


@pytest.mark.parametrize("kind", ["IA3Config", "OFTConfig", "LoHaConfig"])
def test_other_types_of_adapter(tmp_path, kind):
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["q_proj", "o_proj"], **more)
    theirs = peft.get_peft_model(copy.deepcopy(golden.model("llada")), config)
    torch.manual_seed(0)
    for weight in theirs.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    theirs.save_pretrained(tmp_path)
    expected = whole_canvas(theirs.get_base_model(), PROMPT, 4, 8)
    assert decode_alone(load("llada", tmp_path)) == expected != decode_alone(golden.model("llada"))


def test_in_half_precision_the_adapter_is_as_precise_as_pefts(tmp_path):
    write_adapter(tmp_path, target_modules=["q_proj", "up_proj"])
    base = dsb.load_model(golden.DATA / "llada", dtype="bfloat16", device="cpu")
    theirs, ours = (
        peft.PeftModel.from_pretrained(base, str(tmp_path)),
        load("llada", tmp_path, dtype="bfloat16"),
    )
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


def published(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that an adapter of LLaDA's published classes has."""
    names = {f"model.layers.{i}.{ours}.": f"model.transformer.blocks.{i}.{theirs}."
             for i in range(3) for theirs, ours in LAYER_NAMES.items()}  # fmt: skip
    names |= {"lm_head.": "model.transformer.ff_out.", "model.embed_": "model.transformer.wte#"}
    renamed = {}
    for name, weight in weights.items():
        for ours, theirs in names.items():
            name = name.replace(f"base_model.model.{ours}", f"base_model.model.{theirs}")
        renamed[name.replace("#tokens", "")] = weight
    return renamed


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, {}),
        # Both a layer's last projection and the LM head are called ff_out there.
        ({"target_modules": ["down_proj", "lm_head"]}, {"target_modules": ["ff_out"]}),
        ({"target_modules": ["gate_proj", "o_proj", "embed_tokens"],
          "rank_pattern": {"1.mlp.gate_proj": 4}, "alpha_pattern": {"o_proj": 128}},
         {"target_modules": ["ff_proj", "attn_out", "wte"],
          "rank_pattern": {"1.ff_proj": 4}, "alpha_pattern": {"attn_out": 128}}),
        ({"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
         {"modules_to_save": ["transformer.ff_out"]}),
    ],
)  # fmt: skip
def test_an_adapter_of_the_published_classes(tmp_path, ours, theirs):
    expected = write_adapter(tmp_path, **ours)
    change(tmp_path, published, **theirs)
    assert any("transformer" in name for name in load_file(tmp_path / WEIGHTS))
    with torch.no_grad():
        assert torch.equal(load("llada", tmp_path)(IDS).logits, expected(IDS).logits)


def without_first(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(weights.items())[1:])


def with_another(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "base_model.model.model.layers.7.x": torch.ones(2)}


BAD = [
    (None, {"peft_type": "NOPE"}, "peft_type='NOPE' in adapter_config.json; expected a type of"),
    (None, {"peft_type": ...}, "peft_type=None"),
    (None, {"brand_new": 3}, "brand_new=3 in adapter_config.json; expected a field of LORA"),
    (None, {"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5]"),
    (None, {"r": 4}, "q_proj.lora_A.weight has shape [8, 64], expected [4, 64]"),
    (None, {"target_modules": ["q_proj"]}, "unexpected weight model.layers.0.mlp.up_proj.lora_A"),
    (None, {"target_modules": ["q_proj", "up_proj", "k_proj"]}, "missing weight model.layers.0"),
    (None, {"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
    (None, {"target_modules": "((("}, "it does not fit the model (missing )"),
    (without_first, {}, "missing weight model.layers.0.mlp.up_proj.lora_A.weight"),
    (with_another, {}, "unexpected weight model.layers.7.x (1 in all)"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "fields", "said"), BAD)
def test_what_does_not_fit_is_one_line(tmp_path, edit, fields, said):
    write_adapter(tmp_path, target_modules=["q_proj", "up_proj"])
    change(tmp_path, edit or dict, **fields)
    with golden.refusal(f"adapter='{tmp_path}': ", said):
        load("llada", tmp_path)


def test_folders_that_are_none(tmp_path, monkeypatch):
    """They are refused before the model's weights are read."""
    write_adapter(tmp_path, target_modules=["q_proj"])
    monkeypatch.setattr("dsb_runtime.models.load.read_model", None)
    for source, said, kind in (
        (3, "adapter=3: expected an adapter folder", TypeError),
        ("/nowhere", "adapter='/nowhere': expected an adapter folder", OSError),
        (golden.DATA, "no adapter_config.json; expected an adapter folder", OSError),
    ):
        with golden.refusal(said, kind=kind):
            load("llada", source)
    with golden.refusal("distributed_config and adapter: expected one of the two"):
        dsb.load_model(golden.DATA / "llada", adapter=tmp_path, distributed_config=object())
    whole, config = (tmp_path / WEIGHTS).read_bytes(), (tmp_path / CONFIG).read_text()
    (tmp_path / WEIGHTS).write_bytes(whole[:900])
    with golden.refusal(f"adapter='{tmp_path}'", "not a whole safetensors file"):
        load("llada", tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with golden.refusal(f"adapter='{tmp_path}'", "expected a JSON file"):
        load("llada", tmp_path)
    (tmp_path / CONFIG).write_text(config)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with golden.refusal("weights are pickled (adapter_model.bin)"):
        load("llada", tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with golden.refusal("no adapter_model.safetensors", kind=OSError):
        load("llada", tmp_path)


def test_adapters_that_act_through_pefts_model(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(copy.deepcopy(golden.model("llada")), config)
    model.save_pretrained(tmp_path)
    with golden.refusal("peft_type='PROMPT_TUNING' adds prompt tokens"):
        load("llada", tmp_path)


def test_a_model_that_is_offloaded_is_not_adapted(tmp_path):
    write_adapter(tmp_path, target_modules=["q_proj"])
    parts = ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")
    device_map = {"lm_head": "cpu", "model.layers.1": "disk"}
    device_map |= {f"model.{part}": "cpu" for part in parts}
    with golden.refusal("device_map keeps model.layers.1.self_attn.q_proj.weight away"):
        load("llada", tmp_path, device_map=device_map)


def test_the_command(tmp_path, capsys):
    chat, folder = write_chat_model(tmp_path / "chat"), tmp_path / "adapter"
    expected = write_adapter(folder, target_modules=["q_proj", "up_proj"])
    shape = {"gen_length": 16, "block_length": 8, "stop_at_eos": True}
    out = dsb.generate(expected, torch.tensor([[2, 10, 20, 30, 3]]), **shape)
    from dsb_runtime.cli.main import main

    words = ["generate", "w10 w20 w30", "--model", str(chat), "--gen-length", "16"]
    words += ["--block-length", "8", "--json", "--adapter"]
    assert main([*words, str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["response_ids"] == out.sequences[0, 5:].tolist()
    for command in (words[:-1], ["bench", "--model", chat], ["profile"], ["eval"]):
        refused(capsys, *command, "--adapter", chat, said="no adapter_config.json")
    refused(capsys, "bench", "--preset", "tiny", "--adapter", folder, said="--preset and --adapter")

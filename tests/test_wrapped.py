"""Whatever is wrapped around a model's modules is honoured: tokens are those of its own forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import dsb_runtime as dsb
from dsb_runtime.demo import MODEL_DIR
from tests import golden
from tests.recorded import Recorder

SHAPE = {"gen_length": 16, "block_length": 8}
PROMPT = torch.tensor([[5, 6, 7]])
# Every module of the second layer, the containers and what stands before and after the layers.
PLACES = (
    "", "model", "model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head",
    "model.layers.1", "model.layers.1.self_attn", "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.o_proj", "model.layers.1.mlp", "model.layers.1.mlp.act_fn",
    "model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm",
    "model.layers.1.post_attention_layernorm",
)  # fmt: skip


@pytest.fixture(params=golden.FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return copy.deepcopy(golden.model(request.param))


def whole_canvas(model: Any, prompt: Tensor, block_length: int, gen_length: int) -> list[int]:
    """DSB's loop without a cache over the model's own forward, one token a step."""
    info = model.dsb
    canvas = torch.cat([prompt, prompt.new_full((1, gen_length), info.mask_id)], 1)
    first, committed = prompt.shape[1], 0
    while (canvas == info.mask_id).any():
        logits = model(canvas).logits[0].float()
        if info.family.shift:
            logits = torch.cat([logits[:1], logits[:-1]])
        logits[:, info.mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        end = first + block_length + committed
        confidence[(canvas[0] != info.mask_id)] = -torch.inf
        confidence[end:] = -torch.inf
        best = confidence.argmax()
        canvas[0, best] = token[best]
        committed += 1
    return canvas[0].tolist()


def decode_alone(model: Any) -> list[int]:
    settings = {"gen_length": 8, "block_length": 4, "steps": 8, "cache": "none"}
    return dsb.generate(model, PROMPT, stop_at_eos=False, **settings).sequences[0].tolist()


def shift_output(by: float) -> Callable:
    """A forward hook that adds a steering vector to whatever a module returns."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        steer = torch.linspace(-by, by, 64)
        if isinstance(out, Tensor):
            return out + (steer if out.shape[-1] == 64 else by * torch.arange(out.shape[-1]).cos())
        if isinstance(out, tuple):
            return (hook(module, args, out[0]), *out[1:])
        name = "logits" if "logits" in out else "last_hidden_state"
        out[name] = hook(module, args, out[name])
        return out

    return hook


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_on_any_module_is_honoured(model: PreTrainedModel, place: str) -> None:
    plain = decode_alone(model)
    model.get_submodule(place).register_forward_hook(shift_output(1.5))
    expected = whole_canvas(model, PROMPT, 4, 8)
    assert decode_alone(model) == expected != plain


@pytest.mark.parametrize("place", ["", "model", "model.layers.0", "lm_head"])
@pytest.mark.parametrize("how", ["pre-hook", "forward", "class", "global"])
def test_every_way_to_wrap_a_module_is_seen(place: str, how: str) -> None:
    """Each of them counts its calls and changes nothing, also in an engine that has been used."""
    model = copy.deepcopy(golden.model("llada"))
    expected = dsb.generate(model, PROMPT, **SHAPE)
    module, calls = model.get_submodule(place), []
    forward = module.forward
    if how == "pre-hook":
        module.register_forward_pre_hook(lambda *_: calls.append(1))
    elif how == "forward":
        module.forward = lambda *args, **named: calls.append(1) or forward(*args, **named)
    elif how == "class":
        body = {"forward": lambda self, *args, **named: calls.append(1) or forward(*args, **named)}
        module.__class__ = type("Mine", (type(module),), body)
    else:
        count = lambda m, *_: calls.append(1) if m is module else None  # noqa: E731
        handle = nn.modules.module.register_module_forward_hook(count)
    try:
        out = dsb.generate(model, PROMPT, **SHAPE)
    finally:
        if how == "global":
            handle.remove()
    assert torch.equal(out.sequences, expected.sequences)
    assert len(calls) == out.nfe == expected.nfe


@pytest.mark.parametrize("place", ["", "model.layers.0"])
def test_golden_trajectories_of_a_wrapped_model(model: PreTrainedModel, place: str) -> None:
    model.get_submodule(place).register_forward_hook(lambda *_: None)
    family = model.dsb.family.name
    cases = {(case["method"], case["rule"]): case for case in golden.cases(family)}
    for case in cases.values():
        out = dsb.generate(model, torch.tensor([case["prompt"]]), **golden.settings(case))
        assert out.sequences[0].tolist() == case["sequence"], case["method"]


@pytest.mark.parametrize("place", ["", "model.layers.0"])
def test_a_padded_batch_of_a_wrapped_model(model: PreTrainedModel, place: str) -> None:
    ids, mask = golden.left_pad(golden.prompts(3))
    settings = {**SHAPE, "refresh_policy": "response", "attention_mask": mask}
    expected = dsb.generate(model, ids, **settings)
    model.get_submodule(place).register_forward_hook(lambda *_: None)
    out = dsb.generate(model, ids, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.row_nfe == expected.row_nfe


def test_a_hook_that_bans_ids_is_honoured(model: PreTrainedModel) -> None:
    expected = dsb.generate(model, PROMPT, **SHAPE).sequences[0, 3:]
    banned = expected.unique()

    def ban(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, banned, -torch.inf)

    model.lm_head.register_forward_hook(ban)
    for settings in ({}, {"temperature": 0.7}):
        out = dsb.generate(model, PROMPT, **SHAPE, **settings).sequences[0, 3:]
        assert not torch.isin(out, banned).any()


class LoraLinear(nn.Module):
    """A linear layer and an adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(4, base.in_features, generator=generator) / 4)
        self.b = nn.Parameter(torch.randn(base.out_features, 4, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("place", ["lm_head", "model.layers.1.self_attn.v_proj"])
def test_an_adapter_in_place_of_a_linear_layer_is_called(
    model: PreTrainedModel, place: str
) -> None:
    plain = decode_alone(model)
    model.set_submodule(place, LoraLinear(model.get_submodule(place)))
    assert decode_alone(model) == whole_canvas(model, PROMPT, 4, 8) != plain


def test_steps_that_call_modules_are_not_captured(model: PreTrainedModel) -> None:
    """A replay would not see that an adapter was switched off."""
    on = [True]
    steer = shift_output(1.5)
    hook = lambda *call: steer(*call) if on[0] else None  # noqa: E731
    for place in ("lm_head", "model.norm", "model.layers.1.mlp.up_proj", "model.layers.1"):
        model.get_submodule(place).register_forward_hook(hook)
        engine = dsb.Engine(model, capture=Recorder())
        for on[0] in (True, False):
            expected = dsb.generate(model, PROMPT, **SHAPE).sequences
            assert torch.equal(engine.generate(PROMPT, **SHAPE).sequences, expected)
        model.get_submodule(place)._forward_hooks.clear()


@pytest.mark.parametrize("change", ["norm", "final norm", "embedding", "rotary"])
def test_a_change_after_the_first_call_is_seen(model: PreTrainedModel, change: str) -> None:
    plain = decode_alone(model)
    inner = model.model
    if change == "norm":
        inner.layers[0].input_layernorm.register_forward_hook(shift_output(1.0))
    elif change == "final norm":
        inner.norm.register_forward_hook(shift_output(1.0))
    elif change == "embedding":
        other = nn.Embedding(*inner.embed_tokens.weight.shape)
        other.weight.data.copy_(inner.embed_tokens.weight.flip(1))
        model.set_input_embeddings(other)
    else:
        inner.rotary_emb.inv_freq.mul_(3)
    assert decode_alone(model) == whole_canvas(model, PROMPT, 4, 8) != plain


# --- objects around a model -------------------------------------------------------------------


def test_an_object_that_holds_the_model_decodes_as_the_model(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    expected = dsb.generate(model, PROMPT, **SHAPE).sequences
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        holders = [torch.compile(model), nn.DataParallel(model)]
        holders.append(nn.parallel.DistributedDataParallel(torch.compile(model)))
    finally:
        torch.distributed.destroy_process_group()
    for holder in holders:
        assert torch.equal(dsb.generate(holder, PROMPT, **SHAPE).sequences, expected)
        assert torch.equal(dsb.Engine(holder).generate(PROMPT, **SHAPE).sequences, expected)
        assert dsb.patch(holder) is holder and dsb.unpatch(holder) is holder


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["lm_head"], ["embed_tokens", "up_proj"]]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_lora_of_peft(model: PreTrainedModel, targets: list[str], mixed: bool) -> None:
    """Not merged, switched off, switched on again, and merged."""
    peft = pytest.importorskip("peft")
    plain = decode_alone(model)
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_alpha=64)
    adapted = peft.get_peft_model(model, config, mixed=mixed)
    expected = whole_canvas(model, PROMPT, 4, 8)
    assert decode_alone(adapted) == expected != plain
    with adapted.disable_adapter():
        assert decode_alone(adapted) == plain
    assert decode_alone(adapted) == expected
    merged = adapted.merge_and_unload()
    assert decode_alone(merged) == expected


def test_a_hook_on_a_module_of_peft_is_given_every_token(model: PreTrainedModel) -> None:
    """It takes the mean over all tokens, where the engine's own last layer computes a few."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    plain = decode_alone(adapted)
    hooked = model.model.layers[-1].mlp.down_proj
    hooked.register_forward_hook(lambda module, args, out: out - 3 * out.mean(1, keepdim=True))
    assert decode_alone(adapted) == whole_canvas(model, PROMPT, 4, 8) != plain


def test_a_model_quantised_by_torch(model: PreTrainedModel) -> None:
    """Its layers choose one scale for all tokens of a call: other tokens change the result."""
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert decode_alone(quantised) == whole_canvas(quantised, PROMPT, 4, 8)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_model_that_accelerate_offloads(where: str, tmp_path: Path) -> None:
    expected = dsb.generate(golden.model("llada"), PROMPT, **SHAPE).sequences
    if where == "cpu":
        model = accelerate.cpu_offload(copy.deepcopy(golden.model("llada")), torch.device("cpu"))
    else:
        parts = ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")
        device_map = {"lm_head": "cpu", "model.layers.1": "disk"}
        device_map |= {f"model.{part}": "cpu" for part in parts}
        model = dsb.load_model(golden.DATA / "llada", dtype="float32", device_map=device_map)
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(dsb.generate(model, PROMPT, **SHAPE).sequences, expected)


ALORA = {"target_modules": ["q_proj"], "alora_invocation_tokens": [5, 6]}


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 4}, "'PROMPT_TUNING' adds prompt tokens"),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}, "adds prompt tokens"),
        ("LoraConfig", ALORA, "alora_invocation_tokens=[5, 6]"),
        ("PolyConfig", {"target_modules": ["q_proj"]}, "'POLY' mixes adapters"),
    ],
)
def test_an_adapter_of_pefts_own_forward_is_refused(
    kind: str, fields: dict[str, Any], said: str
) -> None:
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(golden.model("llada"))
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **fields)
    with golden.refusal("model=PeftModelForCausalLM", said, kind=TypeError):
        dsb.generate(peft.get_peft_model(model, config), PROMPT, **SHAPE)


def test_adapters_that_are_mixed_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """X-LoRA: the adapters that are switched on are plain LoRAs."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path)
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, adapters={"0": str(tmp_path)}
    )
    with golden.refusal("model=PeftModelForCausalLM", "'XLORA' mixes adapters", kind=TypeError):
        dsb.generate(peft.get_peft_model(model, config), PROMPT, **SHAPE)


def test_the_slower_way_is_named_once(model: PreTrainedModel, caplog: Any) -> None:
    from dsb_runtime.engine import loop

    loop.logger.warning_once.cache_clear()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    for _ in range(2):
        dsb.generate(model, PROMPT, **SHAPE)
    assert caplog.text.count("model.layers.1 has a forward hook") == 1


# --- transformers' own doors ------------------------------------------------------------------


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_plain_generate_never_decodes_token_by_token(family: str) -> None:
    model = golden.model(family)
    expected = dsb.generate(model, PROMPT, **SHAPE).sequences
    auto = AutoModelForCausalLM.from_pretrained(golden.DATA / family, dtype="float32")
    assert torch.equal(auto.generate(PROMPT, max_new_tokens=16, block_length=8), expected)
    causal = type(model)(model.config)
    prepare = causal.prepare_inputs_for_generation
    for refusing in (model, copy.deepcopy(model), dsb.patch(causal)):
        with golden.refusal("custom_generate=dsb_runtime.custom_generate", kind=TypeError):
            refusing.generate(PROMPT, max_new_tokens=16)
    assert dsb.unpatch(causal).prepare_inputs_for_generation == prepare


def test_a_pipeline_decodes_as_generate_does() -> None:
    auto = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    pipe = pipeline("text-generation", model=auto, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "3 + 4 = ?"}]
    answer = pipe(chat, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    out = dsb.generate(auto, ids, gen_length=16).sequences[0, ids.shape[1] :]
    assert answer == tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("way", ["load_model", "auto", "patch"])
def test_labels_are_compared_with_the_logits_that_predict_them(way: str) -> None:
    """The masked positions' own loss, where a causal model's would be 12.600."""
    model = copy.deepcopy(golden.model("llada"))
    if way == "auto":
        model = AutoModelForCausalLM.from_pretrained(golden.DATA / "llada", dtype="float32")
    elif way == "patch":
        causal = type(model)(model.config)
        causal.load_state_dict(model.state_dict())
        model = dsb.patch(causal)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    hidden = torch.tensor([[False, False, False, True, True, False]])
    labels = ids.masked_fill(~hidden, -100)
    loss = model(ids.masked_fill(hidden, model.dsb.mask_id), labels=labels).loss
    assert loss.item() == pytest.approx(15.850, abs=5e-4)


# --- the caller's modes -----------------------------------------------------------------------


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", ["train", "autocast", "dtype", "device"])
def test_the_callers_modes_change_no_token(
    model: PreTrainedModel, mode: None, name: str, temperature: float
) -> None:
    settings = {**SHAPE, "temperature": temperature}
    call = lambda: dsb.generate(  # noqa: E731
        model, PROMPT, generator=torch.Generator().manual_seed(3), **settings
    )
    expected = call().sequences
    if name == "train":
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.9
        model.model.layers[0].register_forward_hook(lambda *_: None)  # so that modules are called
        model.model.layers[1].eval()
        assert torch.equal(call().sequences, expected)
        assert model.training and not model.model.layers[1].training
    elif name == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call().sequences, expected)
            assert torch.is_autocast_enabled("cpu")
    elif name == "dtype":
        torch.set_default_dtype(torch.bfloat16)
        seen: set[torch.dtype] = set()  # it is the whole process's, and stays what it is
        settings["on_step"] = lambda event: seen.add(torch.get_default_dtype())
        assert torch.equal(call().sequences, expected)
        assert seen == {torch.bfloat16}
    else:
        torch.set_default_device("meta")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(call().sequences.cpu(), expected)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("part", "dtype", "said"),
    [
        ("lm_head", torch.bfloat16, "lm_head.weight is torch.bfloat16 in a model of torch.float32"),
        (
            "model.layers.1.mlp",
            torch.float16,
            "model.layers.1.mlp.gate_proj.weight is torch.float1",
        ),
        ("model.norm", torch.float64, "model.norm.weight is torch.float64 in a model of"),
        ("", torch.float64, "the model is torch.float64: expected float32, float16 or bfloat16"),
    ],
)
def test_weights_of_several_dtypes_are_refused(
    model: PreTrainedModel, part: str, dtype: torch.dtype, said: str
) -> None:
    model.get_submodule(part).to(dtype)
    with golden.refusal(said, kind=TypeError):
        dsb.generate(model, PROMPT, **SHAPE)


def test_a_norm_of_a_narrower_dtype_is_computed_in_the_models(model: PreTrainedModel) -> None:
    model.model.norm.bfloat16()
    assert decode_alone(model) == whole_canvas(model, PROMPT, 4, 8)

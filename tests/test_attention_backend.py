"""attn_implementation="dsb" against transformers' own, on small random decoders."""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    modeling_flash_attention_utils,
)

from dsb_runtime.engine import attention
from dsb_runtime.engine.attention import dsb_attention, flash_attention, takes_flash

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
QWEN2_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-sliding": (Qwen2Config, QWEN2_SLIDING),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {**SLIDING, "attn_logit_softcapping": 1.0}),
    "gemma3": (Gemma3TextConfig, SLIDING),
    "gpt-oss": (GptOssConfig, {**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
EAGER = {"gemma2", "gpt-oss"}  # soft-capping, sinks: transformers' SDPA does not serve them either
LENGTH = 14


def model_of(name: str, causal: bool = True) -> PreTrainedModel:
    kind, more = CONFIGS[name]
    config = kind(**SIZES, **more)
    if not causal:
        config.is_causal = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # scores of a size that a wrong mask or scale would show in
        weight.data.mul_(4) if weight.ndim == 2 else None
    return model


def inputs(padding: str) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (3, LENGTH), generator=generator)
    if padding == "none":
        return ids, None
    mask = torch.ones_like(ids)
    mask[0, : LENGTH // 2], mask[1, :3] = 0, 0
    mask = mask if padding == "left" else mask.flip(1)
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def logits(model: PreTrainedModel, name: str, ids: Tensor, mask: Tensor | None, **more) -> Tensor:
    model.set_attn_implementation(name)
    return model(input_ids=ids, attention_mask=mask, **more).logits


def error(model: PreTrainedModel, padding: str, reference: str = "sdpa") -> float:
    """The largest difference from transformers' own attention, where there is no padding."""
    ids, mask = inputs(padding)
    ours, expected = (logits(model, name, ids, mask) for name in ("dsb", reference))
    real = slice(None) if mask is None else mask.bool()
    assert expected[real].std() > 0.1, "logits must vary, or this shows nothing"
    return float((ours - expected)[real].abs().max())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, causal):
    model = model_of(name, causal)
    for padding in ("none", "left", "right"):
        assert error(model, padding, "eager" if name in EAGER else "sdpa") < 1e-5, padding
    if name in ("llama", "qwen2"):
        ids, mask = inputs("none")
        difference = logits(model_of(name, not causal), "dsb", ids, mask)
        difference -= logits(model, "dsb", ids, mask)
        assert difference.abs().max() > 0.1, "causal and bidirectional attention differ"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_causal_generation_gives_the_same_tokens(name, cache):
    model = model_of(name)
    for padding in ("none", "left"):
        ids, mask = inputs(padding)
        tokens = []
        for implementation in ("dsb", "eager" if name in EAGER else "sdpa"):
            model.set_attn_implementation(implementation)
            tokens.append(model.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, disable_compile=True,
                cache_implementation=cache,
            ).tolist())  # fmt: skip
        assert tokens[0] == tokens[1], padding


def test_dropout_and_gradients_as_with_sdpa():
    model = model_of("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    ids, _ = inputs("none")
    results = []
    for implementation in ("dsb", "sdpa"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(input_ids=ids, attention_mask=inputs("left")[1], labels=ids).loss
        loss.backward()
        results.append((loss.item(), model.model.embed_tokens.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert (results[0][1] - results[1][1]).abs().max() < 1e-5


def test_softcapping_warns_once_and_names_the_layer(monkeypatch):
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    monkeypatch.setattr(attention.logger, "handlers", [handler])
    attention.logger.warning_once.cache_clear()
    model, (ids, mask) = model_of("gemma2"), inputs("none")
    logits(model, "dsb", ids, mask)
    logits(model, "dsb", ids, mask)
    assert len(heard) == 1 and "Gemma2Attention uses softcap" in heard[0]


class Lonely(nn.Module):
    """A layer whose file has no eager attention."""

    config = SimpleNamespace()
    is_causal = True


def qkv(queries: int = 6, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 8)


plain = functools.partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True)


def test_what_cannot_be_served_is_an_error():
    with pytest.raises(NotImplementedError, match=r"Lonely uses s_aux.*expected .*'eager'"):
        dsb_attention(Lonely(), *qkv(), None, s_aux=torch.ones(4))
    with pytest.raises(ValueError, match="Lonely is causal and gave no mask for 4 queries of 6"):
        dsb_attention(Lonely(), *qkv(4, 6), None)


def test_a_causal_layer_without_a_mask_stays_causal():
    """Models that build masks themselves leave a plain causal one out."""
    q, k, v = qkv()
    expected = plain(q, k, v, is_causal=True)
    for more in ({}, {"is_causal": True}):
        ours, _ = dsb_attention(Lonely(), q, k, v, None, softcap=None, **more)
        assert (ours.transpose(1, 2) - expected).abs().max() < 1e-6
    free, _ = dsb_attention(Lonely(), q, k, v, None, is_causal=False)
    assert (free.transpose(1, 2) - expected).abs().max() > 1e-2
    last, _ = dsb_attention(Lonely(), q[:, :, -1:], k, v, None)
    assert (last.transpose(1, 2) - expected[:, :, -1:]).abs().max() < 1e-6


# --- flash-attn -------------------------------------------------------------------------------


def on_cuda(heads: int, length: int, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A CUDA tensor without a GPU: its metadata is true, its data do not exist."""
    with FakeTensorMode():
        return torch.empty(2, heads, length, dim, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.ones(2, 1, 1, 48, dtype=torch.bool)},
        {"dropout": 0.1},
        {"query": on_cuda(8, 16)},  # a window's queries
        {"query": on_cuda(8, 48, dtype=torch.float32)},
        {"key": on_cuda(2, 48, dtype=torch.float16)},
        {name: on_cuda(8, 48, dim=288) for name in ("query", "key", "value")},
        {name: torch.empty(2, 8, 48, 64, dtype=torch.bfloat16) for name in ("query", "key")},
    ],
    ids=["mask", "dropout", "window", "float32", "mixed", "head-dim", "cpu"],
)
def test_flash_takes_full_passes_without_a_mask_in_half_precision(change):
    for dtype in (torch.float16, torch.bfloat16):
        q, kv = on_cuda(8, 48, dtype=dtype), on_cuda(2, 48, dtype=dtype)
        whole = {"query": q, "key": kv, "value": kv, "mask": None, "dropout": 0.0}
        assert takes_flash(**whole)
    assert not takes_flash(**{**whole, **change})


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, deterministic: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's function of that name by its documentation: (B, L, H, D) in and out."""
    assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return plain(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


@pytest.fixture
def flash_stand_in(monkeypatch):
    """transformers' own code down to flash-attn's function, for which a definition stands in."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = package.flash_attn_varlen_func = flash_attn_func
    package.flash_attn_with_kvcache = padding.pad_input = padding.unpad_input = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(modeling_flash_attention_utils, "is_flash_attn_2_available", lambda: True)
    for name, value in vars(modeling_flash_attention_utils).items():  # restored by monkeypatch
        if name == "_loaded_implementation" or name.endswith("_fn"):
            monkeypatch.setattr(modeling_flash_attention_utils, name, value)


def test_transformers_integration_is_called_as_it_wants(flash_stand_in):
    q, k, v = qkv(6, 6)
    ours = flash_attention(q, k, v, 0.3)
    assert torch.equal(ours, plain(q, k, v, scale=0.3).transpose(1, 2))


def test_a_bidirectional_model_takes_flash_where_nothing_is_masked(flash_stand_in, monkeypatch):
    calls: list[bool] = []

    def called(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *more) -> bool:
        calls.append(mask is None)
        return mask is None

    monkeypatch.setattr(attention, "takes_flash", called)
    monkeypatch.setattr(attention, "flash_installed", lambda device: True)
    wrapped, model = attention.flash_attention, model_of("llama", causal=False)
    taken: list[Tensor] = []
    monkeypatch.setattr(attention, "flash_attention", lambda *a: taken.append(a[0]) or wrapped(*a))
    for padding, count in (("none", 2), ("left", 0)):
        assert error(model, padding) < 1e-5
        assert (len(taken), len(calls)) == (count, 2)
        taken.clear(), calls.clear()


@pytest.mark.parametrize(
    ("device", "masked", "heads"), [("cuda", True, 4), ("cuda", False, 2), ("cpu", True, 2)]
)
def test_a_mask_and_grouped_heads_do_not_meet_on_a_gpu(monkeypatch, device, masked, heads):
    """Torch has no fused kernel for both and would write out every score."""
    seen: list[tuple[int, bool]] = []
    fused = attention.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        seen.append((k.shape[1], options["enable_gqa"]))
        assert k.shape == v.shape
        return fused(q, k, v, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x)  # a CPU build's asks for a GPU
    with FakeTensorMode():
        q, k = torch.empty(2, 4, 6, 8, device=device), torch.empty(2, 2, 6, 8, device=device)
        mask = torch.ones(2, 1, 1, 6, dtype=torch.bool, device=device) if masked else None
        out, _ = dsb_attention(nn.Identity(), q, k, k, mask, is_causal=False)
    assert out.shape == (2, 6, 4, 8) and seen == [(heads, heads == 2)]


def test_repeated_heads_are_each_groups_own():
    q, k = torch.empty(1, 6, 3, 4), torch.randn(1, 2, 5, 4)
    assert torch.equal(attention.repeat_heads(k, q), k.repeat_interleave(3, 1))

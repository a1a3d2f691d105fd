"""The plain loop that published DSB Cache code amounts to, as a baseline: kept simple, not slow
on purpose.

Logits for all rows of a forward, softmax in float64, keys cached before rotation and rotated
again at every step, and the host asked (`.item()`) at every decision. One row, LLaDA format,
threshold rule, DSB schedule with DSB Cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (1, H, N, D) by (N, D) tables."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@dataclass
class EagerOutput:
    sequences: Tensor
    tokens_per_forward: list[int]
    rows_per_forward: list[int]


class EagerModel:
    """Forward passes over a Llama's own weights with a cache of unrotated keys."""

    def __init__(self, model: LlamaForCausalLM, length: int) -> None:
        self.model = model
        self.heads = model.config.num_attention_heads
        self.kv_heads = model.config.num_key_value_heads
        self.dim = model.config.head_dim
        position = torch.arange(length, device=model.device)[None]
        weight = model.lm_head.weight
        cos, sin = model.model.rotary_emb(weight.new_zeros(1), position)
        self.cos, self.sin = cos[0], sin[0]
        self.keys: list[Tensor | None] = [None] * len(model.model.layers)
        self.values: list[Tensor | None] = [None] * len(model.model.layers)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(1, x.shape[1], heads, self.dim).transpose(1, 2)

    def forward(self, ids: Tensor, first: int, *, full: bool) -> Tensor:
        """Logits (1, N, V) of canvas rows [first, first + N)."""
        hidden = self.model.model.embed_tokens(ids)
        last = first + ids.shape[1]
        for i, layer in enumerate(self.model.model.layers):
            x = layer.input_layernorm(hidden)
            attn = layer.self_attn
            q = self.split(attn.q_proj(x), self.heads)
            k = self.split(attn.k_proj(x), self.kv_heads)
            v = self.split(attn.v_proj(x), self.kv_heads)
            if full:
                self.keys[i], self.values[i] = k, v
            else:
                self.keys[i] = self.keys[i].clone()
                self.values[i] = self.values[i].clone()
                self.keys[i][:, :, first:last] = k
                self.values[i][:, :, first:last] = v
            q = rotate(q, self.cos[first:last], self.sin[first:last])
            key = rotate(self.keys[i], self.cos, self.sin)
            repeat = self.heads // self.kv_heads
            key = key.repeat_interleave(repeat, dim=1)
            value = self.values[i].repeat_interleave(repeat, dim=1)
            out = scaled_dot_product_attention(q, key, value)
            out = out.transpose(1, 2).reshape(1, ids.shape[1], -1)
            hidden = hidden + attn.o_proj(out)
            x = layer.post_attention_layernorm(hidden)
            mlp = layer.mlp
            hidden = hidden + mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x))
        return self.model.lm_head(self.model.model.norm(hidden))


@torch.no_grad()
def eager_generate(
    model: LlamaForCausalLM,
    input_ids: Tensor,
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    max_block_length: int | None,
    prefix_window: int,
    threshold: float,
) -> EagerOutput:
    """Decode one prompt (1, P): DSB schedule, DSB Cache, the host asked at each decision."""
    prompt = input_ids.shape[1]
    length = prompt + gen_length
    x = torch.cat([input_ids, input_ids.new_full((1, gen_length), mask_id)], dim=1)
    runner = EagerModel(model, length)
    start, end, moved, committed, since, refresh = prompt, prompt + block_length, 0, 0, 0, True
    tokens_per_forward, rows_per_forward = [], []
    while (x == mask_id).any().item():
        first = 0 if refresh else start - min(max(moved, prefix_window), start)
        ids = x if refresh else x[:, first:end]
        logits = runner.forward(ids, first, full=refresh)
        probability = torch.softmax(logits.double(), dim=-1)
        logits[..., mask_id] = -torch.inf
        token = logits.argmax(-1)
        confidence = probability.gather(-1, token[..., None])[..., 0]
        since = 0 if refresh else since

        candidate = (ids == mask_id) & (torch.arange(first, first + ids.shape[1]) < end)
        confidence = torch.where(candidate, confidence, -torch.inf)
        best = confidence[0].argmax().item()
        count = 0
        for row in range(ids.shape[1]):
            if not candidate[0, row].item():
                continue
            if confidence[0, row].item() >= threshold or row == best:
                x[0, first + row] = token[0, row]
                count += 1
        committed, since = committed + count, since + count
        masked = (x[0] == mask_id).nonzero()
        new_start = masked[0].item() if len(masked) else length
        moved, start = new_start - start, new_start
        end = min(prompt + block_length + committed, length)
        if max_block_length is not None:
            end = min(end, start + max_block_length)
        refresh = since >= block_length
        tokens_per_forward.append(count)
        rows_per_forward.append(ids.shape[1])
    return EagerOutput(x, tokens_per_forward, rows_per_forward)

"""The plain loop that published DSB Cache code amounts to, as a baseline. It is simple, and not
slow on purpose.

It computes logits for all positions of a forward and a softmax in float64, caches keys before the
rotation and rotates them again at every step, and asks the host (`.item()`) at every decision. Like
the published code it decodes one prompt at a time. It follows the DSB schedule with DSB Cache, for
LLaDA's and Dream's format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from benchmarks.trajectory import RowStep


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (1, H, N, D) by (N, D) tables."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


@dataclass
class EagerOutput:
    """What the loop decided at each forward. Where it follows a trajectory, its own decisions are
    here too, although they were not carried out."""

    sequences: Tensor  # (1, P + G)
    positions_per_forward: list[int] = field(default_factory=list)
    commits: list[dict[int, int]] = field(default_factory=list)  # position -> token

    @property
    def tokens_per_forward(self) -> list[int]:
        return [len(commits) for commits in self.commits]


class EagerModel:
    """Forward passes over a Llama's or Qwen2's own weights with a cache of unrotated keys."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self.model = model
        self.repeat = model.config.num_attention_heads // model.config.num_key_value_heads
        self.dim = model.model.layers[0].self_attn.head_dim
        position = torch.arange(length, device=model.device)[None]
        cos, sin = model.model.rotary_emb(model.lm_head.weight.new_zeros(1), position)
        self.cos, self.sin = cos[0], sin[0]
        self.keys: list[Tensor | None] = [None] * len(model.model.layers)
        self.values: list[Tensor | None] = [None] * len(model.model.layers)

    def forward(self, ids: Tensor, first: int, *, full: bool) -> Tensor:
        """Logits (1, N, V) of canvas positions [first, first + N)."""
        hidden = self.model.model.embed_tokens(ids)
        last = first + ids.shape[1]
        for i, layer in enumerate(self.model.model.layers):
            x = layer.input_layernorm(hidden)
            attn = layer.self_attn
            q, k, v = (
                projection(x).unflatten(-1, (-1, self.dim)).transpose(1, 2)
                for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
            )
            if not full:
                k = self.keys[i].slice_scatter(k, 2, first, last)
                v = self.values[i].slice_scatter(v, 2, first, last)
            self.keys[i], self.values[i] = k, v
            q = rotate(q, self.cos[first:last], self.sin[first:last])
            key = rotate(k, self.cos, self.sin).repeat_interleave(self.repeat, dim=1)
            out = scaled_dot_product_attention(q, key, v.repeat_interleave(self.repeat, dim=1))
            hidden = hidden + attn.o_proj(out.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden))


def quota_due(step: int, steps: int, gen_length: int, committed: int) -> int:
    """The tokens to commit now so that the response is spread evenly over `steps` forwards."""
    if step + 1 >= steps:
        return gen_length - committed
    most = min(step + 1, gen_length % steps)
    return (step + 1) * (gen_length // steps) + most - committed


@torch.no_grad()
def eager_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    gen_length: int,
    block_length: int,
    prefix_window: int,
    max_block_length: int | None = None,
    threshold: float | None = None,
    steps: int | None = None,
    follow: Sequence[RowStep] | None = None,
    on_step: Callable[[str], None] | None = None,
) -> EagerOutput:
    """Decode one prompt (1, P) with the DSB schedule and DSB Cache; the host makes each decision.

    Args:
        threshold, steps: one of the two is the selection rule.
        follow: a recorded trajectory. Each forward then starts from its canvas and window, and
            the loop's own decisions are returned but not carried out.
        on_step: called after each forward and its decisions, with "refresh" or "window".
    """
    family, mask_id = model.dsb.family, model.dsb.mask_id
    prompt = input_ids.shape[1]
    length = prompt + gen_length
    x = torch.cat([input_ids, input_ids.new_full((1, gen_length), mask_id)], dim=1)
    runner, out = EagerModel(model, length), EagerOutput(x)
    start, end, prefix, committed, since, refresh = prompt, prompt + block_length, 0, 0, 0, True
    step = 0
    while (x == mask_id).any().item():
        if follow is not None:
            now = follow[step]
            start, end, prefix, refresh = now.start, now.end, now.prefix, now.kind == "refresh"
        first = 0 if refresh else start - prefix
        ids = x if refresh else x[:, first:end]
        logits = runner.forward(ids, first, full=refresh)
        if family.shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        probability = torch.softmax(logits.double(), dim=-1)
        logits[..., mask_id] = -torch.inf
        token = logits.argmax(-1)
        confidence = probability.gather(-1, token[..., None])[..., 0]
        since = 0 if refresh else since

        index = torch.arange(first, first + ids.shape[1], device=x.device)
        candidate = (ids == mask_id) & (index < end)
        confidence = torch.where(candidate, confidence, -torch.inf)
        order = confidence[0].argsort(descending=True, stable=True)
        order = order[: candidate.sum().item()]
        if refresh and family.refresh_commit == "first":
            picked = [order.min().item()]
        elif steps is not None:
            due = quota_due(step, steps, gen_length, committed)
            picked = order[: max(due, 1)].tolist()
        else:
            picked = [order[0].item()]
            picked += [i for i in order[1:].tolist() if confidence[0, i].item() >= threshold]
        commits = {first + i: token[0, i].item() for i in picked}
        out.commits.append(commits)
        out.positions_per_forward.append(ids.shape[1])

        if follow is None:
            for position, token_id in commits.items():
                x[0, position] = token_id
        else:
            x[0], commits = follow[step].canvas, follow[step].commits
        committed, since, step = committed + len(commits), since + len(commits), step + 1
        masked = (x[0] == mask_id).nonzero()
        new_start = masked[0].item() if len(masked) else length
        prefix = min(max(new_start - start, prefix_window), new_start)
        start, end = new_start, min(prompt + block_length + committed, length)
        if max_block_length is not None:
            end = min(end, start + max_block_length)
        if on_step is not None:
            on_step("refresh" if refresh else "window")
        refresh = since >= block_length
    return out

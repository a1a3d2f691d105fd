"""The method's loop for one row, over transformers' own forward and a cache of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from dsb_kernels.method import EOS, Row, source
from tests import golden

TOKEN = 7  # what a row of the method holds for every token that is no EOS


class StaleLayer(DynamicLayer):
    """K and V of every position, of which a forward overwrites those that it computes."""

    length = 0  # how many positions there are
    positions: Tensor  # of the coming forward

    def update(self, key_states: Tensor, value_states: Tensor, **options: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.keys[:, :, self.positions] = key_states
        self.values[:, :, self.positions] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return 0


def row_of(ids: list[int], mask_id: int, eos_ids: tuple[int, ...], **settings: Any) -> Row:
    """The method's row for a canvas: its response begins at the first mask and ends behind the
    last one."""
    masks = [i for i, token in enumerate(ids) if token == mask_id]
    first, last = masks[0], masks[-1] + 1
    given = {i: ids[i] for i in range(first, last) if ids[i] != mask_id}
    given = {i: EOS if token in eos_ids else TOKEN for i, token in given.items()}
    return Row(first, last - first, given=given, suffix_length=len(ids) - last, **settings)


@torch.no_grad()
def plain_loop(
    family: str,
    ids: Tensor,
    banned: Sequence[int] = (),
    min_new_tokens: int = 0,
    cfg_scale: float = 0.0,
    **settings: Any,
) -> tuple[list[int], list[str]]:
    """Fill the masks of `ids` (L,). Returns all tokens, and the kinds of the forwards. The settings
    are those of the method's `Row`. With `cfg_scale`, logits are LLaDA's published combination of
    two runs. Logits of banned tokens, and those of an EOS before `min_new_tokens` positions of the
    response, are -inf."""
    model = golden.model(family)
    info, eos_ids = model.dsb, model.dsb.eos_ids
    shift = info.family.shift
    commit = info.family.refresh_commit if settings["cache"] != "none" else "select"
    policy: dict[str, Any] = {
        "prefix_window": info.family.prefix_window, "refresh_commit": commit,
        "min_prefix": int(shift and commit == "select"),
    }  # fmt: skip
    row = row_of(ids.tolist(), info.mask_id, eos_ids, **policy, **settings)
    canvas = ids.clone()
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    cache_argument = "cache" if "cache" in names else "past_key_values"  # before transformers 5.23
    stored = Cache(layers=[StaleLayer() for _ in range(model.config.num_hidden_layers)])
    kinds: list[str] = []
    eos = torch.isin(torch.arange(model.config.vocab_size), torch.tensor(eos_ids))
    while not row.done:
        kinds.append(row.next_kind)
        seen = row.seen() if row.sparse else range(len(ids))
        whole = row.sparse and row.next_kind == "refresh"
        positions = torch.tensor(list(seen if whole else range(*row.computed(shift))))
        visible = torch.zeros(len(ids), dtype=torch.bool)
        visible[list(seen)] = True
        for layer in stored.layers:
            layer.positions, layer.length = positions, len(ids)
        inputs = canvas[None]
        if cfg_scale > 0:
            inputs = torch.stack([canvas, canvas.where(ids == info.mask_id, info.mask_id)])
        both = model(
            inputs[:, positions], position_ids=positions[None], use_cache=True,
            attention_mask=visible.expand(len(inputs), 1, 1, -1), **{cache_argument: stored},
        ).logits  # fmt: skip
        logits = both[-1] + (cfg_scale + 1) * (both[0] - both[-1]) if cfg_scale > 0 else both[0]
        candidates = row.candidates()
        where = positions.tolist()
        logits = logits[[where.index(source(i, shift)) for i in candidates]].double()
        logits[:, list(banned)] = -torch.inf
        early = [i - row.prompt_length < min_new_tokens for i in candidates]
        logits[torch.tensor(early)[:, None] & eos] = -torch.inf
        scores = logits.softmax(-1)
        allowed = scores.clone()
        allowed[:, info.mask_id] = -1
        tokens = allowed.argmax(-1)
        confidences = scores.gather(1, tokens[:, None])[:, 0].tolist()
        ends = [EOS if int(token) in eos_ids else TOKEN for token in tokens]
        for i in row.advance(ends, confidences):
            canvas[i] = tokens[candidates.index(i)]
    if settings.get("stop_at_eos") and EOS in row.canvas[row.prompt_length : row.length]:
        end = row.canvas.index(EOS, row.prompt_length)
        behind = (ids == info.mask_id) & (torch.arange(len(ids)) > end)
        canvas = torch.where(behind, canvas[end], canvas)
    return canvas.tolist(), kinds

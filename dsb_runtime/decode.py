"""generate: one loop for every schedule, cache policy and selection rule.

A forward is either full (every position) or a window of rows; what it computes is scored, some of
it is committed, and the window slides: `dsb_kernels.unmask` decides all of that on the device.
The host looks once per forward, between steps: which rows refresh, which move their window, which
are done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_kernels.unmask import initial_state, unmask_and_slide
from dsb_kernels.window_state import UnmaskSpec, WindowState
from dsb_runtime.cache import WindowCache
from dsb_runtime.check import (
    check_attention_mask,
    check_family_settings,
    check_generator,
    check_model,
    check_no_masks,
    check_prompt,
)
from dsb_runtime.config import DecodingConfig
from dsb_runtime.forward import Backbone
from dsb_runtime.load import DiffusionInfo
from dsb_runtime.sampling import propose


@dataclass
class GenerationOutput:
    """What `generate` returns; B rows, prompt P, response G."""

    sequences: Tensor  # (B, P + G) int64, left padding kept
    nfe: int  # forward passes run
    tokens_per_forward: list[int]  # positions committed by each forward, over all rows
    row_nfe: list[int]  # forward passes that each row took part in
    row_tokens: list[int]  # per row: response positions up to and including its first EOS


@dataclass
class StepEvent:
    """One forward, after its commit: what `on_step` is called with. Tensors are live: copy what
    must outlast the call."""

    index: int  # forwards before this one
    kind: str  # "refresh" (every position) or "window"
    rows: list[int]  # batch rows that took part
    before: list[tuple[int, int, int]]  # their (start, end, prefix) in this forward
    canvas: Tensor  # (B, L) after the commit
    position: Tensor  # (B, K) candidates of this forward, -1 beyond
    commit: Tensor  # (B, K) bool
    confidence: Tensor  # (B, K)
    state: WindowState  # what comes next


def spec_of(config: DecodingConfig, info: DiffusionInfo, prompt_length: int) -> UnmaskSpec:
    """The launch constants of a call, family defaults filled in."""
    family = info.family
    cached = config.cache != "none"
    refresh_commit = config.refresh_commit or (family.refresh_commit if cached else "select")
    prefix = family.prefix_window if config.prefix_window is None else config.prefix_window
    naive = config.schedule == "naive"
    return UnmaskSpec(
        prompt_length=prompt_length,
        block_length=config.block_length,
        max_block_length=config.max_block_length,
        schedule=config.schedule,
        cache=config.cache,
        prefix_window=prefix,
        min_prefix=int(family.shift and refresh_commit == "select"),
        rule=config.rule,
        rule_value=config.rule_value,
        steps=(config.steps or 0) // (config.num_blocks if naive else 1),
        refresh_commit=refresh_commit,
        mask_id=info.mask_id,
        eos_ids=info.eos_ids,
        stop_at_eos=config.stop_at_eos,
    )


class Decoder:
    """The tensors of one call and the step over them."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        leftpad: Tensor,
        config: DecodingConfig,
        info: DiffusionInfo,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.config, self.info, self.generator = model, config, info, generator
        rows, prompt = input_ids.shape
        response = input_ids.new_full((rows, config.gen_length), info.mask_id)
        self.canvas = torch.cat([input_ids, response], dim=1).long()
        self.leftpad = leftpad
        self.spec = spec_of(config, info, prompt)
        self.state = initial_state(self.canvas, leftpad, self.spec)
        length = self.canvas.shape[1]
        self.index = torch.arange(length, device=self.canvas.device)
        self.padded = bool((leftpad > 0).any())
        # (B, 1, 1, L): keys that exist. Without padding there is nothing to mask.
        self.key_mask = (self.index >= leftpad[:, None])[:, None, None] if self.padded else None
        layers = model.config.num_hidden_layers
        cached = config.cache != "none"
        self.cache = WindowCache(layers, rows, length, leftpad) if cached else None
        self.backbone = Backbone(model, length)

    def read(self) -> list[list[int]]:
        """The host's one look between steps: a row of numbers for each batch row."""
        s = self.state
        held = (s.position >= 0).sum(-1)
        columns = (s.done, s.failed, s.refresh, s.start, s.end, s.prefix, held)
        return torch.stack([c.int() for c in columns], dim=1).tolist()

    def full(self, rows: Tensor | None, keep: Tensor) -> Tensor:
        """Every position, K/V stored anew where there is a cache: rows `keep` (b, K, E)."""
        ids = self.canvas if rows is None else self.canvas[rows]
        if self.cache is not None:
            zeros = ids.new_zeros(ids.shape[0])
            self.cache.point(rows, zeros, zeros + ids.shape[1])
        return self.forward(ids, self.index.expand_as(ids), keep, rows)

    def window(
        self, rows: Tensor | None, first: Tensor, last: Tensor, width: int, keep: Tensor
    ) -> Tensor:
        """Canvas rows [first, last) of each batch row, padded to `width`: rows `keep` (b, K, E)."""
        length = self.canvas.shape[1]
        index = first[:, None] + self.index[:width]
        canvas = self.canvas if rows is None else self.canvas[rows]
        self.cache.point(rows, first, last - first, width)
        index = index.clamp(max=length - 1)
        return self.forward(canvas.gather(1, index), index, keep, rows)

    def forward(self, ids: Tensor, index: Tensor, keep: Tensor, rows: Tensor | None) -> Tensor:
        """Tokens `ids` (b, W) at canvas `index` (b, W) through the backbone."""
        leftpad = self.leftpad if rows is None else self.leftpad[rows]
        mask = self.key_mask if rows is None or not self.padded else self.key_mask[rows]
        position_ids = (index - leftpad[:, None]).clamp(min=0)
        return self.backbone(ids, position_ids, keep, mask, self.cache)

    def step(
        self, kind: str, rows: Tensor | None, width: int, held: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward of batch `rows` (None for all) and its commit. No host read.

        `width`: rows of the widest window; `held`: candidates of the row that has most.
        Returns candidates (B, K), commits (B, K) and confidences (B, K).
        """
        state = self.state
        take = (lambda t: t) if rows is None else (lambda t: t[rows])
        position = take(state.position)[:, :held].long()
        # The row that predicts a position: its own, or the one before it (row 0 keeps its own).
        source = (position - int(self.info.family.shift)).clamp(min=0)
        if kind == "refresh":
            hidden = self.full(rows, source)
        else:
            first = (take(state.start) - take(state.prefix)).long()
            keep = (source - first[:, None]).clamp(min=0)
            hidden = self.window(rows, first, take(state.end).long(), width, keep)
        eligible = position >= 0
        token, confidence = propose(
            hidden.flatten(0, 1),
            self.model.lm_head,
            eligible.flatten(),
            self.config,
            self.info,
            self.generator,
        )
        shape = state.position.shape
        all_tokens = self.canvas.new_zeros(shape)
        all_confidence = torch.zeros(shape, dtype=torch.float32, device=self.canvas.device)
        active = torch.ones_like(state.done) if rows is None else torch.zeros_like(state.done)
        where = slice(None) if rows is None else rows
        all_tokens[where, :held] = token.view_as(position)
        all_confidence[where, :held] = confidence.view_as(position)
        active[where] = True
        candidates = state.position.clone()
        commit = unmask_and_slide(
            self.canvas, all_tokens, all_confidence, state, active, self.leftpad, self.spec
        )
        return candidates, commit, all_confidence


def count_tokens(response: Tensor, eos_ids: tuple[int, ...]) -> list[int]:
    """Per row: positions up to and including the first EOS. response: (B, G)."""
    length = response.shape[1]
    index = torch.arange(length, device=response.device)
    eos = torch.isin(response, torch.tensor(eos_ids, device=response.device, dtype=torch.int64))
    return (torch.where(eos, index, length - 1).amin(-1) + 1).tolist()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    **settings: Any,
) -> GenerationOutput:
    """Decode `gen_length` positions after each prompt with DSB and DSB Cache (arXiv 2602.05992).

    Args:
        model: from `load_model`.
        input_ids: (B, P) int64 or int32 on the model's device, left-padded where lengths differ.
        config: the settings; or name its fields as keyword arguments, not both.
        attention_mask: (B, P), 0 for left padding; None means none.
        generator: source of randomness at temperature > 0; the same seed gives the same tokens.
        on_step: called after every forward with a `StepEvent`.

    Returns:
        `GenerationOutput`: sequences, forwards, tokens committed by each forward.

    Raises:
        TypeError, ValueError: bad input, before any compute; the message names argument, value and
            what is accepted.
        FloatingPointError: the model's logits are NaN; the message names the step and the row.
    """
    if config is not None and settings:
        raise TypeError(f"config and {sorted(settings)[0]}: expected settings in one of the two")
    if config is None:
        unknown = sorted(set(settings) - set(DecodingConfig.__dataclass_fields__))
        if unknown:
            accepted = ", ".join(DecodingConfig.__dataclass_fields__)
            raise TypeError(f"{unknown[0]}={settings[unknown[0]]!r}: expected one of {accepted}")
        config = DecodingConfig(**settings)
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step={on_step!r}: expected a callable that takes a StepEvent, or None")
    info = check_model(model)
    check_family_settings(info, config)
    check_prompt(model, input_ids, info, config)
    leftpad = check_attention_mask(input_ids, attention_mask)
    check_no_masks(input_ids, leftpad, info)
    check_generator(generator, input_ids.device)

    decoder = Decoder(model, input_ids, leftpad, config, info, generator)
    batch = input_ids.shape[0]
    commits: list[Tensor] = []
    row_nfe = [0] * batch
    while True:
        flags = decoder.read()
        failed = [row for row, flag in enumerate(flags) if flag[1]]
        if failed:
            raise FloatingPointError(
                f"step {len(commits) - 1}: the model's logits are NaN (row {failed[0]})"
            )
        live = [row for row, flag in enumerate(flags) if not flag[0]]
        if not live:
            break
        for kind in ("refresh", "window"):
            group = [row for row in live if bool(flags[row][2]) == (kind == "refresh")]
            if not group:
                continue
            rows = torch.tensor(group, device=input_ids.device) if len(group) < batch else None
            before = [(flags[row][3], flags[row][4], flags[row][5]) for row in group]
            width = max(end - start + prefix for start, end, prefix in before)
            held = max(flags[row][6] for row in group)
            candidates, commit, confidence = decoder.step(kind, rows, width, held)
            commits.append(commit.sum())
            for row in group:
                row_nfe[row] += 1
            if on_step is not None:
                on_step(
                    StepEvent(
                        len(commits) - 1, kind, group, before, decoder.canvas,
                        candidates, commit, confidence, decoder.state,
                    )
                )  # fmt: skip
    prompt = input_ids.shape[1]
    return GenerationOutput(
        sequences=decoder.canvas,
        nfe=len(commits),
        tokens_per_forward=torch.stack(commits).tolist(),
        row_nfe=row_nfe,
        row_tokens=count_tokens(decoder.canvas[:, prompt:], info.eos_ids),
    )

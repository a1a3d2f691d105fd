"""What a call returns, and what `on_step` is called with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsb_kernels.rows import Row
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.drafts import NO_DRAFTS, Drafts
from dsb_runtime.families import DiffusionInfo


@dataclass
class GenerationOutput:
    """What `generate` returns for B rows with P prompt and G response positions each, and `infill`
    for B rows of L positions."""

    sequences: Tensor  # (B, P + G) or (B, L) int64, with the left padding
    nfe: int  # how many forwards ran
    tokens_per_forward: list[int]  # how many tokens each forward committed, over all rows
    row_nfe: list[int]  # how many forwards each row took part in
    row_tokens: list[int]  # how many masks of each row were filled, to its first EOS inclusive, or
    # to the token that completes a stop string
    drafts: Drafts = NO_DRAFTS  # how many were run and accepted; see the setting `drafts`
    # With `record`, of each response position, (B, G), or for `infill` of each position, (B, L):
    step_map: Tensor | None = None  # int32, in which of its row's steps (the first is 0) its token
    # was committed; -1 where no step did that, or after the EOS or the stop string at which the row
    # stopped
    logprobs: Tensor | None = None  # float32, the log-probability of that token in that step,
    # under the model's own distribution (without temperature, cuts and banned tokens); 0 where
    # step_map is -1


@dataclass
class StepEvent:
    """One step, after its commit. `on_step` is called with it. Its tensors are copies, which the
    caller may keep and change. A confidence is the number by which candidates were ranked: for
    Dream, whose published code ranks so, it follows temperature, top_p and top_k; for LLaDA it does
    not."""

    index: int  # how many steps came before this one
    kind: str  # "refresh" (every position), "response" (without the prompt) or "window"
    rows: list[int]  # the batch rows that took part
    before: list[tuple[int, int, int]]  # their (start, end, prefix) in this step
    canvas: Tensor  # (B, L) after the commit
    position: Tensor  # (B, K) the candidates of this step, then -1
    commit: Tensor  # (B, K) bool, whether each candidate was committed
    confidence: Tensor  # (B, K) the confidence of each candidate, 0 where none was scored
    table: list[Row]  # every batch row as it is now: its block, and what it needs next
    draft: bool = False  # whether the step ran in the forward of the step before it


def until_eos(canvas: Tensor, masked: Tensor, eos_ids: tuple[int, ...]) -> Tensor:
    """Which of the positions `masked` (B, L) bool each row of the canvas has up to and including
    its response's first EOS. A row without an EOS has all of them."""
    eos = torch.isin(canvas, torch.tensor(eos_ids, device=canvas.device, dtype=torch.int64))
    eos &= masked.cumsum(-1) > 0  # an EOS of the prompt ends nothing
    before = eos.cumsum(-1) - eos.int() == 0
    return masked & before


def make_output(
    sequences: Tensor,
    masked: Tensor,
    config: DecodingConfig,
    info: DiffusionInfo,
    commits: list[int],
    row_nfe: list[int],
    record: tuple[Tensor, Tensor] | None,
    *,
    drafts: Drafts = NO_DRAFTS,
    ends: bool = True,
) -> GenerationOutput:
    """The output of rows that are done.

    Args:
        sequences: (B, L) their tokens.
        masked: (B, L) bool, the positions that they have filled. With stop strings, those before a
            row's end.
        commits: how many tokens each forward has committed.
        record: the step and the log-probability of each token, (B, R) for the last R positions.
        ends: whether an EOS ends a response.
    """
    counted = until_eos(sequences, masked, info.eos_ids if ends else ())
    output = GenerationOutput(
        sequences=sequences,
        nfe=len(commits),
        tokens_per_forward=commits,
        row_nfe=row_nfe,
        row_tokens=counted.sum(-1).tolist(),
        drafts=drafts,
    )
    if record is not None:
        step_map, logprobs = record
        recorded = (counted if config.stop_at_eos else masked)[:, -step_map.shape[1] :]
        output.step_map = torch.where(recorded, step_map, -1)
        output.logprobs = torch.where(recorded, logprobs, 0)
    return output

"""Deliberate mistakes in window_attention's kernels, each of which a test must catch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dsb_kernels.attention_kernel as module
from tests.mutations import assert_caught
from tests.test_window_attention import CASES

MUTATIONS = {
    # kernel, case, what stands there, the mistake
    "window_start": ("attention", "start_middle_end", "minimum(window_start, ", "minimum(1 + W, "),
    "window_end": (
        "attention",
        "start_middle_end",
        "after, after_end = ",
        "after, after_end = 1 + ",
    ),
    "end_of_a_block": ("attention", "left_padding", "offset < stop - n0", "offset <= stop - n0"),
    "second_range": ("attention", "many_keys", "(j - n_before)", "j"),
    "gap_read": ("attention", "gap", "window_start <= seqlen", "window_start >= 0"),
    "window_cut": ("attention", "ends_in_window", "maximum(window_end, seqlen)", "abs(seqlen)"),
    "listed_window_start": ("attention", "lists", "window_start - n0)", "window_start - n0 + 1)"),
    "listed_window_end": ("attention", "lists", "hole >= ", "hole > "),
    "listed_padding": ("attention", "lists_padded", "leftpad - n0)", "0)"),
    "negative_scale": ("attention", "negative_scale", "scale < 0", "scale < -1e9"),
    "padding_in_window": ("attention", "left_padding_in_window", "leftpad - window_start", "0"),
    "index_ignored": ("attention", "cache_rows", "tl.load(batch_idx_ptr + b)", "(b)"),
    "last_block_dropped": ("attention", "many_keys", "n_blocks)\n", "n_blocks - 1)\n"),
    "head_dropped": ("attention", "gqa_7", "row % GROUP\n", "row % (GROUP - 1)\n"),
    "no_rescaling": ("attention", "many_keys", "acc * decay[:, None]", "acc"),
    "fresh_values": ("attention", "gqa_4", "tl.where(fresh, vw_ptr, vc_ptr)", "vc_ptr"),
    "list_part": ("attention", "lists_of_large_blocks", "j % part * BLOCK_N", "0 * BLOCK_N"),
    "split_dropped": ("combine", "splits", "weight = ", "weight = (split > 0) * "),
    "unweighted": ("combine", "splits", "to(tl.float32) * weight[:, None]", "to(tl.float32)"),
    "window_length": ("combine", "splits", "window_row < tl.load", "window_row + 1 < tl.load"),
    "rows_swapped": ("combine", "splits", "(row // W)", "(H - 1 - row // W)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_caught(mutation: str) -> None:
    kernel, name, old, new = MUTATIONS[mutation]
    case = replace(CASES[name], in_cache=mutation in ("gap_read", "window_cut"))
    assert_caught(case.check, module, f"_{kernel}_kernel", old, new)


def test_rounded_scores_are_caught() -> None:
    """Which float32, having nothing to round, could not show."""
    check = replace(CASES["many_keys"], dtype=torch.bfloat16).check
    rounded = "tl.exp2(scores.to(k.dtype).to(tl.float32) * scale"
    assert_caught(check, module, "_attention_kernel", "tl.exp2(scores * scale", rounded)

"""The course of 6 x 6 Sudoku: every grid is masked at random, as in LLaDA's training.

The order in which a decoder fills a grid is then free: what it is sure of depends on the puzzle and
on what it has filled, not on the place.
"""

from __future__ import annotations

import random

import torch
from transformers import PreTrainedTokenizerFast

from dsb_runtime.demo import sudoku
from dsb_runtime.demo.tokenizer import build_sudoku_tokenizer, chat_text
from tools.embedded_model.course import Batch, Course, Settings


def make_batch(settings: Settings, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch:
    """The batch of step `step`. Each row is masked with its own probability, and each row's loss is
    the mean over its masks: a row with few masks counts as much as one with many."""
    rng = random.Random(f"{settings.seed} {step}")
    items = [sudoku.puzzle(rng.getrandbits(60)) for _ in range(settings.batch_size)]
    prompts = torch.tensor(tokenizer([chat_text(item.prompt) for item in items])["input_ids"])
    grids = torch.tensor(tokenizer([item.response for item in items])["input_ids"])
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    share = torch.rand(len(grids), 1, generator=generator)
    masked = torch.rand(grids.shape, generator=generator) < share
    weights = masked / masked.sum(-1, keepdim=True).clamp_min(1)
    filled = grids.masked_fill(masked, tokenizer.mask_token_id)
    return Batch(torch.cat([prompts, filled], dim=1), grids, weights)


COURSE = Course(
    settings=Settings("sudoku", steps=6000, batch_size=64, mlp=384),
    gen_length=sudoku.CELLS,
    tokenizer=build_sudoku_tokenizer,
    batch=make_batch,
)

"""The course of word problems: one step first, then two, then up to six."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsb_runtime.demo import problems
from dsb_runtime.demo.tokenizer import build_tokenizer, chat_text
from tools.embedded_model.course import Batch, Course, Settings

CANVAS = 96  # tokens of the longest response in training; decoding should not ask for more


def initial_embeddings(tokenizer: PreTrainedTokenizerFast, vocab: int, hidden: int) -> Tensor:
    """Random entries, but numbers start on circles of several periods. (vocab, hidden).

    Adding there is rotating, which a gated MLP can compute, whereas from random vectors it would
    have to learn the whole addition table by heart.
    """
    words = torch.randn(vocab, hidden)
    numbers = torch.arange(problems.MAX_TOTAL + 1)
    periods = torch.tensor([2.0, 5.0, 10.0, 20.0, 25.0, 50.0, 100.0, 200.0])
    angles = 2 * torch.pi * numbers[:, None] / periods
    circles = torch.cat([angles.cos(), angles.sin()], dim=1)  # (numbers, 2 * periods)
    spread = torch.randn(circles.shape[1], hidden) / len(periods) ** 0.5
    ids = torch.tensor(tokenizer.convert_tokens_to_ids([str(n) for n in numbers.tolist()]))
    words[ids] = 0.9 * circles @ spread + 0.4 * words[ids]
    return words


def step_count(progress: float, rng: random.Random) -> int:
    """How many steps the problems of a batch have after this share of the run."""
    if progress < 0.06:
        return 1
    if progress < 0.12:
        return rng.randint(1, 2)
    return rng.randint(1, problems.MAX_STEPS)


def canvas_length(solution: int, rng: random.Random) -> int:
    """The response positions of a batch: the solution, and EOS tokens after it.

    If responses were never much longer than the solution, decoding a long one would be out of
    distribution and every answer would fail. Long ones cost time, so that half of the batches have
    only a few EOS.
    """
    kind = rng.random()
    if kind < 0.5:
        return solution + rng.randint(1, 8)
    if kind < 0.75:
        return rng.randint(solution + 1, CANVAS)
    return 64 if kind < 0.9 else CANVAS


def make_batch(settings: Settings, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch:
    """The batch of step `step`, drawn from the seed and the step's number alone."""
    rng = random.Random(f"{settings.seed} {step}")
    count = step_count(step / settings.steps, rng)
    seeds = [rng.getrandbits(60) for _ in range(settings.batch_size)]
    items = [problems.problem(seed, "train", count) for seed in seeds]
    prompts = torch.tensor(tokenizer([chat_text(item.prompt) for item in items])["input_ids"])
    solutions = torch.tensor(tokenizer([item.response for item in items])["input_ids"])
    length = canvas_length(solutions.shape[1], rng)
    canvas = torch.full((settings.batch_size, length), tokenizer.eos_token_id)
    canvas[:, : solutions.shape[1]] = solutions
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    masked, weights = mask_canvas(canvas.shape, count, rng, generator)
    filled = canvas.masked_fill(masked, tokenizer.mask_token_id)
    return Batch(torch.cat([prompts, filled], dim=1), canvas, weights)


def mask_canvas(
    shape: torch.Size, count: int, rng: random.Random, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Which response positions to mask, and the weight of each in the loss; both `(B, C)`.

    A third of the batches is masked as in LLaDA's training: each position with the probability of
    its row. That alone would teach the model to copy a total from the step after it, which it never
    sees when it decodes, rather than to compute it. The other batches are masked as decoding meets
    them. A row is known up to a random cut. Behind the cut either everything is masked, or all
    running totals are, and any share of the words between them.
    Weights depend on positions and never on tokens, so that confidences stay calibrated.
    """
    rows, length = shape
    position = torch.arange(length)
    share = torch.rand(rows, 1, generator=generator)
    noise = torch.rand(shape, generator=generator) < share
    kind = rng.randrange(3)
    if kind == 0:
        return noise, noise.float()
    end = count * problems.STEP_TOKENS + 4  # the solution, "Answer 28 ." and its EOS
    cut = torch.randint(0, end, (rows, 1), generator=generator)
    behind = position >= cut
    if kind == 1:
        masked = behind.expand(shape)
    else:
        offset = position % problems.STEP_TOKENS
        totals = torch.isin(offset, torch.tensor(problems.TOTAL_OFFSETS)) & (position < end)
        masked = behind & (noise | totals)
    # One forward can know about one step more; what lies beyond teaches less.
    near = position < cut + 10
    return masked, masked * torch.where(near, 1.0, 0.2)


COURSE = Course(
    settings=Settings("words", steps=7000),
    gen_length=64,
    tokenizer=build_tokenizer,
    batch=make_batch,
    embeddings=initial_embeddings,
)

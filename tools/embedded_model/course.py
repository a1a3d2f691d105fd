"""What the training of an embedded model is made of: settings, tokenizer and batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Settings:
    """All that a run's weights depend on."""

    course: str
    steps: int
    seed: int = 0
    batch_size: int = 32
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200


@dataclass(frozen=True)
class Batch:
    """Problems of one length, of which C response positions are to be predicted."""

    input_ids: Tensor  # (B, L) int64, the canvas: prompts, and responses with masks
    targets: Tensor  # (B, C) int64, the responses without masks
    weights: Tensor  # (B, C) float32, 0 where nothing is to be predicted


def random_embeddings(tokenizer: PreTrainedTokenizerFast, vocab: int, hidden: int) -> Tensor:
    """Random entries of unit variance, (vocab, hidden)."""
    return torch.randn(vocab, hidden)


@dataclass(frozen=True)
class Course:
    """One embedded model's training."""

    settings: Settings
    gen_length: int  # what the exported generation config proposes
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    # The batch of a step, drawn from the seed and the step's number alone.
    batch: Callable[[Settings, PreTrainedTokenizerFast, int], Batch]
    # The start of embeddings and LM head, (vocab, hidden), with entries of about unit variance. The
    # LM head starts as a multiple of the embeddings, so that copying a token works at once.
    embeddings: Callable[[PreTrainedTokenizerFast, int, int], Tensor] = random_embeddings

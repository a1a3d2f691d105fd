"""Log-likelihood of a text under a masked diffusion model, by Monte Carlo.

log p(text | prompt) >= E over l uniform in 1..L and sets of l masked positions, uniform without
replacement, of L / l * sum over the masked positions of log p(token | prompt, text so masked):
LLaDA's equation (arXiv 2502.09992, section 2.4), with L the text's length. The bound is what these
models are compared by.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_runtime.engine.engine import generate
from dsb_runtime.families import check_model

# The logits of so many positions are in memory at once; 126464 each take 130 MB in float32.
HEAD_POSITIONS = 256


@dataclass(frozen=True)
class Scored:
    """A text to score after a prompt, as token ids; neither is empty."""

    prompt: tuple[int, ...]
    text: tuple[int, ...]


def seed_of(item: Scored, seed: int) -> int:
    """The seed of an item's masks, which no order, batch or number of processes changes."""
    ids = torch.tensor([seed, len(item.prompt), *item.prompt, *item.text])
    return zlib.crc32(ids.numpy().tobytes())  # torch's CPU generator takes 32 bits of a seed


def draw_masks(length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the masks of a text and their weights in the estimate; equal masks are merged.

    The numbers of masked positions are drawn systematically: they stand at even distances in
    1..length behind one random offset. Each draw is uniform, and together they cover the range.

    Returns:
        (m, length) bool, each mask with at least one True, and (m,) float64: the sum of
        length / masked / samples over the draws of that mask. m <= samples.
    """
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    steps = (torch.arange(samples, dtype=torch.float64) + offset) / samples
    masked = 1 + (steps * length).long().clamp(max=length - 1)
    # The rank of each position in a random order; the first `masked` of them are masked.
    order = torch.rand((samples, length), generator=generator, dtype=torch.float64).argsort(-1)
    masks, counts = (order < masked[:, None]).unique(dim=0, return_counts=True)
    return masks, counts * length / masks.sum(-1) / samples


@torch.no_grad()
def masked_log_probs(
    model: PreTrainedModel, items: Sequence[Scored], masks: Sequence[Tensor]
) -> list[float]:
    """For each item, the sum of log p(token) over the text's masked positions.

    Args:
        items: prompts and texts of any lengths; they become one batch, padded on the left.
        masks: a mask for each item, (length of the text,) bool.
    """
    info, device = check_model(model), model.device
    ids, exists = left_pad([item.prompt + item.text for item in items])
    masked = torch.zeros_like(exists, dtype=torch.bool)
    for i, (item, mask) in enumerate(zip(items, masks, strict=True)):
        masked[i, -len(item.text) :] = mask
    target = ids[masked].to(device)
    row, column = masked.nonzero(as_tuple=True)
    ids[masked] = info.mask_id
    source = column - int(info.family.shift)  # the position whose logits predict the token
    position_ids = (exists.cumsum(-1) - 1).clamp(min=0)
    hidden = model.model(
        input_ids=ids.to(device), attention_mask=None if exists.all() else exists.to(device),
        position_ids=position_ids.to(device), use_cache=False,
    ).last_hidden_state[row.to(device), source.to(device)]  # fmt: skip
    parts = []
    for part, tokens in zip(
        hidden.split(HEAD_POSITIONS), target.split(HEAD_POSITIONS), strict=True
    ):
        log_probs = model.lm_head(part).float().log_softmax(-1)
        parts.append(log_probs.gather(1, tokens[:, None])[:, 0])
    log_prob = torch.cat(parts).double().cpu()
    return torch.zeros(len(items), dtype=torch.float64).index_add(0, row, log_prob).tolist()


def log_likelihoods(
    model: PreTrainedModel,
    items: Sequence[Scored],
    *,
    samples: int = 128,
    seed: int = 0,
    batch_size: int = 1,
    known: dict[int, float] | None = None,
    on_done: Callable[[int, float], None] | None = None,
) -> list[float]:
    """The Monte-Carlo estimate for every item, which depends on the seed and not on the batch.

    Args:
        samples: number of masks for each item; equal ones are computed once.
        batch_size: masked texts in one forward, of one item or several.
        known: estimates by the index of their items, which are not made again. Those of the other
            items are added as they are finished.
        on_done: called with the index and the estimate of each item that is finished.
    """
    # The longest items come first, so that batches have little padding and a batch that does not
    # fit into memory fails at once.
    known = {} if known is None else known
    order = [i for i in range(len(items)) if i not in known]
    order.sort(key=lambda i: -len(items[i].prompt) - len(items[i].text))
    left: dict[int, int] = {}

    def masked_texts() -> Iterator[tuple[int, Tensor, float]]:
        for i in order:
            masks, weights = draw_masks(len(items[i].text), samples, seed_of(items[i], seed))
            left[i] = len(masks)
            for mask, weight in zip(masks, weights.tolist(), strict=True):
                yield i, mask, weight

    total, stream = [0.0] * len(items), masked_texts()
    while batch := list(itertools.islice(stream, batch_size)):
        index, masks, weights = zip(*batch, strict=True)
        log_probs = masked_log_probs(model, [items[i] for i in index], masks)
        for i, weight, log_prob in zip(index, weights, log_probs, strict=True):
            total[i] += weight * log_prob
            left[i] -= 1
        for i in dict.fromkeys(index):
            if left[i] == 0:
                known[i] = total[i]
                if on_done is not None:
                    on_done(i, total[i])
    return [known[i] for i in range(len(items))]


def by_text_length(items: Sequence[Scored]) -> dict[int, list[int]]:
    """The indices of the items by the length of their text, the longest prompts first: in the order
    in which `log_likelihoods` finishes those of one length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for i in sorted(range(len(items)), key=lambda i: -len(items[i].prompt)):
        groups[len(items[i].text)].append(i)
    return groups


def are_greedy(
    model: PreTrainedModel, items: Sequence[Scored], *, batch_size: int = 1
) -> list[bool]:
    """Whether decoding as many tokens as the text has, one in each step, returns the text."""
    greedy = [False] * len(items)
    device = model.device
    for length, members in by_text_length(items).items():
        for first in range(0, len(members), batch_size):
            part = members[first : first + batch_size]
            ids, mask = left_pad([items[i].prompt for i in part])
            out = generate(
                model, ids.to(device), attention_mask=mask.to(device), gen_length=length,
                block_length=length, steps=length, cache="none", stop_at_eos=False,
            )  # fmt: skip
            for i, row in zip(part, out.sequences[:, ids.shape[1] :].tolist(), strict=True):
                greedy[i] = tuple(row) == items[i].text
    return greedy


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, P) ids and their attention mask; padding is never attended to."""
    ids = torch.zeros((len(prompts), max(map(len, prompts))), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :] = torch.tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return ids, mask

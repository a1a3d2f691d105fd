"""The golden checkpoints and trajectories in `tests/data`, tiny random models of both families, and
helpers for tests of decoding."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import dsb_runtime as dsb
from tests.mutations import kernels

DATA = Path(__file__).parent / "data"
FAMILIES = ("llada", "dream")


@functools.cache
def model(family: str) -> PreTrainedModel:
    return dsb.load_model(DATA / family, dtype="float32", device="cpu")


@functools.cache
def cases(family: str) -> list[dict[str, Any]]:
    return json.loads((DATA / family / "trajectories.json").read_text())


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """`generate`'s arguments for one trajectory."""
    method, rule = case["method"], case["rule"]
    cache_policy = "dual" if method == "dual_cache" else "dsb" if "cache" in method else "none"
    values: dict[str, Any] = {
        "gen_length": case["gen_length"],
        "block_length": case["block_length"],
        "schedule": "dsb" if method.startswith("dsb") else "naive",
        "cache": cache_policy,
        "stop_at_eos": False,
        {"quota": "steps"}.get(rule, rule): case["steps"] if rule == "quota" else case[rule],
    }
    if method.startswith("dsb") and case["max_block_length"] > 0:
        values["max_block_length"] = case["max_block_length"]
    if cache_policy == "dsb":
        values["prefix_window"] = case["prefix_window"]
    return values


def check_logprobs(values: Tensor | None, expected: Tensor | None) -> None:
    """Log-probabilities of float32 models that another order of sums has computed. The order
    depends on the batch and the machine: 1.2e-5 was seen, and guidance multiplies a difference."""
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)


CASES = [(family, i) for family in FAMILIES for i in range(len(cases(family)))]


def shortest(family: str, method: str) -> tuple[str, int]:
    """The case of a method with the fewest forwards (the interpreter is slow)."""
    ours = [i for i, case in enumerate(cases(family)) if case["method"] == method]
    length = {i: (cases(family)[i]["nfe"] or 99, len(cases(family)[i]["sequence"])) for i in ours}
    return family, min(ours, key=length.__getitem__)


def one_of_each(family: str) -> list[dict[str, Any]]:
    """The first case of every method and rule."""
    first = {(case["method"], case["rule"]): case for case in reversed(cases(family))}
    return list(first.values())


Generate = Callable[..., dsb.GenerationOutput]  # (input_ids, config or settings)


def generate_of(family: str) -> Generate:
    return functools.partial(dsb.generate, model(family))


def check_trajectory(
    generate: Generate, family: str, index: int, device: str = "cpu"
) -> dsb.GenerationOutput:
    """A trajectory is decoded as the authors' code did: the same tokens in the same forwards."""
    case = cases(family)[index]
    out = generate(torch.tensor([case["prompt"]], device=device), **settings(case))
    assert out.sequences[0].tolist() == case["sequence"]
    assert sum(out.tokens_per_forward) == case["gen_length"]
    assert case["nfe"] in (None, out.nfe)
    assert case.get("tokens_per_forward") in (None, out.tokens_per_forward)
    return out


def check_kernels(generate: Generate, family: str, method: str, blocks: int = 1) -> None:
    """A response of a few blocks by kernels has the tokens, and takes the forwards, of the
    definitions."""
    case = cases(family)[shortest(family, method)[1]]
    short = {"gen_length": 4 * blocks, "block_length": 4, "steps": 2 * blocks}
    arguments = {k: v for k, v in settings(case).items() if k in ("schedule", "cache")} | short
    ids = torch.tensor([case["prompt"][:7]])
    expected = generate_of(family)(ids, **arguments)
    with kernels():
        out = generate(ids, **arguments)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.tokens_per_forward == expected.tokens_per_forward


def prompts(count: int, seed: int = 0) -> list[Tensor]:
    """Random prompts of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 500, (5 + 9 * i,), generator=generator) for i in range(count)]


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts side by side, (B, P), and their attention mask."""
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    return pad(rows, padding_value=1), pad([torch.ones_like(row) for row in rows])


def check_batch(
    generate: Generate, alone_by: Generate, rows: list[Tensor], **settings: Any
) -> dsb.GenerationOutput:
    """Every row of a decoded batch is what its prompt gets alone."""
    ids, mask = left_pad(rows)
    batch, gen = generate(ids, attention_mask=mask, **settings), settings["gen_length"]
    for i, row in enumerate(rows):
        alone = alone_by(row[None], **settings)
        assert batch.sequences[i, -gen:].tolist() == alone.sequences[0, -gen:].tolist()
        assert batch.row_nfe[i] == alone.nfe
        assert batch.row_tokens[i] == alone.row_tokens[0]
    assert torch.equal(batch.sequences[:, :-gen], ids)
    assert len(batch.tokens_per_forward) == batch.nfe
    return batch


@torch.no_grad()
def one_by_one(
    family: str, prompt: Sequence[int], length: int, confidence: str = "probability"
) -> list[int]:
    """A response from one block without a cache, by transformers' own forward: each step commits
    the best candidate of all."""
    network, mask = model(family), model(family).dsb.mask_id
    ids = torch.tensor([*prompt, *[mask] * length])
    while (masked := (ids == mask).nonzero()[:, 0]).numel():
        p = network(ids[None]).logits[0].double().softmax(-1)
        p = p[masked - int(network.dsb.family.shift)]
        allowed = p.clone()
        allowed[:, mask] = 0
        best, token = allowed.topk(2)
        score = {
            "probability": best[:, 0],
            "margin": best[:, 0] - best[:, 1],
            "entropy": p.xlogy(p).sum(-1),
        }[confidence]
        chosen = score.argmax()
        ids[masked[chosen]] = token[chosen, 0]
    return ids[len(prompt) :].tolist()


@contextlib.contextmanager
def refusal(*said: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """What runs inside raises `kind` with a message of one line that holds every one of `said`."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


BIAS = {"llada": 16.0, "dream": 9.0}  # EOS then ends some answers early, not all at once


@contextlib.contextmanager
def biased_to_eos(family: str) -> Iterator[PreTrainedModel]:
    """The golden model with its LM head moved towards EOS, so that answers end early."""
    biased, original = model(family), model(family).lm_head
    biased.lm_head = copy.deepcopy(original)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    biased.lm_head.bias.data[biased.dsb.eos_ids[0]] = BIAS[family]
    try:
        yield biased
    finally:
        biased.lm_head = original

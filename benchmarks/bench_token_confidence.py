"""token_confidence against its definition, eager and compiled, and the float64 eager scoring.

    python -m pytest benchmarks/bench_token_confidence.py

"op" is the public function: the Triton kernel on a GPU, the definition on a CPU. "float64" is what
the published decoding loops do: softmax over the vocabulary in float64, argmax, gather. Results are
compared with the definition's before they are timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.measure import Call, Make, compiled, device, low_precision, on_gpu, run
from dsb_kernels.token_confidence import token_confidence, token_confidence_reference

if on_gpu():
    VOCABULARIES = (126464, 155136, 152064)  # LLaDA-8B, iLLaDA-8B, Dream-7B
    SHAPES = [(rows, V, "probability", 0.0) for V in VOCABULARIES for rows in (32, 64, 256, 1024)]
    SHAPES += [(4096, 126464, "probability", 0.0)]
    SHAPES += [(64, 126464, c, 0.0) for c in ("margin", "entropy")]
    SHAPES += [(rows, 126464, "probability", 1.0) for rows in (64, 1024)]
else:
    SHAPES = [
        (8, 3000, "probability", 0.0),
        (8, 3000, "margin", 0.0),
        (8, 3000, "probability", 1.0),
    ]

Scored = tuple[Tensor, Tensor]


class Rows:
    """Logits of a step; the mask token near the end of the vocabulary is banned."""

    def __init__(self, rows: int, V: int, confidence: str, temperature: float) -> None:
        torch.manual_seed(0)
        self.logits = (3 * torch.randn(rows, V, device=device())).to(low_precision())
        self.banned, self.confidence, self.temperature = (V - 128,), confidence, temperature
        self.seed = torch.tensor(1, device=device())
        self.ids = torch.arange(rows, device=device())

    def op(self) -> Scored:
        return token_confidence(
            self.logits, banned=self.banned, temperature=self.temperature, seed=self.seed,
            noise_ids=self.ids, confidence=self.confidence,
        )  # fmt: skip

    def definition(self, scoring: Callable[..., Scored] = token_confidence_reference) -> Scored:
        return scoring(
            self.logits, banned=self.banned, temperature=self.temperature, seed=self.seed,
            noise_ids=self.ids, confidence=self.confidence,
        )  # fmt: skip

    def float64(self) -> Scored:
        p = self.logits.to(torch.float64).softmax(-1)
        scores = p.clone()
        scores[:, self.banned[0]] = -1.0
        token = scores.argmax(-1)
        return token, p.gather(-1, token[:, None])[:, 0]


Shape = tuple[int, int, str, float]  # rows, vocabulary, confidence, temperature


def maker(shape: Shape, contender: str) -> Make:
    if contender == "definition compiled":
        scoring = compiled(token_confidence_reference)
        return lambda: Call(functools.partial(Rows(*shape).definition, scoring))
    return lambda: Call(getattr(Rows(*shape), contender))


def bytes_needed(shape: Shape) -> int:
    rows, V, *_ = shape
    return rows * (V * low_precision().itemsize + 12)


@pytest.mark.parametrize("contender", ["op", "definition", "definition compiled", "float64"])
@pytest.mark.parametrize(("rows", "V", "confidence", "temperature"), SHAPES)
def test_score(
    benchmark, rows: int, V: int, confidence: str, temperature: float, contender: str
) -> None:
    if contender == "float64" and (confidence, temperature) != ("probability", 0.0):
        pytest.skip("the float64 scoring is greedy and gives a probability")
    shape = (rows, V, confidence, temperature)
    make = maker(shape, contender)
    expected, found = Rows(*shape).definition(), make().run()
    # Equal scores may round apart where the arithmetic is another one.
    share = 1.0 if contender == "definition" else 0.95
    assert (found[0] == expected[0]).float().mean() >= share
    same = found[0] == expected[0]
    torch.testing.assert_close(
        found[1][same].float(), expected[1][same].float(), rtol=1e-3, atol=1e-5
    )
    benchmark.group = f"{confidence}{' sampled' if temperature else ''} {rows} rows V={V}"
    run(benchmark, make, bytes_needed=bytes_needed(shape))

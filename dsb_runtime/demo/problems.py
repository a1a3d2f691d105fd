"""Arithmetic word problems with their solutions in words; a seed makes each of them.

A problem starts from a number of things and changes it on the first one to six days of a week:

    Mia has 12 apples. Monday she finds 7. Tuesday she loses 5. Wednesday she doubles them.
    How many apples now?

    Monday 12 + 7 = 19. Tuesday 19 - 5 = 14. Wednesday 14 * 2 = 28. Answer 28.

The prompt determines the solution word for word: a free choice of words would cap the confidence
of a decoder that has nothing to be unsure about. The steps are unevenly hard: a day on which
nothing happens and a change by 1 or 10 are nearly free, other changes are looked up in an addition
table, and each step needs the total of the one before.

Every prompt of `k` steps has the same number of words, and so has every solution: batches of one
`k` need no padding.
"""

from __future__ import annotations

import itertools
import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

MAX_STEPS = 6
MAX_TOTAL = 99
STEP_TOKENS = 7  # "Monday 12 + 7 = 19 ." is seven tokens
TOTAL_OFFSETS = (1, 5)  # where a step holds a running total: "12" and "19" above
EOS_TEXT = "<|endoftext|>"

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
PRONOUNS = {
    "Mia": "she", "Ana": "she", "Zoe": "she", "Lea": "she", "Eva": "she", "Ida": "she",
    "Nora": "she", "Ruth": "she", "Tom": "he", "Ben": "he", "Max": "he", "Leo": "he",
    "Jan": "he", "Sam": "he", "Paul": "he", "Omar": "he",
}  # fmt: skip
THINGS = (
    "apples", "pears", "books", "coins", "shells", "stamps", "marbles", "cards",
    "stones", "pens", "nuts", "figs",
)  # fmt: skip
GAINS = ("finds", "buys", "gets", "wins", "picks", "earns")
LOSSES = ("loses", "eats", "sells", "drops", "burns", "lends")
REST_DAYS = ("does nothing", "stays home", "sleeps in")
DOUBLING = "doubles them"
HALVING = "halves them"
OTHER_WORDS = ("has", "How", "many", "now", "Answer")

# One chain of numbers in ten is for evaluation only, whatever names and things go with it.
_HELDOUT_SHARE = 10
_EASY_OPERANDS = (1, 10)
_OPERAND_RANGE = (2, 12)
_START_RANGE = (2, 60)
_ANSWER = re.compile(r"\bAnswer (\d+)")


@dataclass(frozen=True)
class Problem:
    """A word problem, its solution as one text, and the number that the solution ends with."""

    prompt: str
    response: str
    answer: int
    steps: int


@dataclass(frozen=True)
class _Step:
    operator: str  # one of + - * /
    operand: int
    words: str  # what the prompt says after the pronoun
    total: int  # after the step


def problem(seed: int, split: Split = "train", steps: int | None = None) -> Problem:
    """Return the problem of `seed`, which is the same at every call and on every machine.

    `split` is "train" or "heldout"; no chain of numbers is in both. `steps` is the number of days,
    1 to 6; None draws it.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r}: expected 'train' or 'heldout'")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps={steps!r}: expected 1 to {MAX_STEPS}, or None to draw it")
    # Strings are seeded by their SHA-512, which no Python version or platform changes.
    rng = random.Random(f"{split} {steps} {seed}")
    count = steps or rng.randint(1, MAX_STEPS)
    while True:
        start, chain = _draw_chain(rng, count)
        numbers = [start, *(f"{step.operator} {step.operand}" for step in chain)]
        if _belongs_to_heldout(*numbers) == (split == "heldout"):
            return _write(rng, start, chain)


def heldout(n: int, seed: int = 0, steps: int | None = None) -> list[Problem]:
    """`n` different problems that training never sees."""
    if n < 1:
        raise ValueError(f"n={n!r}: expected at least 1")
    problems: dict[str, Problem] = {}
    for draw in itertools.count(seed * 1_000_003):
        item = problem(draw, "heldout", steps)
        problems.setdefault(item.prompt, item)
        if len(problems) == n:
            break
    return list(problems.values())


def is_heldout(item: Problem) -> bool:
    """Whether the problem's chain of numbers belongs to the held-out split."""
    steps = re.findall(r"(\d+) ([-+*/] \d+) =", item.response)
    return _belongs_to_heldout(steps[0][0], *(change for _, change in steps))


def extract_answer(text: str) -> int | None:
    """The number that `text` answers before its first EOS, None where it has none."""
    match = _ANSWER.search(text.split(EOS_TEXT, 1)[0])
    return int(match.group(1)) if match else None


def is_exact(item: Problem, text: str) -> bool:
    """Whether `text`, up to its first EOS, ends in the right answer."""
    return extract_answer(text) == item.answer


def _belongs_to_heldout(*numbers: object) -> bool:
    """Whether a chain such as 12, "+ 7", "- 5" belongs to the held-out split."""
    return zlib.crc32(" ".join(map(str, numbers)).encode()) % _HELDOUT_SHARE == 0


def _draw_chain(rng: random.Random, count: int) -> tuple[int, list[_Step]]:
    total = start = rng.randint(*_START_RANGE)
    chain: list[_Step] = []
    while len(chain) < count:
        step = _draw_step(rng, total)
        if step is not None:
            chain.append(step)
            total = step.total
    return start, chain


def _draw_step(rng: random.Random, total: int) -> _Step | None:
    """Draw one change of `total`; None where the result would not lie in 0 to 99."""
    kind = rng.choices(("change", "rest", "double", "halve"), (80, 8, 6, 6))[0]
    if kind == "rest":
        return _Step("+", 0, rng.choice(REST_DAYS), total)
    if kind == "double":
        return _Step("*", 2, DOUBLING, 2 * total) if 0 < 2 * total <= MAX_TOTAL else None
    if kind == "halve":
        return _Step("/", 2, HALVING, total // 2) if total > 0 and total % 2 == 0 else None
    easy = rng.random() < 0.3
    operand = rng.choice(_EASY_OPERANDS) if easy else rng.randint(*_OPERAND_RANGE)
    gain = rng.random() < 0.5
    words = f"{rng.choice(GAINS if gain else LOSSES)} {operand}"
    after = total + operand if gain else total - operand
    return _Step("+-"[not gain], operand, words, after) if 0 <= after <= MAX_TOTAL else None


def _write(rng: random.Random, start: int, chain: list[_Step]) -> Problem:
    name = rng.choice(tuple(PRONOUNS))
    things = rng.choice(THINGS)
    prompt = [f"{name} has {start} {things}."]
    response = []
    total = start
    for day, step in zip(DAYS, chain, strict=False):
        prompt.append(f"{day} {PRONOUNS[name]} {step.words}.")
        response.append(f"{day} {total} {step.operator} {step.operand} = {step.total}.")
        total = step.total
    prompt.append(f"How many {things} now?")
    response.append(f"Answer {total}.")
    return Problem(" ".join(prompt), " ".join(response), total, len(chain))

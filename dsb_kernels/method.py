"""The method's definitions written out a second time, in plain Python over lists, for one row.

Shares nothing with `dsb_kernels.commit`: the tests hold one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MASK, EOS = -1, 0


def choose(confidences: list[float], rule: str, value: float, due: int) -> list[int]:
    """Indices that the rule commits, out of the candidates' confidences (position order)."""
    order = sorted(range(len(confidences)), key=lambda i: (-confidences[i], i))
    c = [confidences[i] for i in order]
    if rule == "threshold":
        count = sum(x >= value for x in c)
    elif rule == "quota":
        count = due
    elif rule == "factor":
        count = len(c)
        for j, x in enumerate(c, start=1):
            if x < (-1.0 if j == 1 else 1.0 - value / (j + 1)):
                count = len(c) if j == len(c) else j - 1
                break
    else:
        count = 0
        for n in range(1, len(c) + 1):
            if sum(c[:n]) - (n - 1) - (1 - c[n - 1]) > value:
                count = n
    return sorted(order[: min(max(count, 1), len(c))])


@dataclass
class Row:
    """One row's decoding, a step at a time."""

    prompt: int
    gen: int
    block: int
    max_block: int | None
    schedule: str
    cache: str
    prefix_window: int
    rule: str
    value: float
    steps: int
    refresh_commit: str
    min_prefix: int
    stop_at_eos: bool
    leftpad: int = 0
    canvas: list[int] = field(init=False)
    refresh: bool = True
    done: bool = False
    n: int = 0
    since: int = 0
    step: int = 0
    p: int = 0

    def __post_init__(self) -> None:
        self.canvas = [1] * self.prompt + [MASK] * self.gen
        self.s, self.e = self.window()

    @property
    def length(self) -> int:
        return self.prompt + self.gen

    def first_masked(self) -> int:
        return self.canvas.index(MASK) if MASK in self.canvas else self.length

    def window(self) -> tuple[int, int]:
        first = self.first_masked()
        if self.schedule == "naive":
            if first == self.length:
                return self.length, self.length
            k = (first - self.prompt) // self.block
            start = self.prompt + k * self.block
            return start, min(start + self.block, self.length)
        end = self.prompt + self.block + self.n
        end = min(
            end, self.length, self.length if self.max_block is None else first + self.max_block
        )
        return first, end

    def candidates(self) -> list[int]:
        return [i for i in range(self.prompt, self.e) if self.canvas[i] == MASK]

    def due(self) -> int:
        """Planned commits up to and including this step, less what has been committed."""
        if self.schedule == "naive":
            masks, done = min(self.block, self.length - self.s), self.n - (self.s - self.prompt)
        else:
            masks, done = self.gen, self.n
        planned = sum(masks // self.steps + (t < masks % self.steps) for t in range(self.step + 1))
        return (masks if self.step + 1 >= self.steps else planned) - done

    def advance(self, tokens: list[int], confidences: list[float]) -> list[int]:
        """Commit by the rule and slide; returns the committed positions."""
        at = self.candidates()
        if self.refresh and self.refresh_commit == "first":
            picked = [0]
        else:
            due = self.due() if self.rule == "quota" else 0
            picked = choose(confidences, self.rule, self.value, due)
        for i in picked:
            self.canvas[at[i]] = tokens[i]
        self.n += len(picked)
        self.since = (0 if self.refresh else self.since) + len(picked)
        old, was_refresh = self.s, self.refresh
        self.s, self.e = self.window()
        moved = self.s - old
        self.step = 0 if self.schedule == "naive" and moved else self.step + 1
        if self.cache == "none":
            self.refresh, self.p = True, 0
        else:
            self.refresh = self.since >= self.block
            if self.cache == "dsb":
                self.p = max(moved, self.prefix_window)
            else:
                self.p = max(0 if self.refresh else (0 if was_refresh else self.p) + moved,
                             self.min_prefix)  # fmt: skip
            self.p = min(self.p, self.s - self.leftpad)
        first = self.first_masked()
        self.done = first == self.length
        if self.stop_at_eos:
            ends = [i for i in range(self.prompt, first) if self.canvas[i] == EOS]
            if ends:
                self.canvas[ends[0] + 1 :] = [EOS] * (self.length - ends[0] - 1)
                self.done = True
        return [at[i] for i in picked]

"""The record of `dsb eval`: a score for each setting, with its names, its interval and tables."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box

from dsb_kernels.rules import RULES
from dsb_runtime.config import DEFAULT_RULE, DecodingConfig, settings
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.files import read_json
from dsb_runtime.measure.command import MALFORMED, PlainConsole, markdown_table, table_of
from dsb_runtime.measure.plots import Point, draw_fronts

SCHEDULES = ("naive", "DSB const", "DSB greedy")
WHOLE = "no blocks"  # the whole canvas is one block
Z = 1.959964  # of a 95% interval


def wilson(exact: int, problems: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, of which `exact` of `problems` were seen."""
    share, spread = exact / problems, Z * Z / problems
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


@dataclass(frozen=True)
class Score:
    """What one setting answered. Forwards and tokens are means over the problems."""

    config: DecodingConfig
    problems: int
    exact: int
    forwards: float
    tokens: float

    def __post_init__(self) -> None:
        if not 0 <= self.exact <= self.problems or not 0 < self.forwards <= self.config.gen_length:
            raise ValueError(f"{self}: expected a score")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.exact, self.problems)

    @property
    def schedule(self) -> str:
        """One of SCHEDULES, or the largest block of a DSB between const and greedy."""
        config = self.config
        if config.schedule == "naive":
            return "naive"
        if config.max_block_length is None:
            return "DSB greedy"
        const = config.max_block_length == config.block_length
        return "DSB const" if const else f"DSB to {config.max_block_length}"

    @property
    def curve(self) -> str:
        """The curve of the picture that the score belongs to."""
        whole = self.config.block_length == self.config.gen_length
        return WHOLE if whole else self.schedule

    @property
    def one_token(self) -> bool:
        """Whether each step commits one token, whatever the confidence."""
        rule = RULES[self.config.rule]
        return rule.kind is int and getattr(self.config, rule.setting) == self.config.gen_length

    @property
    def cache(self) -> str:
        """The cache policy; "dsb/4" where one refresh in four is full."""
        every = self.config.full_every
        return self.config.cache if every == 1 else f"{self.config.cache}/{every}"

    @property
    def rule(self) -> str:
        """The rule with its value, or what stands for it: a confidence that is not the rule's own,
        and `progress`, which lowers a threshold."""
        config, rule = self.config, RULES[self.config.rule]
        value = getattr(config, rule.setting)
        other = config.confidence != rule.confidences[0]
        if self.one_token:
            return f"one token, {config.confidence}" if other else "one token a step"
        words = f"{rule.setting} {value:g}"
        if other:
            words = words.replace(DEFAULT_RULE.setting, config.confidence)
        if config.progress is not None:
            usual = words == f"{DEFAULT_RULE.setting} {DEFAULT_RULE.default:g}"
            words = f"progress {config.progress:g}" + ("" if usual else f" of {words}")
        return words

    def shown(self) -> str:
        """The share of exact answers with its interval, in percent."""
        low, high = self.interval
        return f"{100 * self.exact / self.problems:.1f} ({100 * low:.1f}-{100 * high:.1f})"

    def line(self) -> dict[str, Any]:
        """The score as JSON, with every setting that has a value under its name."""
        named = {name: getattr(self.config, name) for name in settings()}
        return {
            "settings": {name: value for name, value in named.items() if value is not None},
            "exact": self.exact, "forwards": self.forwards, "tokens": self.tokens,
        }  # fmt: skip


@dataclass
class Record:
    """The scores of one model on the same problems."""

    task: str
    model: str  # a digest of its weights and of how they and the text are read
    problems: int
    seed: int
    gen_length: int  # of every setting
    scores: list[Score]

    @classmethod
    def of(cls, written: Any) -> Record:
        """The record that JSON holds. Raises one of `MALFORMED` where it holds something else."""
        head = {name: written[name] for name in ("task", "model", "problems", "seed")}
        if head["task"] not in TASKS:
            raise ValueError(f"task={head['task']!r}: expected one of {', '.join(TASKS)}")
        scores = [
            Score(
                DecodingConfig(**line["settings"]), head["problems"], line["exact"],
                line["forwards"], line["tokens"],
            )
            for line in written["scores"]
        ]  # fmt: skip
        length = scores[0].config.gen_length  # of which JSON has one in each score's settings
        if any(score.config.gen_length != length for score in scores):
            raise ValueError("scores of several gen_length: expected one")
        return cls(**head, gen_length=length, scores=scores)

    def as_json(self) -> dict[str, Any]:
        """The record as JSON."""
        head = {name: getattr(self, name) for name in ("task", "model", "problems", "seed")}
        return head | {"scores": [score.line() for score in self.scores]}

    def continued(self, path: Path | None) -> Record:
        """The record that a file has of the same model and problems, or this one if there is none.

        Raises:
            ValueError: the file has something else.
        """
        # A pipe would have no end, and a file that was made beforehand is empty.
        if path is None or not path.is_file() or path.stat().st_size == 0:
            return self
        try:
            other = Record.of(read_json(path, "--json"))
        except MALFORMED as error:
            raise ValueError(
                f"--json {path}: expected what dsb eval --json writes, or a new file"
            ) from error
        for name in ("task", "problems", "seed", "gen_length", "model"):
            old, new = getattr(other, name), getattr(self, name)
            if old != new:
                raise ValueError(
                    f"--json {path}: it has scores of {name} {old}; expected {new}, or a new file"
                )
        return other

    def only(self, configs: Sequence[DecodingConfig]) -> Record:
        """The record of these settings alone, in their order."""
        by_config = {score.config: score for score in self.scores}
        scores = [by_config[config] for config in configs if config in by_config]
        return replace(self, scores=scores)

    def markdown(self) -> str:
        """A Markdown table with the schedules side by side, in the order of the scores."""
        places: dict[tuple[str, int, str], dict[str, str]] = defaultdict(dict)
        for s in self.scores:
            place = (s.rule, s.config.block_length, s.cache)
            places[place][s.schedule] = f"{s.shown()} in {s.forwards:.1f}"
        columns = {"rule": "left", "block": "right", "cache": "left"}
        columns |= dict.fromkeys(SCHEDULES, "left")
        return markdown_table(columns, [
            [rule, str(block), cache, *(cells.get(schedule, "") for schedule in SCHEDULES)]
            for (rule, block, cache), cells in places.items()
        ])  # fmt: skip


def front(scores: Sequence[Score]) -> list[Score]:
    """The scores that no other beats: each has more exact answers than every one with as few
    forwards or fewer. In the order of their forwards."""
    best: list[Score] = []
    for score in sorted(scores, key=lambda s: (s.forwards, -s.exact)):
        if not best or score.exact > best[-1].exact:
            best.append(score)
    return best


def print_table(record: Record) -> None:
    """Print a line for each score; it fits into 80 columns."""
    lines = [
        [
            s.rule, s.schedule.removeprefix("DSB "), s.cache, str(s.config.block_length), s.shown(),
            f"{s.forwards:.1f}", f"{s.tokens / s.forwards:.2f}",
        ]
        for s in record.scores
    ]  # fmt: skip
    table = table_of(
        ["rule", "schedule", "cache", "block", "exact, % (95%)", "forwards", "tokens/\nforward"],
        lines, left=(0, 1, 2), no_wrap=True,
        title=f"{record.task}: {record.problems} held-out problems, gen {record.gen_length}",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    PlainConsole().print(table)


def show(record: Record, plot: Path | None, markdown: bool = False) -> None:
    """Print the table of a record, and draw its picture where `plot` names a file."""
    if markdown:
        print(record.markdown())
    else:
        print_table(record)
    if plot is not None:
        draw(record, plot)


def draw(record: Record, plot: Path) -> None:
    """Draw the front of each schedule. What commits one token a step takes far more forwards than
    the others, and stands in a note, unless the record has nothing else."""
    curves: dict[str, list[Score]] = {name: [] for name in (*SCHEDULES, WHOLE)}
    slow: dict[str, list[Score]] = {name: [] for name in curves}
    for score in record.scores:
        (slow if score.one_token else curves).setdefault(score.curve, []).append(score)
    note = one_token_note(slow)
    if not any(curves.values()):
        curves, note = slow, ""
    draw_fronts(
        {name: [point(score) for score in front(scores)] for name, scores in curves.items()},
        [point(score) for scores in curves.values() for score in scores],
        f"{record.task}, {record.problems} held-out problems: the best of each schedule", note,
        plot,
    )  # fmt: skip


def one_token_note(curves: dict[str, list[Score]]) -> str:
    """A sentence with the best share of each curve at one token a step, or "" without scores."""
    best = {name: max(point(s).exact for s in scores) for name, scores in curves.items() if scores}
    if not best:
        return ""
    taken = [f"{s.forwards:.0f}" for scores in curves.values() for s in scores]
    forwards = " to ".join(dict.fromkeys((min(taken, key=int), max(taken, key=int))))
    same = itertools.groupby(best, key=lambda name: f"{best[name]:.1f}%")
    shares = "; ".join(f"{', '.join(names)} {share}" for share, names in same)
    return f"One token a step ({forwards} forwards): {shares}."


def point(score: Score) -> Point:
    low, high = score.interval
    return Point(score.forwards, *(100 * x for x in (score.exact / score.problems, low, high)))

"""place_rows: the definition against the method in plain Python, the kernel against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import place as module
from dsb_kernels.method import Row, source
from dsb_kernels.place import Layout, place_rows
from dsb_kernels.rows import NUM_COLUMNS, Column, StepKind, read_rows
from tests.mutations import DEVICE
from tests.op_contract import Arguments, OpCase, OpContract, by_definition, mistakes_of

WINDOW, REFRESH, RESPONSE, NOTHING = StepKind


@dataclass
class Case:
    """A state drawn from a seed, and a step over it."""

    kind: int = WINDOW
    batch: int = 5
    num_rows: int = 5
    width: int = 14
    num_candidates: int = 6
    candidates: int = 8  # K
    length: int = 40
    shift: bool = False
    prompt: int = 9
    suffix: int = 0
    suffix_window: int = 0
    context: int | None = None  # how many positions a refresh computes
    next_kinds: tuple[int, ...] = (WINDOW, REFRESH, WINDOW, RESPONSE, NOTHING, WINDOW)
    seed: int = 0

    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """Canvas, row table and candidates: windows of any length, after prefixes of up to six."""
        draw = torch.Generator().manual_seed(self.seed)

        def ints(low: int, high: Tensor | int, shape: tuple[int, ...] = (self.batch,)) -> Tensor:
            whole = torch.randint(0, 1 << 30, shape, generator=draw)
            return low + whole % (torch.as_tensor(high) - low + 1)

        canvas = ints(0, 9999, (self.batch, self.length))
        start = ints(min(self.prompt, self.length - 1), self.length - 1)
        end = ints(0, self.length - start) + start
        position = start[:, None] + ints(0, 2, (self.batch, self.candidates)).cumsum(-1)
        position[position >= end[:, None]] = -1
        position[:, 1:][position[:, :-1] < 0] = -1
        leftpad = ints(0, min(3, self.prompt))
        context = self.length - leftpad if self.context is None else self.context
        table = torch.randint(0, 99, (self.batch, NUM_COLUMNS), generator=draw)
        for column, value in (
            (Column.NEXT_KIND, torch.tensor((self.next_kinds * self.batch)[: self.batch])),
            (Column.START, start),
            (Column.END, end),
            (Column.PREFIX, ints(0, torch.minimum(start, torch.tensor(6)))),
            (Column.NUM_CANDIDATES, (position >= 0).sum(-1)),
            (Column.LEFTPAD, leftpad),
            (Column.FORWARDS, ints(0, 1 << 20)),
            (Column.RESPONSE_START, self.prompt),
            (Column.RESPONSE_END, self.length - self.suffix),
            (Column.CONTEXT, context),
        ):
            table[:, column] = value
        return canvas.to(DEVICE), table.int().to(DEVICE), position.int().to(DEVICE)

    def arguments(self) -> Arguments:
        return dict(zip(("canvas", "table", "position"), self.state(), strict=True)) | {
            "kind": self.kind, "num_rows": self.num_rows, "width": self.width,
            "num_candidates": self.num_candidates, "shift": self.shift,
            "suffix_window": self.suffix_window,
        }  # fmt: skip


def by_method(case: Case) -> list[dict[str, object]]:
    """The layout, row by row; what a row computes is what `dsb_kernels.method` says."""
    canvas, table, position = (x.cpu() for x in case.state())
    listed, capacity = [], case.num_candidates
    for b, row in enumerate(read_rows(table)):
        response = case.length - case.prompt - case.suffix
        method = Row(case.prompt, response, 1, suffix_length=case.suffix, leftpad=row.leftpad,
                     suffix_window=case.suffix_window)  # fmt: skip
        method.next_kind = StepKind(case.kind).label
        method.start, method.end, method.prefix = row.start, row.end, row.prefix
        first, last = method.computed(case.shift)
        last = last if case.kind != REFRESH or case.context is None else first + case.context
        candidates = [i for i in position[b].tolist() if i >= 0]
        fits = last - first <= case.width and len(candidates) <= capacity
        active = row.next_kind == case.kind and fits
        candidates = (candidates + [-1] * capacity)[:capacity]
        sources = [max(source(i, case.shift), row.leftpad) - first for i in candidates]
        listed.append({
            "rows": b, "start": first, "length": last - first if active else 0,
            "leftpad": row.leftpad, "active": active,
            "num_scored": min(capacity, case.length - row.leftpad) if active else 0,
            "input_ids": [
                int(canvas[b, min(first + j, case.length - 1)]) for j in range(case.width)
            ],
            "source_index": [min(max(s, 0), case.width - 1) for s in sources],
            "eligible": [active and i >= 0 for i in candidates],
            "noise_ids": [
                (b << 42) | (row.forwards << 21) | max(i - case.prompt, 0) for i in candidates
            ],
        })  # fmt: skip
    if case.num_rows < case.batch:
        listed.sort(key=lambda row: not row["active"])  # stable
    for r, row in enumerate(listed[: case.num_rows]):
        row["source_index"] = [i + r * case.width for i in row["source_index"]]
    return listed[: case.num_rows]


CASES = {
    "window": Case(),
    "shifted": Case(shift=True, seed=1),
    "suffix_window": Case(width=40, suffix=2, suffix_window=9),
    "some_rows": Case(num_rows=2),
    "one_of_many": Case(
        batch=37, num_rows=1, next_kinds=(NOTHING, REFRESH, NOTHING, NOTHING, WINDOW)
    ),
    "none": Case(next_kinds=(REFRESH,), num_rows=3),
    "all_fit": Case(width=40, num_candidates=8, next_kinds=(WINDOW,), num_rows=4),
    "every_row": Case(width=40, num_candidates=8, next_kinds=(WINDOW,)),
    "few_candidates": Case(width=40, num_candidates=2, next_kinds=(WINDOW,)),
    "nothing_fits": Case(width=1, num_candidates=1, next_kinds=(WINDOW,)),
    "refresh": Case(kind=REFRESH, width=40, num_candidates=8),
    "refresh_of_a_context": Case(kind=REFRESH, width=30, num_candidates=8, context=29),
    "refresh_of_some": Case(kind=REFRESH, width=40, num_candidates=8, num_rows=2, seed=3),
    "refresh_without_room": Case(kind=REFRESH, width=39),
    "response": Case(kind=RESPONSE, width=32, shift=True, num_candidates=8),
    "response_before_a_suffix": Case(
        kind=RESPONSE, width=30, num_candidates=8, suffix=4, next_kinds=(RESPONSE,)
    ),
    "no_token_before": Case(kind=REFRESH, width=40, num_candidates=8, prompt=0, shift=True, seed=2),
    "more_candidates_than_positions": Case(
        kind=REFRESH, length=6, width=6, num_candidates=6, prompt=3, next_kinds=(REFRESH,)
    ),
    "tokens_in_pieces": Case(
        kind=REFRESH, batch=2, num_rows=2, length=2100, width=2100, prompt=2000
    ),
    "one_position": Case(
        batch=1, num_rows=1, length=1, width=1, num_candidates=1, candidates=1, prompt=0
    ),
    "batch_64": Case(batch=64, num_rows=16, seed=5),
}


def check_definition(case: Case) -> None:
    expected = by_method(case)
    for name, x in zip(Layout._fields, by_definition(place_rows, case.arguments()), strict=True):
        wanted = [row[name] if isinstance(row[name], list) else [row[name]] for row in expected]
        assert x.view(case.num_rows, -1).tolist() == wanted, name


def check_both(case: Case) -> None:
    check_definition(case)
    CASE.compare(case.arguments())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, length = draw(st.integers(1, 9)), draw(st.integers(1, 50))
    candidates = draw(st.integers(1, 12))
    return Case(
        kind=draw(st.sampled_from([WINDOW, REFRESH, RESPONSE])),
        batch=batch,
        num_rows=draw(st.integers(1, batch)),
        width=draw(st.integers(1, length)),
        num_candidates=draw(st.integers(1, candidates)),
        candidates=candidates,
        length=length,
        shift=draw(st.booleans()),
        prompt=(prompt := draw(st.integers(0, length - 1))),
        suffix=draw(st.integers(0, length - 1 - prompt)),
        suffix_window=draw(st.sampled_from([0, 0, 1, min(7, length), length])),
        next_kinds=draw(st.tuples(*[st.sampled_from([*StepKind])] * batch)),
        seed=draw(st.integers(0, 2**31)),
    )


KERNEL = "_place_rows_kernel"
CASE = OpCase(
    op=place_rows,
    module=module,
    calls={name: case.arguments for name, case in CASES.items()},
    any_check=st.builds(partial, st.just(check_both), cases()),
    examples=(40, 0),
    quick=("some_rows", "response"),
    strided=("canvas",),
    good=Case().arguments,
    refused=[
        ({"table": lambda t: t[:, 1:]}, r"table has shape \(5, 17\)"),
        ({"kind": lambda k: NOTHING}, "kind=.*: accepted are 0, 1, 2"),
        ({"num_rows": lambda n: 6}, "num_rows=6: accepted are 1 to 5"),
        ({"width": lambda n: 41}, "width=41: accepted are 1 to 40"),
        ({"num_candidates": lambda n: 0}, "num_candidates=0: accepted are 1 to 8"),
        ({"suffix_window": lambda n: 41}, "suffix_window=41: accepted are 0 to 40"),
    ],
    mistakes=mistakes_of(
        ("no_token_before", KERNEL, [("(length <= width)", "(length < width)")]),
        ("refresh_of_a_context", KERNEL, [("row_ptrs + CONTEXT", "row_ptrs + RESPONSE_END")]),
        ("few_candidates", KERNEL, [("& (num_candidates <= capacity)", "")]),
        ("some_rows", KERNEL, [("active, before, behind", "active, behind, before")]),
        ("every_row", KERNEL, [("b < B\n", "b < B - 1\n")]),
        ("shifted", KERNEL, [("position - SHIFT", "position")]),
        ("more_candidates_than_positions", KERNEL, [("(capacity, L - leftpad)", "(capacity, L)")]),
        ("response_before_a_suffix", KERNEL, [("row_ptrs + RESPONSE_END", "row_ptrs + END")]),
        ("suffix_window", KERNEL, [
            ("other=0) + suffix_window", "other=0)"), ("tl.minimum(end, L)", "end"),
        ]),
        ("tokens_in_pieces", KERNEL, [("start + w, L - 1", "start + w, L - 2")]),
        ("window", KERNEL, [
            ("start -= tl.load", "start -= 0 * tl.load"),
            ("to(tl.int64) << 21", "to(tl.int64) << 0"),
        ]),
        ("none", KERNEL, [("k < takes_part * capacity", "k < capacity")]),
    ),
)  # fmt: skip


class TestPlaceRows(OpContract):
    case = CASE


@pytest.mark.parametrize("name", CASES)
def test_definition_is_the_method(name: str) -> None:
    check_definition(CASES[name])

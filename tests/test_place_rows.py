"""place_rows: the definition against a plain loop, the kernel against the definition."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsb_kernels import place as module
from dsb_kernels.commit import initial_state
from dsb_kernels.place import PlacedRows, place_rows
from dsb_kernels.rows import NOTHING, REFRESH, RESPONSE, WINDOW, UnmaskSpec, WindowState
from tests.mutations import DEVICE, assert_caught, kernels

SLOW = pytest.mark.slow
MASK = 99


@dataclass
class Case:
    """A state drawn from a seed, and a step over it."""

    kind: int = WINDOW
    batch: int = 5
    rows: int = 5
    width: int = 14
    held: int = 6
    candidates: int = 8  # K
    length: int = 40
    first: int = 0
    shift: bool = False
    prompt: int = 9
    needs: tuple[int, ...] = (WINDOW, REFRESH, WINDOW, RESPONSE, NOTHING, WINDOW)
    seed: int = 0

    def state(self) -> tuple[Tensor, WindowState, Tensor]:
        """Windows of any length, before which up to six rows are computed again."""
        draw = torch.Generator().manual_seed(self.seed)

        def ints(low: int, high: Tensor | int, shape: tuple[int, ...] = (self.batch,)) -> Tensor:
            whole = torch.randint(0, 1 << 30, shape, generator=draw)
            return low + whole % (torch.as_tensor(high) - low + 1)

        canvas = ints(0, 9999, (self.batch, self.length))
        spec = UnmaskSpec(
            self.prompt, self.candidates, None, "dsb", "dsb", 4, 0, "threshold", 0.9, 0, "select",
            MASK, (3,), False,
        )  # fmt: skip
        leftpad = ints(0, min(3, self.prompt))
        state = initial_state(canvas, leftpad.int(), spec)
        shape = (self.batch, self.candidates)
        start = ints(min(self.prompt, self.length - 1), self.length - 1)
        end = ints(0, self.length - start) + start
        position = start[:, None] + ints(0, 2, shape).cumsum(-1)
        position[position >= end[:, None]] = -1
        position[:, 1:][position[:, :-1] < 0] = -1
        needs = torch.tensor((self.needs * self.batch)[: self.batch])
        values = {
            "start": start, "end": end, "prefix": ints(0, torch.minimum(start, torch.tensor(6))),
            "position": position, "needs": needs, "forwards": ints(0, 1 << 20),
        }  # fmt: skip
        state = replace(state, **{name: value.int() for name, value in values.items()})
        state = WindowState(*(getattr(state, f.name).to(DEVICE) for f in fields(state)))
        return canvas.to(DEVICE), state, leftpad.int().to(DEVICE)

    def step(self) -> dict[str, object]:
        return {
            "kind": self.kind, "rows": self.rows, "width": self.width, "held": self.held,
            "first": self.first, "shift": self.shift, "prompt_length": self.prompt,
        }  # fmt: skip

    def check(self) -> None:
        given = self.state()
        expected = place_rows(*(x.cpu() if isinstance(x, Tensor) else on_cpu(x) for x in given),
                              **self.step())  # fmt: skip
        with kernels():
            found = place_rows(*given, **self.step())
        for name, wanted in zip(PlacedRows._fields, expected, strict=True):
            x = getattr(found, name).cpu()
            assert x.dtype == wanted.dtype and torch.equal(x, wanted), name


def on_cpu(state: WindowState) -> WindowState:
    return WindowState(*(getattr(state, f.name).cpu() for f in fields(state)))


def plain(case: Case) -> list[dict[str, object]]:
    """What the docstrings say, a row at a time."""
    canvas, state, leftpad = case.state()
    found, length = [], case.length
    for b in range(case.batch):
        low, high = case.first, length
        if case.kind == WINDOW:
            low, high = int(state.start[b] - state.prefix[b]), int(state.end[b])
        at = [i for i in state.position[b].tolist() if i >= 0]
        fits = high - low <= case.width and len(at) <= case.held
        active = int(state.needs[b]) == case.kind and fits
        rest = [-1] * (case.held - len(at[: case.held]))
        at = at[: case.held] + rest
        source = [max(i - case.shift, 0) - low for i in at]
        found.append({
            "rows": b, "start": low, "length": high - low if active else 0, "seqlens": length,
            "leftpad": int(leftpad[b]), "kept": case.held if active else 0, "active": active,
            "ids": [int(canvas[b, min(low + j, length - 1)]) for j in range(case.width)],
            "keep": [min(max(s, 0), case.width - 1) for s in source],
            "eligible": [active and i >= 0 for i in at],
            "noise_ids": [
                (b << 42) | (int(state.forwards[b]) << 21) | max(i - case.prompt, 0) for i in at
            ],
        })  # fmt: skip
    if case.rows < case.batch:
        found.sort(key=lambda row: not row["active"])  # stable
    for r, row in enumerate(found[: case.rows]):
        row["keep"] = [i + r * case.width for i in row["keep"]]
    return found[: case.rows]


CASES = {
    "window": Case(),
    "shifted": Case(shift=True, seed=1),
    "some_rows": Case(rows=2),
    "one_of_many": Case(batch=37, rows=1, needs=(NOTHING, REFRESH, NOTHING, NOTHING, WINDOW)),
    "none": Case(needs=(REFRESH,), rows=3),
    "all_fit": Case(width=40, held=8, needs=(WINDOW,), rows=4),
    "every_row": Case(width=40, held=8, needs=(WINDOW,)),
    "few_candidates": Case(width=40, held=2, needs=(WINDOW,)),
    "nothing_fits": Case(width=1, held=1, needs=(WINDOW,)),
    "refresh": Case(kind=REFRESH, width=40, held=8),
    "refresh_of_some": Case(kind=REFRESH, width=40, held=8, rows=2, seed=3),
    "refresh_without_room": Case(kind=REFRESH, width=39),
    "response": Case(kind=RESPONSE, first=8, width=32, shift=True, held=8),
    "tokens_in_pieces": Case(kind=REFRESH, batch=2, rows=2, length=2100, width=2100, prompt=2000),
    "one_position": Case(batch=1, rows=1, length=1, width=1, held=1, candidates=1, prompt=0),
    "batch_64": Case(batch=64, rows=16, seed=5),
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_matches_definition(name: str) -> None:
    CASES[name].check()


@pytest.mark.parametrize("name", CASES)
def test_definition_is_the_loop(name: str) -> None:
    check_loop(CASES[name])


def check_loop(case: Case) -> None:
    canvas, state, leftpad = case.state()
    found = place_rows(canvas.cpu(), on_cpu(state), leftpad.cpu(), **case.step())
    expected = plain(case)
    for name in PlacedRows._fields:
        x = getattr(found, name).view(case.rows, -1).tolist()
        wanted = [row[name] if isinstance(row[name], list) else [row[name]] for row in expected]
        assert x == wanted, name


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, length = draw(st.integers(1, 9)), draw(st.integers(1, 50))
    candidates = draw(st.integers(1, 12))
    return Case(
        kind=draw(st.sampled_from([WINDOW, REFRESH, RESPONSE])),
        batch=batch,
        rows=draw(st.integers(1, batch)),
        width=draw(st.integers(1, length)),
        held=draw(st.integers(1, candidates)),
        candidates=candidates,
        length=length,
        first=draw(st.integers(0, length - 1)),
        shift=draw(st.booleans()),
        prompt=draw(st.integers(0, length - 1)),
        needs=draw(st.tuples(*[st.sampled_from([WINDOW, REFRESH, RESPONSE, NOTHING])] * batch)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any_step(case: Case) -> None:
    check_loop(case)
    case.check()


MUTATIONS = {
    # case, what stands there, the mistake
    "width_excluded": ("refresh", "(length <= width)", "(length < width)"),
    "candidates_ignored": ("few_candidates", "& (past < 0)", ""),
    "order_reversed": ("some_rows", "active, before, behind", "active, behind, before"),
    "row_dropped": ("every_row", "i < B\n", "i < B - 1\n"),
    "not_shifted": ("shifted", "at - SHIFT", "at"),
    "last_token_dropped": ("tokens_in_pieces", "low + w, L - 1", "low + w, L - 2"),
    "prefix_left_out": ("window", "low -= tl.load", "low -= 0 * tl.load"),
    "inactive_is_eligible": ("none", "k < takes_part * held", "k < held"),
    "steps_left_out": ("window", "to(tl.int64) << 21", "to(tl.int64) << 0"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_caught(mutation: str) -> None:
    name, old, new = MUTATIONS[mutation]
    assert_caught(CASES[name].check, module, "_place_rows_kernel", old, new)


def flat(case: Case) -> tuple[object, ...]:
    """Arguments of the op as it is registered."""
    canvas, state, leftpad = case.state()
    names = ("start", "end", "prefix", "position", "needs", "forwards")
    tensors = (canvas, *(getattr(state, name) for name in names), leftpad)
    room = [case.rows, case.width, case.held]
    return (*tensors, case.kind, case.first, room, int(case.shift), case.prompt)


def test_opcheck() -> None:
    op = torch.ops.dsb.place_rows
    for name in ("some_rows", "response"):
        with kernels():
            names = ("test_schema", "test_faketensor")
            torch.library.opcheck(op, flat(CASES[name]), test_utils=names)
        torch.library.opcheck(op, flat(CASES[name]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_compiles_without_a_graph_break(backend: str) -> None:
    case = CASES["some_rows"]
    compiled = torch.compile(place_rows, fullgraph=True, backend=backend)
    found, expected = (f(*case.state(), **case.step()) for f in (compiled, place_rows))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_canvas_of_any_row_stride() -> None:
    canvas, state, leftpad = CASES["window"].state()
    wide = torch.zeros(5, 100, dtype=torch.int64, device=DEVICE)
    wide[:, 7:47] = canvas
    with kernels():
        found = place_rows(wide[:, 7:47], state, leftpad, **CASES["window"].step())
        expected = place_rows(canvas, state, leftpad, **CASES["window"].step())
    assert torch.equal(found.ids, expected.ids)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"canvas": lambda t: t.int()}, TypeError, "canvas has dtype int32"),
        ({"leftpad": lambda t: t[1:]}, ValueError, r"leftpad has shape \(4,\)"),
        ({"state": lambda s: replace(s, needs=s.needs.long())}, TypeError, "state.needs has dtype"),
        ({"state": lambda s: replace(s, end=s.end.to("meta"))}, ValueError, "state.end is on meta"),
        ({"kind": lambda k: NOTHING}, ValueError, "kind=3: accepted are 0, 1, 2"),
        ({"rows": lambda n: 6}, ValueError, "rows=6: accepted are 1 to 5"),
        ({"width": lambda n: 41}, ValueError, "width=41: accepted are 1 to 40"),
        ({"held": lambda n: 0}, ValueError, "held=0: accepted are 1 to 8"),
        ({"first": lambda n: 40}, ValueError, "first=40: accepted are 0 to 39"),
        ({"prompt_length": lambda n: -1}, ValueError, "prompt_length=-1: accepted are 0 to 40"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    names = ("canvas", "state", "leftpad")
    given = dict(zip(names, Case().state(), strict=True)) | Case().step()
    for name, changed in change.items():
        given[name] = changed(given[name])
    positional = [given.pop(name) for name in names]
    with pytest.raises(error, match=f"place_rows: {message}"):
        place_rows(*positional, **given)

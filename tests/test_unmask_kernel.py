"""unmask_and_slide: the kernel's commits and row tables equal the definition's, step by step."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import strategies as st

from dsb_kernels import commit_kernel as module
from dsb_kernels.commit import initial_rows, unmask_and_slide
from dsb_kernels.rows import Column, UnmaskSpec
from dsb_kernels.rules import RULES
from tests.mutations import DEVICE
from tests.op_contract import INF, NAN, Arguments, OpCase, OpContract, ints, mistakes_of, written

MASK = 99
# Confidences on a coarse grid tie often and fall on thresholds.
GRID = tuple(i / 16 for i in range(17))


@dataclass
class Run:
    """Several steps over one canvas, with tokens and confidences drawn from a seed."""

    schedule: str = "dsb"
    max_block_length: int | None = None
    cache: str = "dsb"
    rule: str = "threshold"
    rule_value: float = 0.75
    prompt_length: int = 5
    response: int = 24
    given: float = 0.0  # share of response positions that are no masks from the beginning
    suffix: int = 0
    block_length: int = 8
    rows: int = 3
    num_steps: int = 5
    steps: int = 0
    refresh_commit: str = "select"
    min_prefix: int = 1
    prefix_window: int = 4
    stop_at_eos: bool = True
    values: tuple[float, ...] = GRID
    leftpads: tuple[int, ...] = (0, 2, 4)
    inactive: float = 0.1  # share of rows that sit a step out
    scored: float | None = None  # share of rows, and of candidates, that are scored
    full_every: int = 2
    progress: float = 0.0
    eos_bound: bool = False
    seed: int = 0

    def spec(self) -> UnmaskSpec:
        names = [f.name for f in fields(UnmaskSpec) if hasattr(self, f.name)]
        own = {name: getattr(self, name) for name in names}
        return UnmaskSpec(**own, mask_id=MASK, eos_ids=(3, 7))

    def arguments(self) -> Arguments:
        """What the first step is called with: a commit of every candidate."""
        generator = torch.Generator().manual_seed(self.seed)
        end = self.prompt_length + self.response
        shape = (self.rows, end + self.suffix)
        canvas, spec = torch.randint(0, 50, shape, generator=generator), self.spec()
        masked = torch.rand(shape, generator=generator) >= self.given
        masked[:, self.prompt_length] = True
        masked[:, : self.prompt_length], masked[:, end:] = False, False
        canvas = canvas.masked_fill(masked, MASK).to(DEVICE)
        leftpad = ints(*(self.leftpads * self.rows)[: self.rows])
        table, position = initial_rows(canvas, leftpad, spec)
        return {
            "canvas": canvas,
            "table": table,
            "position": position,
            "commit": torch.zeros_like(position, dtype=torch.bool),
            "candidate_confidence": torch.zeros_like(position, dtype=torch.float32),
            "token": torch.full_like(position, 11, dtype=torch.int64),
            "confidence": torch.full_like(position, 0.8, dtype=torch.float32),
            "active": torch.ones(self.rows, dtype=torch.bool, device=DEVICE),
            "rows": None,
            "spec": spec,
        }

    def proposals(self, generator: torch.Generator, shape: torch.Size) -> Arguments:
        """Tokens, the mask itself and both EOS ids among them, and confidences of a step."""
        values = torch.tensor(self.values)
        token = torch.randint(0, 20, shape, generator=generator)
        token[torch.rand(shape, generator=generator) < 0.02] = MASK
        confidence = values[torch.randint(0, len(values), shape, generator=generator)]
        active = torch.rand(self.rows, generator=generator) >= self.inactive
        step = {"token": token, "confidence": confidence, "active": active}
        if self.scored is not None:  # some of the rows, some of their candidates
            rows = torch.randperm(self.rows, generator=generator)
            rows = rows[: max(1, int(self.scored * self.rows))]
            step = {name: x[rows] for name, x in step.items()} | {"rows": rows.int()}
            k = max(1, int(self.scored * shape[1]))
            step |= {name: step[name][:, :k].contiguous() for name in ("token", "confidence")}
        return {name: x.to(DEVICE) for name, x in step.items()}

    def check(self) -> None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        result = self.arguments()
        for _ in range(self.num_steps):
            result |= self.proposals(generator, result["position"].shape)
            result |= zip(written(unmask_and_slide), CASE.compare(result), strict=True)


VALUES = {
    "threshold": 0.75, "factor": 1.0, "frechet": 0.25, "entropy": 0.5, "eb": 0.75, "quota": 0.0,
}  # fmt: skip
ENTROPIES = (-2.0, -0.75, -0.5, -0.25, -0.0)


def run_of(rule: str, schedule: str, **settings: object) -> Run:
    steps = {"dsb": 12, "naive": 4}[schedule] if rule == "quota" else 0
    settings = {"steps": steps} | settings
    if rule in ("entropy", "eb"):
        settings = {"values": ENTROPIES} | settings
    return Run(rule=rule, rule_value=VALUES[rule], schedule=schedule, **settings)


WAYS = [("dsb", None), ("dsb", 8), ("dsb", 12), ("naive", None)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("schedule", "max_block_length"), WAYS)
def test_every_rule_and_schedule(rule: str, schedule: str, max_block_length: int | None) -> None:
    run_of(rule, schedule, max_block_length=max_block_length, num_steps=4).check()


@pytest.mark.parametrize("cache", ["dual", "none"])
@pytest.mark.parametrize(("schedule", "max_block_length"), WAYS)
def test_every_cache(cache: str, schedule: str, max_block_length: int | None) -> None:
    run = run_of("threshold", schedule, max_block_length=max_block_length, cache=cache)
    replace(run, refresh_commit="first" if cache == "dual" else "select").check()


CASES = {
    "to_the_end": Run(num_steps=9, rows=2, stop_at_eos=False),
    "one_row": Run(rows=1, inactive=0.0),
    "one_candidate": Run(block_length=1, response=4, inactive=0.0),
    "one_position": Run(block_length=1, response=1, num_steps=2, inactive=0.0),
    "block_is_response": Run(block_length=24, response=24),
    "last_block_is_shorter": Run(schedule="naive", response=21, num_steps=8, values=(0.8,)),
    "all_equal": Run(values=(0.5,), num_steps=6),
    "all_above": Run(values=(0.75,), num_steps=6, inactive=0.0, stop_at_eos=False),
    "nan": Run(values=(0.5, 0.75, 0.9, NAN), num_steps=3),
    "infinite": Run(values=(0.5, INF, -INF), num_steps=4),
    "infinite_frechet": Run(values=(0.5, INF), num_steps=4, rule="frechet", rule_value=0.25),
    "negative": Run(values=(-3.0, -1e-30, -2e38), num_steps=3),
    "many_eos": Run(values=(0.9,), num_steps=3, seed=4),
    "candidates_in_pieces": Run(block_length=100, response=150, num_steps=3),
    "candidates_in_pieces_frechet": Run(
        block_length=100, response=150, num_steps=2, rule="frechet", rule_value=0.0,
        values=(0.99, 0.999, 1.0),
    ),
    "many_candidates": Run(
        schedule="naive", block_length=1100, response=2200, rows=1, num_steps=2, inactive=0.0
    ),
    "canvas_in_pieces": Run(prompt_length=1018, response=12, block_length=6, rows=2, inactive=0.0),
    "no_prompt": Run(prompt_length=0, leftpads=(0,)),
    "some_rows": Run(rows=5, scored=0.7, leftpads=(0, 2, 4, 1, 0)),
    "one_row_of_many": Run(rows=9, scored=0.2, num_steps=6, cache="dual", schedule="naive"),
    "few_candidates": Run(rows=1, scored=0.4, inactive=0.0, leftpads=(0,), full_every=1),
    "some_rows_nan": Run(rows=4, scored=0.6, values=(0.5, 0.75, 0.9, NAN)),
    "given": Run(rows=4, given=0.4, suffix=3, leftpads=(0, 1, 5, 2)),
    "eos_before_a_suffix": Run(given=0.4, suffix=3, values=(0.9,), num_steps=3, seed=4),
    "given_naive": replace(run_of("quota", "naive", num_steps=8), given=0.5, suffix=1),
    "given_quota": replace(run_of("quota", "dsb", num_steps=6), given=0.3, suffix=5),
    "eos_bound": Run(eos_bound=True, given=0.2, response=40, num_steps=6, seed=1),
    "eos_bound_naive": Run(eos_bound=True, schedule="naive", cache="dual", num_steps=6),
    "padded": Run(prefix_window=50, leftpads=(5, 0, 4)),
    "no_prefix": Run(prefix_window=0, min_prefix=0),
    "progress": Run(progress=0.5, rule_value=0.9, values=(0.9, 0.8, 0.7, 0.6), num_steps=6),
    "quota": run_of("quota", "dsb", num_steps=6, inactive=0.3),
    # 0.9 as a float32 is below 0.9: such a confidence does not pass.
    "compared_in_float64": Run(rule_value=0.9, values=(0.9, 0.90000004, 0.5), num_steps=3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_edge_cases(name: str) -> None:
    CASES[name].check()


@st.composite
def runs(draw: st.DrawFn) -> Run:
    rule = draw(st.sampled_from(list(RULES)))
    schedule, bounded = draw(st.sampled_from([("dsb", False), ("dsb", True), ("naive", False)]))
    block = draw(st.integers(1, 12))
    response = block * draw(st.integers(1, 4))
    run = run_of(rule, schedule, block_length=block, response=response)
    blocks = response // block
    steps = draw(st.integers(1, response if schedule == "dsb" else block))
    prompt, stop = draw(st.integers(1, 9)), draw(st.booleans())
    return replace(
        run,
        max_block_length=draw(st.integers(block, block + 8)) if bounded else None,
        cache=draw(st.sampled_from(["dsb", "dual", "none"])),
        steps=steps if rule == "quota" else 0,
        refresh_commit=draw(st.sampled_from(["select", "first"])),
        stop_at_eos=stop,
        eos_bound=stop and draw(st.booleans()),
        prompt_length=prompt,
        given=draw(st.sampled_from([0.0, 0.2, 0.8])),
        suffix=draw(st.integers(0, 4)),
        leftpads=draw(st.tuples(*[st.integers(0, prompt)] * 2)),
        rows=draw(st.integers(1, 2)),
        num_steps=draw(st.integers(1, 4 + blocks)),
        min_prefix=draw(st.integers(0, 1)),
        scored=draw(st.none() | st.floats(0.1, 1)),
        full_every=draw(st.integers(1, 3)),
        prefix_window=draw(st.integers(0, 30)),
        seed=draw(st.integers(0, 2**31)),
    )


def late_candidate() -> Arguments:
    """A candidate at the block's end, or one that is no longer masked, is not committed."""
    result = Run(rows=2).arguments()
    result["position"][0, -1] = result["table"][0, Column.END]
    result["canvas"][1, 6] = 0
    return result


def no_row_scored() -> Arguments:
    result = Run().arguments() | {"rows": ints()}
    return result | {name: result[name][:0] for name in ("token", "confidence", "active")}


LOOP = "begin // BLOCK_L * BLOCK_L, stop"
CASE = OpCase(
    op=unmask_and_slide,
    module=module,
    calls={"one_step": Run().arguments}
    | {f.__name__: f for f in (late_candidate, no_row_scored)},
    quick=("one_step",),
    any_check=runs().map(lambda run: run.check),
    examples=(6, 80),
    strided=("canvas",),
    good=lambda: Run().arguments() | {"rows": ints(2, 0, 1)},
    refused=[
        ({"token": lambda t: t[1:]}, r"token has shape \(2, 8\)"),
        ({"token": lambda t: t.repeat(1, 2)}, r"confidence has shape \(3, 8\)"),
        ({"rows": lambda t: ints(0, 1)}, r"token has shape \(3, 8\)"),
        ({"table": lambda t: t[:, 1:].clone()}, r"table has shape \(3, 17\)"),
        ({"position": lambda t: t[0, 0]}, r"position has shape \(\): accepted is \(3, K\)"),
        ({"commit": lambda t: t[:2]}, "commit has shape"),
        ({"canvas": lambda t: t[:, :0]}, "canvas has no positions"),
    ],
    mistakes=mistakes_of(
        (CASES["all_equal"].check, "_rank_candidates", [("j[None, :] < k[", "j[None, :] > k[")]),
        ("late_candidate", "_valid_candidates", [("position < end", "position <= end")]),
        (CASES["all_above"].check, "_valid_candidates", [("k < num_scored", "k < num_scored - 1")]),
        (CASES["all_above"].check, "_commit_count", [("c >= value", "c > value")]),
        (CASES["all_equal"].check, "_unmask_kernel", [("tl.maximum(count, 1)", "count")]),
        (CASES["to_the_end"].check, "_unmask_kernel", [
            ("refresh, 0, tl", "refresh, 1, tl"),
            ("RESPONSE, REFRESH", "REFRESH, RESPONSE"),
        ]),
        (CASES["to_the_end"].check, "_store_counts", [("UNMASKED, unmasked", "UNMASKED, new")]),
        (CASES["to_the_end"].check, "_slide", [("size + unmasked", "size")]),
        (CASES["to_the_end"].check, "_list_candidates", [("0) - 1\n", "0)\n")]),
        (replace(CASES["to_the_end"], stop_at_eos=True, num_steps=6).check, "_unmask_kernel", [
            ("first_eos < first_masked", "first_eos < last"),
        ]),
        (CASES["some_rows"].check, "_scored_row", [
            ("is_mine, each, 0)", "is_mine, num_rows - 1 - each, 0)"),
        ]),
        (CASES["few_candidates"].check, "_unmask_kernel", [
            ("takes_part, num_scored", "takes_part, K"),
        ]),
        (CASES["padded"].check, "_plan", [("start - leftpad", "start")]),
        (CASES["quota"].check, "_tokens_due", [("- (masks - masks_left)", "- masks_left")]),
        (CASES["canvas_in_pieces"].check, "_first_mask_and_eos", [(LOOP, LOOP + " - BLOCK_L")]),
        (CASES["given_naive"].check, "_unmask_kernel", [("& (same_plan == 0)", "")]),
        (CASES["eos_bound"].check, "_unmask_kernel", [("first_eos + 1)", "first_eos)")]),
        (CASES["eos_before_a_suffix"].check, "_fill_after_eos", [("< last)", "< last + 1)")]),
    ),
)  # fmt: skip


class TestUnmaskAndSlide(OpContract):
    case = CASE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "rule='best': accepted are"),
        ({"schedule": "x"}, "schedule='x': accepted are"),
        ({"cache": "x"}, "cache='x': accepted are"),
        ({"refresh_commit": "x"}, "refresh_commit='x': accepted are"),
        ({"block_length": 0}, "block_length=0: accepted is at least 1"),
        ({"full_every": 0}, "full_every=0: accepted is at least 1"),
        ({"rule": "quota"}, "steps=0: accepted is at least 1"),
        ({"eos_bound": True, "stop_at_eos": False}, "eos_bound=True: accepted with stop_at_eos"),
    ],
)
def test_a_bad_spec_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"UnmaskSpec: {message}"):
        replace(Run().spec(), **change)

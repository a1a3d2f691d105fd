"""The correctness parts of `benchmarks/lab.py`: kernels against their definitions in float64 at
real shapes, and the recorded trajectories.

An error is ||found - exact|| / ||exact||. Allowed are 1e-5, or twice the error of the definition in
that precision where that is more: in 16 bits, and in float32 for a probability whose logit of 13 is
the sum of 4096 products one after the other, as a GPU adds them, which leaves 1.2e-5. Memory is
filled with NaN before a call, so that what a kernel leaves unwritten shows, and so are inputs where
nothing may be read.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks import bench_place_rows as place
from benchmarks import bench_rope_write_kv as rope
from benchmarks import bench_unmask_and_slide as unmask
from benchmarks.lab_state import Lab, NotHereError
from benchmarks.measure import device, on_gpu
from dsb_kernels._op import use_triton
from dsb_kernels.attention import window_attention, window_attention_definition
from dsb_kernels.commit import unmask_and_slide, unmask_and_slide_definition
from dsb_kernels.linear_add_norm import linear_add_norm, linear_add_norm_definition
from dsb_kernels.lm_head import lm_head_confidence
from dsb_kernels.place import place_rows_definition
from dsb_kernels.rope_kv import rope_write_kv, rope_write_kv_definition
from dsb_kernels.token_confidence import token_confidence, token_confidence_reference
from dsb_kernels.window_linear import window_linear, window_linear_reference

ROOT = Path(__file__).parents[1]
TESTS = "tests/test_cuda.py"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIE = 1e-3  # logits this close may be ordered either way by another order of summation
GOLDEN_SECONDS = 300
GOLDEN_WORKERS = 8  # its trajectories make Triton compile about 480 specialisations


def poison() -> None:
    """Fill what the allocator hands out next with NaN: one large block, and many small ones."""
    scale = 1 if on_gpu() else 256
    if on_gpu():
        torch.cuda.empty_cache()
    sizes = [(1 << 26) // scale] + [1 << 14] * (256 // scale)
    blocks = [torch.full((n,), torch.nan, device=device()) for n in sizes]
    del blocks


def error(found: Tensor, exact: Tensor) -> float:
    """Relative; infinite where anything is not a number."""
    value = ((found.double() - exact).norm() / exact.norm()).item()
    return value if value == value else float("inf")


class Errors:
    """Errors of one op over what is allowed."""

    def __init__(self, lab: Lab, op: str) -> None:
        self.lab, self.op, self.worst = lab, op, (0.0, "")

    def add(
        self, case: str, dtype: torch.dtype, found: Tensor, plain: Tensor, exact: Tensor
    ) -> None:
        """`plain`: the definition in that precision; `exact`: in float64."""
        allowed = max(1e-5, 2 * error(plain, exact))
        case = f"{case} {str(dtype).removeprefix('torch.')}"
        ratio = error(found, exact) / allowed
        note = f"{case}: {error(found, exact):.1e} of {allowed:.1e}"
        self.lab.details.setdefault("correct", {})[f"{self.op} {case}"] = round(ratio, 4)
        self.worst = max(self.worst, (ratio, note))

    def tokens(self, case: str, found: Tensor, scores: Tensor, tie: float) -> None:
        """Tokens are those of the largest scores (rows, V), or of one within `tie` of it."""
        short = scores.amax(-1) - scores.gather(-1, found.clamp(min=0)[:, None])[:, 0]
        wrong = ~(short <= tie) | (found < 0)
        if wrong.any():
            self.lab.problem(f"{self.op} {case}: {int(wrong.sum())} tokens of {len(found)} differ")

    def report(self) -> None:
        ratio, note = self.worst
        self.lab.figure(f"{self.op} error", ratio, note)
        if not ratio <= 1:
            self.lab.problem(f"{self.op} {note}")


def correct(lab: Lab) -> None:
    """Every op on random data."""
    torch.manual_seed(1)
    for check in (
        check_token, check_head, check_attention, check_rope, check_linear, check_add_norm,
        check_place, check_unmask,
    ):  # fmt: skip
        check(lab)


@torch.no_grad()
def check_token(lab: Lab) -> None:
    errors = Errors(lab, "token_confidence")
    for rows, V in ((3, 126464), (65, 152061), (300, 126464)) if on_gpu() else ((3, 515), (9, 640)):
        banned = (V - 128,)
        for dtype in DTYPES:
            logits = (3 * torch.randn(rows, V, device=device())).to(dtype)
            poison()
            token, c = token_confidence(logits, banned=banned)
            exact_token, exact = token_confidence_reference(logits.double(), banned=banned)
            if not torch.equal(token, exact_token):
                lab.problem(f"token_confidence {rows} x {V} {dtype}: other tokens")
            plain = token_confidence_reference(logits, banned=banned)[1]
            errors.add(f"{rows} x {V}", dtype, c, plain, exact)
    errors.report()


@torch.no_grad()
def check_head(lab: Lab) -> None:
    errors = Errors(lab, "lm_head_confidence")
    # 126461 is no multiple of anything that a tile is.
    shapes = ((33, 126461, 4096), (128, 152064, 3584)) if on_gpu() else ((5, 333, 64), (9, 512, 64))
    for rows, V, E in shapes:
        for dtype in DTYPES:
            weight = torch.randn(V, E, device=device(), dtype=dtype)
            hidden = (3 / E**0.5 * torch.randn(rows, E, device=device())).to(dtype)
            poison()
            token, c = lm_head_confidence(hidden, weight)
            logits = hidden.double() @ weight.double().T
            # The kernel scores in float32, the definition rounds logits to their own precision.
            rounding = 0.0 if use_triton(hidden) else 4 * torch.finfo(dtype).eps
            tie = max(TIE, rounding * logits.abs().max().item())
            errors.tokens(f"{rows} x {V} {dtype}", token, logits, tie)
            at = token.clamp(min=0)[:, None]
            exact = logits.softmax(-1).gather(-1, at)[:, 0]
            plain = linear(hidden, weight).float().softmax(-1).gather(-1, at)[:, 0]
            errors.add(f"{rows} x {V}", dtype, c, plain, exact)
            del logits, weight
    errors.report()


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


@torch.no_grad()
def check_attention(lab: Lab) -> None:
    """Two rows of a batch with other windows, paddings and ends; K/V in the cache or fresh."""
    errors = Errors(lab, "window_attention")
    shapes = [(32, 32, 64, 1280, 128), (28, 4, 100, 2000, 128), (32, 8, 256, 4224, 128)]
    for H, H_kv, W, C, D in shapes if on_gpu() else [(4, 4, 8, 90, 32), (7, 1, 20, 90, 32)]:
        starts, lengths = ints(C // 3, C - W), ints(W, W - 3)
        ends, leftpads = ints(C - 5, C), ints(0, 7)
        for dtype in DTYPES:
            q = torch.randn(2, W, H, D, device=device()).transpose(1, 2).to(dtype)
            kv = [torch.randn(2, H_kv, C, D, device=device()).to(dtype) for _ in range(2)]
            fresh = [torch.randn(2, H_kv, W, D, device=device()).to(dtype) for _ in range(2)]
            for cache in kv:
                cache[0, :, C - 5 :] = torch.nan
                cache[1, :, :7] = torch.nan
            for way, window in (("in cache", [None, None]), ("fresh", fresh)):
                rows = (starts, lengths, ends, leftpads)
                tensors = [q, *window, *kv]
                poison()
                found = window_attention(
                    *tensors, window_start=starts, window_length=lengths, cache_seqlens=ends,
                    cache_leftpad=leftpads,
                )  # fmt: skip
                rest = (*rows, None, None, None, 64, D**-0.5)
                double = [None if t is None else t.double() for t in tensors]
                exact = window_attention_definition(*double, *rest)[0]
                plain = window_attention_definition(*tensors, *rest)[0]
                errors.add(f"{H}:{H_kv} {W} of {C} {way}", dtype, found, plain, exact)
    errors.report()


@torch.no_grad()
def check_rope(lab: Lab) -> None:
    errors = Errors(lab, "rope_write_kv")
    for model in rope.MODELS:
        tensors, metadata = rope.problem(model, 2, 64 if on_gpu() else 8, 512 if on_gpu() else 64)
        start, length, offset = metadata[:3]
        length -= 3
        for dtype in DTYPES:
            q, k, v, table, *caches = tensors
            inputs = [*(t.to(dtype) for t in (q, k, v)), table, *(t.to(dtype) for t in caches)]
            found = [t.clone() for t in inputs]
            exact, plain = [t.double() for t in inputs], [t.clone() for t in inputs]
            poison()
            rotated = rope_write_kv(
                *found, window_start=start, window_length=length, position_offset=offset
            )
            exact_q = rope_write_kv_definition(*exact, *metadata, True)
            plain_q = rope_write_kv_definition(*plain, *metadata, True)
            errors.add(f"{model} q", dtype, rotated, plain_q, exact_q)
            for i, name in ((4, "k"), (5, "v")):
                errors.add(f"{model} {name}", dtype, found[i], plain[i], exact[i])
    errors.report()


@torch.no_grad()
def check_linear(lab: Lab) -> None:
    errors = Errors(lab, "window_linear")
    # 4605 is no multiple of anything that a tile is.
    shapes = [(33, 4605, 4096), (64, 12288, 4096), (128, 18944, 3584)]
    for rows, F, E in shapes if on_gpu() else [(5, 93, 64), (9, 96, 64)]:
        for dtype in DTYPES:
            x = torch.randn(rows, E, device=device()).to(dtype)
            weight = (torch.randn(2 * F, E, device=device()) / E**0.5).to(dtype)
            bias = torch.randn(2 * F, device=device()).to(dtype)
            for gated, b in ((False, bias), (True, None)):
                poison()
                found = window_linear(x, weight, b, gated=gated)
                given = (x, weight, b)
                double = [None if t is None else t.double() for t in given]
                exact = window_linear_reference(*double, gated=gated)
                plain = window_linear_reference(*given, gated=gated)
                errors.add(f"{rows} x {E} x {F}{' gated' * gated}", dtype, found, plain, exact)
    errors.report()


@torch.no_grad()
def check_add_norm(lab: Lab) -> None:
    errors = Errors(lab, "linear_add_norm")
    shapes = [(33, 4093, 4096), (64, 4096, 12288), (128, 3584, 18944)]
    for rows, E, F in shapes if on_gpu() else [(5, 93, 64), (9, 96, 64)]:
        for dtype in DTYPES:
            x, before = (torch.randn(rows, n, device=device()).to(dtype) for n in (F, E))
            weight = (torch.randn(E, F, device=device()) / F**0.5).to(dtype)
            gain = torch.rand(E, device=device()).to(dtype)
            residuals = [before.clone(), before.clone(), before.double()]
            poison()
            found = linear_add_norm(x, weight, residuals[0], gain, 1e-5)
            plain = linear_add_norm_definition(x, weight, residuals[1], gain, 1e-5)
            double = (x.double(), weight.double(), residuals[2], gain.double())
            exact = linear_add_norm_definition(*double, 1e-5)
            case = f"{rows} x {F} x {E}"
            errors.add(f"{case} norm", dtype, found, plain, exact)
            errors.add(f"{case} residual", dtype, *residuals)
    errors.report()


def check_place(lab: Lab) -> None:
    """Steps of random windows, rows of which need another step."""
    different = 0
    for shape in place.SHAPES:
        step = place.Step(*shape)
        poison()
        different += not all(map(torch.equal, step.op(), step.by(place_rows_definition)))
    lab.figure("place differs", different, f"of {len(place.SHAPES)}")
    if different:
        lab.problem(f"place_rows: {different} steps differ")


@torch.no_grad()
def check_unmask(lab: Lab) -> None:
    """Steps side by side from equal states, with other confidences at each."""
    different, steps = 0, 12
    for rule in unmask.RULES:
        step = unmask.Step(rule, 8, 1024, 256) if on_gpu() else unmask.Step(rule, 2, 16, 64)
        other = copy.deepcopy(step)
        for _ in range(steps):
            step.confidence.copy_(1 - 0.3 * torch.rand_like(step.confidence) ** 2)
            other.confidence.copy_(step.confidence)
            poison()
            found = [step.call(unmask_and_slide), *step.tensors(step.canvas, step.state)]
            exact = [other.call(unmask_and_slide_definition)]
            exact += other.tensors(other.canvas, other.state)
            different += not all(map(torch.equal, found, exact))
    lab.figure("unmask differs", different, f"of {steps * len(unmask.RULES)}")
    if different:
        lab.problem(f"unmask_and_slide: {different} steps differ")


# --- recorded trajectories --------------------------------------------------------------------


def counted(said: str) -> dict[str, int]:
    """Pytest's last line that counts: "3 failed, 70 passed in 5.0s"."""
    lines = [
        line for line in said.splitlines() if re.search(r"\d+ (passed|failed|error|skip)", line)
    ]
    if not lines:
        return {}
    return {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|error|skipped)", lines[-1])
    }


def goldens(lab: Lab) -> None:
    """`tests/test_cuda.py` in a process of its own."""
    if not (ROOT / TESTS).is_file():
        raise NotHereError(f"no {TESTS} here")
    command = [sys.executable, "-m", "pytest", TESTS, "-q", "--tb=line", "-o", "addopts="]
    if on_gpu() and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(GOLDEN_WORKERS, os.cpu_count() or 1))]
    try:
        # The run's own limit comes first, after which --continue runs this again.
        limit = min(GOLDEN_SECONDS, lab.left + 10)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode().splitlines()
        raise TimeoutError(f"{TESTS} after {expired.timeout:.0f} s: {said[-1:]}") from expired
    counts = counted(done.stdout)
    if counts.get("skipped") and not counts.get("passed"):
        raise NotHereError(f"{TESTS}: skipped, it needs a GPU")
    if done.returncode not in (0, 1) or not counts:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"{TESTS}: pytest ended with {done.returncode}: {said[-1:]}")
    failed = counts.get("failed", 0) + counts.get("error", 0)
    lab.details["goldens"] = counts | {"lines": done.stdout.splitlines()[-20:] if failed else []}
    lab.figure("goldens failed", failed, f"{counts.get('passed', 0)} passed")
    if failed:
        lab.problem(f"{TESTS}: {failed} failed")

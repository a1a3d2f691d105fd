"""The kernels' parts of `benchmarks/lab.py`: time per call, on the inputs of `bench_*.py`."""

from __future__ import annotations

import math

from benchmarks import bench_lm_head_confidence as head
from benchmarks import bench_place_rows as place
from benchmarks import bench_rope_write_kv as rope
from benchmarks import bench_token_confidence as token
from benchmarks import bench_unmask_and_slide as unmask
from benchmarks import bench_window_attention as attention
from benchmarks.lab_state import Lab, one_line
from benchmarks.measure import Timing, on_gpu, timing
from dsb_kernels.commit import unmask_and_slide

LLADA_VOCABULARY = 126464


def us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}" if seconds < 1e-4 else f"{seconds * 1e6:.0f}"


def keep(lab: Lab, part: str, case: str, found: Timing) -> Timing:
    """Both times of a case go into the file."""
    times = {"cold_us": round(found.cold * 1e6, 2), "warm_us": round(found.warm * 1e6, 2)}
    lab.details.setdefault(part, {})[case] = times
    lab.save()
    return found


def ceilings(lab: Lab) -> None:
    found = lab.ceilings()
    lab.fact("copy, read and written", found.gb_per_s, "GB/s")
    lab.fact("matrix product", found.tflops, "TFLOP/s")


# --- scoring ----------------------------------------------------------------------------------


def scoring(lab: Lab) -> None:
    """`token_confidence` and `lm_head_confidence`."""
    bandwidth = lab.ceilings().bandwidth

    def time_token(shape: token.Shape, contender: str = "op") -> Timing:
        found = timing(token.maker(shape, contender), token.bytes_needed(shape))
        return keep(lab, "scoring", f"token_confidence {shape}: {contender}", found)

    many, few, both = [(16, 3000)], [(8, 3000)], [(8, 3000)]
    if on_gpu():
        many = [(1024, V) for V in token.VOCABULARIES] + [(4096, LLADA_VOCABULARY)]
        few = [(64, V) for V in token.VOCABULARIES]
        both = [(rows, LLADA_VOCABULARY) for rows in (64, 1024)]
    greedy = ("probability", 0.0)
    shares = {}
    for rows, V in many:
        shape = (rows, V, *greedy)
        shares[f"{rows} x {V}"] = token.bytes_needed(shape) / time_token(shape).cold / bandwidth
    lab.figure("token bandwidth", min(shares.values()), listed(shares, "{:.0%}"))
    times = {f"{rows} x {V}": time_token((rows, V, *greedy)) for rows, V in few}
    lab.figure("token 64", 1e6 * max(t.cold for t in times.values()), cold_and_warm(times))
    ratios = {}
    for rows, V in both:
        shape = (rows, V, *greedy)
        ratios[f"{rows} rows"] = time_token(shape, "float64").cold / time_token(shape).cold
    lab.figure("token float64", min(ratios.values()), listed(ratios, "{:.1f}"))

    slower: dict[str, float] = {}
    for rows in (32, 64, 128):
        shares = {}
        for name in head.HEADS:
            needs = head.needs(name, rows)["bytes_needed"]
            op, cublas = (
                keep(lab, "scoring", f"lm_head_confidence {name} {rows} rows: {contender}",
                     timing(head.maker(name, rows, contender), needs))
                for contender in ("op", "matmul + op")
            )  # fmt: skip
            shares[name] = needs / op.cold / bandwidth
            slower[f"{name} {rows}"] = cublas.cold / op.cold
        lab.figure(f"head {rows}", min(shares.values()), listed(shares, "{:.0%}"))
    lab.figure("head cublas", min(slower.values()), f"at {min(slower, key=slower.get)}")


def listed(values: dict[str, float], how: str) -> str:
    return ", ".join(f"{name} {how.format(value)}" for name, value in values.items())


def cold_and_warm(times: dict[str, Timing]) -> str:
    """Of the slowest."""
    name = max(times, key=lambda name: times[name].cold)
    return f"{name}; {us(times[name].warm)} with a warm L2"


# --- small ops --------------------------------------------------------------------------------


def small(lab: Lab) -> None:
    """`place_rows`, `unmask_and_slide` and `rope_write_kv`."""
    for shape in place.SHAPES:
        keep(
            lab,
            "small",
            f"place_rows {shape}",
            timing(place.maker(shape), place.bytes_needed(shape)),
        )
    shapes = unmask.SHAPES
    if on_gpu():
        shapes = [shape for shape in shapes if shape[3] == 256]
    times = {}
    for shape in shapes:
        rule, B, *_ = shape
        make = unmask.maker(shape, unmask_and_slide)
        found = timing(make, unmask.bytes_needed(shape))
        times[f"{rule} B={B}"] = keep(lab, "small", f"unmask_and_slide {shape}", found)
    lab.figure("unmask", 1e6 * max(t.cold for t in times.values()), cold_and_warm(times))
    times = {}
    shapes = [(model, 1, 64, 1024) for model in rope.MODELS] if on_gpu() else rope.SHAPES
    for shape in shapes:
        found = timing(rope.maker(shape, rope.call_of("op")), rope.bytes_needed(shape))
        times[shape[0]] = keep(lab, "small", f"rope_write_kv {shape}", found)
    lab.figure("rope 64", 1e6 * max(t.cold for t in times.values()), cold_and_warm(times))


# --- attention --------------------------------------------------------------------------------


def attention_shapes() -> list[attention.Shape]:
    """Those that targets name first: time may run out."""
    if not on_gpu():
        return attention.SHAPES
    long = [("LLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128, 32)]
    long.append(("Dream-7B", 1, 128, 16384))
    rest = [("Dream-7B", 1, W, C) for C in (4096, 16384) for W in (64, 32)]
    rest += [("iLLaDA-8B", 1, W, C) for C in (4096, 16384) for W in (64, 128)]
    rest += [(model, 1, 64, 1024) for model in attention.MODELS]
    return long + rest + [(model, 8, 64, 4096) for model in attention.MODELS]


def attention_part(lab: Lab) -> None:
    """`window_attention` against what else there is."""
    found: dict[attention.Shape, dict[str, Timing]] = {}
    try:
        for shape in attention_shapes():
            found[shape] = time_attention(lab, shape)
    finally:  # of those that there was time for
        report_attention(lab, found)


def time_attention(lab: Lab, shape: attention.Shape) -> dict[str, Timing]:
    needed, times = attention.needs(shape)["bytes_needed"], {}
    for contender in ("op", *attention.others()):
        case = f"window_attention {shape}: {contender}"
        try:
            times[contender] = keep(
                lab, "attention", case, timing(attention.maker(shape, contender), needed)
            )
        except Exception as error:  # one that does not take a shape is out of it there
            lab.problem(f"{case}: {one_line(error)}")
            if contender == "op":
                raise
    return times


def report_attention(lab: Lab, found: dict[attention.Shape, dict[str, Timing]]) -> None:
    bandwidth = lab.ceilings().bandwidth
    ratios, best = {}, {}
    for shape, times in found.items():
        rest = {name: t.cold for name, t in times.items() if name != "op"}
        if rest:
            best[shape] = min(rest, key=rest.get)
            ratios[shape] = rest[best[shape]] / times["op"].cold
    if ratios:
        worst = min(ratios, key=ratios.get)
        said = f"{words(worst)}, {best[worst]}; {len(ratios)} of {len(attention_shapes())} shapes"
        lab.figure("attention worst", ratios[worst], said)
        mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
        lab.figure("attention mean", mean, f"{len(ratios)} shapes")

    for key, C in (("4k", 4096), ("16k", 16384)):
        shares = {
            f"{shape[2]} rows": attention.needs(shape)["bytes_needed"] / t["op"].cold / bandwidth
            for shape, t in found.items()
            if shape[:2] == ("LLaDA-8B", 1) and (shape[3] == C or not on_gpu())
        }
        if shares:
            lab.figure(f"attention {key}", min(shares.values()), listed(shares, "{:.0%}"))
    for shape, times in found.items():
        if shape[0] == "Dream-7B" and (shape[2:] == (128, 16384) or not on_gpu()):
            tflops = attention.needs(shape)["flops"] / times["op"].cold * 1e-12
            lab.figure("attention dream", tflops, f"{us(times['op'].cold)} µs")


def words(shape: attention.Shape) -> str:
    model, B, W, C = shape
    return f"{model} B={B} W={W} C={C}"

"""benchmarks/decode.py for real at tiny shapes: its loops, its checks, what it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from benchmarks import against, decode, roofline
from benchmarks.decode import Case, scale_head, step_times
from benchmarks.decode_report import step_figures, width_class
from benchmarks.eager import eager_generate
from benchmarks.roofline import Ceilings, budget
from benchmarks.step_cost import PHASES, StepSize
from benchmarks.trajectory import Agreement, EagerClock, Trajectory, agreement
from dsb_runtime.measure.models import PRESETS, random_model, random_prompts
from dsb_runtime.measure.steps import StepRecorder, StepWork, TimedEngine
from dsb_runtime.measure.timing import timed
from tests.recorded import Recorder as Replays

ROOT = Path(__file__).parents[1]
SHAPE = ("--prompt", "24", "--gen", "32", "--block", "8", "--rounds", "2")
SETTINGS = {"gen_length": 32, "block_length": 8, "schedule": "dsb", "cache": "dsb"}


def case_of(name: str, batch: int = 1, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    preset = PRESETS[name]
    settings = {**SETTINGS, "prefix_window": preset.family.prefix_window, **more}
    engine = TimedEngine(random_model(preset, dtype, "cpu"))
    prompts = random_prompts(engine.model, None, batch, 24, 0)
    if settings.get("threshold"):
        scale_head(engine, prompts[:1], settings, 3.0)
    return Case(engine, prompts, settings)


EXACT = ("--preset", "tiny", "--batch", "1", "2", "--tokens-per-forward", "3")
OPTIONS = {
    "exact": (*EXACT, "--phases"),
    "rounded": ("--preset", "tiny-dream", "--dtype", "bfloat16", "--batch", "2"),
    "alone": (*EXACT, "--no-eager"),
}


@pytest.fixture(scope="module")
def record_of(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """What a run with some of OPTIONS wrote, its file and what it printed."""

    @functools.cache
    def run(name: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(name)
        file, picture = folder / "decode.json", folder / "decode.png"
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            decode.main([*SHAPE, *OPTIONS[name], "--json", str(file), "--plot", str(picture)])
        assert picture.read_bytes().startswith(b"\x89PNG")
        return {"output": stream.getvalue(), "file": file, **json.loads(file.read_text())}

    return run


@pytest.mark.parametrize("which", ["exact", "rounded"])
def test_what_is_written(which, record_of):
    result = record_of(which)
    assert result["command"].startswith("python -m benchmarks.decode --prompt 24")
    assert result["versions"]["torch"] == torch.__version__
    assert min(result["ceilings"].values()) > 0
    for run in result["runs"]:
        batch = run["batch"]
        assert run["tokens"] == 32 * batch and f"batch {batch}:" in result["output"]
        seconds = run["seconds"]
        assert set(seconds) == {"ours", "eager", "floor", "floor_all_positions"}
        assert min(seconds.values()) > 0
        assert run["tokens_per_second"] == pytest.approx(32 * batch / seconds["ours"])
        assert run["eager_tokens_per_second"] == pytest.approx(32 * batch / seconds["eager"])
        # A loop holds its own linear layers.
        assert run["floor_over_eager"] < 1 and run["ours_over_floor"] > 1
        for kind in ("window", "refresh"):
            step = run["steps"][kind]
            assert run[f"{kind}_step_ms"] == step["ms"] > 0
            assert run[f"eager_{kind}_step_ms"] > 0 and run[f"free_{kind}_step_ms"] > 0
            assert 0 < step["share_of_floor"] < 1
        assert 0 < run["free_window_share_of_weights_limit"] < 1
        assert 0 < run["free_refresh_share_of_products_limit"] < 1
        assert run["window_width"] < 56 == run["steps"]["refresh"]["width"]
        assert run["wasted_launches"] == 0, "nothing is speculative without captured steps"
        assert run["peak_memory_bytes"] > 1e8
        assert run["gpu_idle_share"] is None and run["gpu_wait_share"] is None
        products = [run["steps"][kind]["products_ms"] for kind in ("window", "refresh")]
        most = run["forwards"] * max(products) / (1e3 * seconds["ours"])
        assert 0.3 * most < run["share_of_products_limit"] < batch * most


def test_the_share_of_a_limit_is_that_of_the_free_runs_steps():
    """Whatever the watched run's steps of that kind took: its refreshes run other kernels."""
    free = [("refresh", 0.04), ("window", 0.02), ("window", 0.03), ("refresh", 0.06)]
    steps = {
        "window": {"ms": 1.0, "weights_ms": 5.0, "products_ms": 1.0},
        "refresh": {"ms": 1.0, "weights_ms": 5.0, "products_ms": 25.0},
    }
    assert decode.free_share(free, steps, "window", "weights") == pytest.approx(0.2)
    assert decode.free_share(free, steps, "refresh", "products") == pytest.approx(0.5)
    assert decode.free_share(free[1:3], steps, "refresh", "products") is None
    assert decode.free_share(free, {}, "window", "weights") is None


def test_both_loops_commit_the_same_in_float32(record_of):
    exact = record_of("exact")
    for run in exact["runs"]:
        check = run["check"]
        assert check["same_tokens"] and check["decisions"] == run["tokens"]
        assert check["decisions_agreed"] == check["positions_agreed"] == 1
    assert exact["output"].count("the same tokens at the same forwards from both loops") == 2
    assert [run["batch"] for run in exact["runs"]] == [1, 2]


def test_one_trajectory_in_bfloat16(record_of):
    rounded = record_of("rounded")
    (run,) = rounded["runs"]
    assert run["forwards"] == rounded["settings"]["steps"] == round(32 / 3.5)
    assert run["tokens_per_forward"] == pytest.approx(32 / 9)
    check = run["check"]
    assert not check["same_tokens"] and run["timed_run_repeats_the_recorded"]
    assert check["decisions"] == 64
    flipped = check["flipped_by_rounding"]
    assert (
        0 <= min(flipped["ours"], flipped["eager"]) <= max(flipped["ours"], flipped["eager"]) < 32
    )
    assert flipped["ours_over_eager"] == flipped["ours"] / max(flipped["eager"], 1) < 3
    assert f"otherwise than ours in {flipped['ours']} of them" in rounded["output"]
    assert 0.5 < check["decisions_agreed"] <= check["positions_agreed"] <= 1
    assert f"agree on {check['decisions_agreed']:.1%}" in rounded["output"]


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
@pytest.mark.parametrize(
    "more",
    [
        {"threshold": 0.9},
        {"threshold": 0.9, "max_block_length": 8},
        {"threshold": 0.9, "prefix_window": 1, "max_block_length": 12},
        {"steps": 11},
        {"steps": 32, "max_block_length": 8},
    ],
)
def test_the_eager_loop_is_the_method(name, more):
    """Making a case compares tokens and commits, forward by forward."""
    case = case_of(name, 2, **more)
    assert case.agreed == Agreement(64, 64, 64)
    assert {step.kind for step in case.record.rows[1]} == {"refresh", "window"}
    record = case.record
    assert record.num_commits == 64 and record.row_forwards == sum(case.out.row_nfe)
    assert len(record.sizes) == case.out.nfe
    assert record.sizes[0] == StepSize(2, 112, 16, 56, 32, 4)


def test_the_budget_reads_what_is_written(record_of, capsys, tmp_path):
    """`test_measurement_beside` in `test_roofline.py` says what it makes of it."""
    path, record = tmp_path / "budget.json", record_of("exact")
    roofline.main(["--measured", str(record["file"]), "--batch", "2", "--json", str(path)])
    result, run = json.loads(path.read_text()), record["runs"][-1]
    assert result["measured"]["window_step_ms"] == run["window_step_ms"]
    assert 0 < result["measured"]["share_of_floor"] < 1
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = [float(line[-3]) for line in lines if line[1].strip() == "layer: mlp"]
    times = [run["phase_us"][kind]["mlp"] for kind in ("window", "refresh")]
    assert shown == pytest.approx(times, abs=0.051)


def test_phases_are_most_of_a_step(record_of):
    inside, of_timed = [], []
    for run in record_of("exact")["runs"]:
        assert set(run["phase_us"]) == {"window", "refresh"}
        for kind, times in run["phase_us"].items():
            assert list(times)[:-1] == list(PHASES) and min(times.values()) > 0
            whole = sum(times.values())
            inside.append(sum(times[name] for name in PHASES) / whole)
            of_timed.append(whole / (1e3 * run[f"{kind}_step_ms"]))
    # A profiled step is about a timed one: a profiler costs time, which a tiny model's step
    # consists of. On a busy machine one of the four may have had to wait.
    assert max(inside) > 0.5 and any(0.3 < ratio < 10 for ratio in of_timed), (inside, of_timed)


@pytest.mark.parametrize("capture", [None, Replays()], ids=["direct", "replayed"])
def test_every_step_is_timed_once(capture):
    """Those of a watched run are the recorded ones; ahead of the host there may be more."""
    model = random_model(PRESETS["tiny"], torch.float32, "cpu")
    engine, recorder = TimedEngine(model, capture=capture), StepRecorder(model, 64, 32)
    prompt = random_prompts(model, None, 2, 64, 0)
    engine.generate(prompt, on_step=recorder, **SETTINGS, steps=9)
    engine.take()
    case = SimpleNamespace(
        ours=lambda each=None: engine.generate(prompt, on_step=each, **SETTINGS, steps=9)
    )
    times = step_times(case, engine, lambda event: None)
    assert [kind for kind, _ in times] == recorder.kinds and min(s for _, s in times) > 0
    out, seconds = timed(lambda: engine.generate(prompt, **SETTINGS, steps=9), engine.device)
    times = engine.take()
    assert len(times) >= out.nfe and 0 < sum(s for _, s in times) < seconds
    assert engine.take() == []


def test_alone_it_is_not_compared(record_of):
    record = record_of("alone")
    for run in record["runs"]:
        assert set(run["seconds"]) == {"ours", "floor", "floor_all_positions"}
        assert run["check"] is None and run["ours_over_eager"] is None
        assert run["eager_window_step_ms"] is None and run["ours_over_floor"] > 1
    assert "not compared with the eager loop (--no-eager)" in record["output"]


def test_another_loop_stops_it():
    """Other commits, or one other token of the last row."""
    case = case_of("tiny", 2, threshold=0.9)
    eager = case.eager()
    eager[-1].commits[3] = {}
    with pytest.raises(SystemExit, match="the loops commit differently: nothing is timed"):
        case.check(eager)
    eager[-1].sequences[0, -1] += 1
    with pytest.raises(SystemExit, match="return different tokens: nothing is timed"):
        case.check(eager)


def test_following_takes_the_recorded_path_and_decides_freely():
    """Driven along another model's trajectory, the loop goes its way and decides as it would."""
    case = case_of("tiny", dtype=torch.float32, steps=9)
    path = case.record.rows[0]
    clock = EagerClock(torch.device("cpu"))
    settings = {"gen_length": 32, "block_length": 8, "max_block_length": None,
                "prefix_window": 24, "steps": 9, "follow": path, "on_step": clock}  # fmt: skip
    same = eager_generate(case.model, case.prompt, **settings)
    assert agreement(case.record.commits, same.commits) == Agreement(32, 32, 32)
    stranger = random_model(PRESETS["tiny"], torch.float32, "cpu", seed=1)
    other = eager_generate(stranger, case.prompt, **settings)
    assert torch.equal(other.sequences, case.out.sequences)
    assert other.tokens_per_forward == case.out.tokens_per_forward
    expected = [56 if step.kind == "refresh" else step.width for step in path]
    assert other.positions_per_forward == expected
    assert expected == [step.widest for step in case.record.steps]
    assert [kind for kind, _ in clock.steps] == 2 * [step.kind for step in path]
    assert min(seconds for _, seconds in clock.steps) > 0
    result = agreement(case.record.commits, other.commits)
    assert result.both < 8 and result.both <= result.positions < 32


def test_agreement_counts_positions_and_tokens():
    commits = [{0: 7, 2: 8}, {1: 9}]
    assert agreement(commits, [{0: 7, 1: 8}, {1: 3}]) == Agreement(3, 2, 1)
    with pytest.raises(ValueError, match="shorter"):
        agreement(commits, [{0: 7}])


def test_step_figures_by_hand():
    preset, limits = PRESETS["tiny"], Ceilings(10, 0.1, "")
    record = Trajectory(random_model(preset, torch.float32, "meta"), 24, 32)
    works = {
        "refresh": StepWork("refresh", 1, 56, 8, 56),
        "window": StepWork("window", 1, 40, 8, 40),
    }
    record.steps += [works[kind] for kind in ("refresh", "window", "window", "refresh")]
    # A call is a third; its first step is left out.
    seconds = [9, 1, 2, 5, 8, 3, 2, 4, 7, 2, 2, 6]
    times = list(zip(3 * record.kinds, seconds, strict=True))
    figures = step_figures(record, times, preset, limits)
    window, refresh = figures["window"], figures["refresh"]
    assert (window["steps"], window["width"], window["ms"]) == (2, 40, 2000)
    assert (refresh["steps"], refresh["width"], refresh["ms"]) == (1, 56, 5000)
    one = budget(preset, "window", record.sizes[1], limits)
    assert window["share_of_floor"] == pytest.approx(one.floor_ms / 2000)
    assert window["share_of_weights_limit"] == pytest.approx(one.weights_ms / 2000)
    moved = sum(phase["bytes"] for phase in one.phases.values())
    flops = sum(phase["flops"] for phase in one.phases.values())
    assert window["gb_per_s"] == pytest.approx(moved / 2e9)
    assert window["tflops"] == pytest.approx(flops / 2e12)
    assert list(window["by_width"]) == ["<= 64"] and window["by_width"]["<= 64"]["steps"] == 2
    times[1] = ("refresh", 1)
    with pytest.raises(RuntimeError, match="other steps than the recorded"):
        step_figures(record, times, preset, limits)
    classes = ["<= 32", "<= 32", "<= 64", "<= 256", "> 256"]
    assert [width_class(n) for n in (1, 32, 33, 256, 257)] == classes


def test_two_checkouts_in_turn(tmp_path, capsys):
    """This checkout against itself: the same tokens, and a ratio of times; or other tokens."""
    path = tmp_path / "ratio.json"
    decode.main(["--preset", "tiny-dream", *SHAPE, "--against", str(ROOT), "--json", str(path)])
    (line,) = json.loads(path.read_text())["comparisons"]
    assert line["batch"] == 1 and {len(times) for times in line["seconds"].values()} == {2}
    assert line["ratio_of_medians"] == line["medians"]["ours"] / line["medians"]["other"]
    assert f"ratio of medians {line['ratio_of_medians']:.3f}" in capsys.readouterr().out
    checkouts = {
        name: SimpleNamespace(run=lambda batch, name=name: {"forwards": 3, "tokens": name})
        for name in ("ours", "other")
    }
    with pytest.raises(SystemExit, match="differ in tokens: nothing is timed"):
        against.compare_batch(checkouts, 1, SimpleNamespace(dtype="float32", rounds=1))


def test_a_batch_that_fails_leaves_those_before_it(monkeypatch, tmp_path):
    measure, path = decode.measure, tmp_path / "decode.json"

    def fails(case: Any, *args: Any) -> dict[str, Any]:
        if len(case.prompt) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(case, *args)

    monkeypatch.setattr(decode, "measure", fails)
    options = ["--preset", "tiny", *SHAPE, "--rounds", "1", "--batch", "1", "2"]
    with pytest.raises(torch.OutOfMemoryError):
        decode.main([*options, "--json", str(path)])
    assert [run["batch"] for run in json.loads(path.read_text())["runs"]] == [1]


def test_a_tied_head_is_the_embedding():
    preset = PRESETS["tiny"]
    model = random_model(dataclasses.replace(preset, tied=True), torch.bfloat16, "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert dsb.generate(model, random_prompts(model, None, 1, 8, 0), **SETTINGS).nfe > 0


def test_a_run_that_differs_when_watched_stops_it(monkeypatch):
    """In 16 bits other tokens may be taken where nothing watches, but not more or fewer."""
    free = dsb.Engine.generate

    def other(self: dsb.Engine, *args: Any, on_step: Any = None, **settings: Any) -> Any:
        if on_step is None:
            settings = {**settings, **unwatched}
        return free(self, *args, on_step=on_step, **settings)

    monkeypatch.setattr(dsb.Engine, "generate", other)
    unwatched: dict[str, Any] = {"max_block_length": 8}
    # One token a step: whatever was rounded where, no window can hold too few.
    case = case_of("tiny", dtype=torch.bfloat16, steps=32, max_block_length=32)
    assert not case.repeats and case.agreed.decisions == 32
    unwatched["steps"] = 31
    with pytest.raises(SystemExit, match="a watched run decides differently: nothing is timed"):
        case_of("tiny", dtype=torch.bfloat16, steps=32)

"""The budget: bytes and FLOPs against hand counts, the models' parameters and torch's counter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import GPUS, Ceilings, budget, main, refresh_share, step_sizes
from benchmarks.step_cost import (
    LAYER_PHASES,
    PHASES,
    Cost,
    StepSize,
    layer_cost,
    step_cost,
    total_cost,
    weight_bytes,
)
from dsb_runtime.measure.models import PRESETS, random_model, random_prompts

TINY, DREAM = PRESETS["tiny"], PRESETS["tiny-dream"]
SHAPE = StepSize(batch=1, num_tokens=40, scored=16, length=96, gen=64, itemsize=2)


@pytest.fixture
def run(tmp_path, capsys) -> Callable[[str], tuple[dict[str, Any], str]]:
    """What the command writes and what it prints."""

    def run(options: str) -> tuple[dict[str, Any], str]:
        path = tmp_path / "budget.json"
        main([*options.split(), "--json", str(path)])
        return json.loads(path.read_text()), capsys.readouterr().out

    return run


def test_first_layer_by_hand():
    """40 rows of 64 numbers; 4 heads of 16; MLP 160; 96 positions; 2 bytes a number."""
    assert layer_cost(TINY, SHAPE, 0) == {
        # Two gains of 64. Read 40 x 64 and write their norm; read twice and write twice the next.
        "norm": Cost(256, 0, 2 * 2560 * 2 + 4 * 2560 * 2),
        # (192, 64) weights; 2560 in, 7680 out.
        "qkv": Cost(24576, 0, 5120 + 15360, 2 * 40 * 64 * 192),
        # 7680 in and out; 40 rows of 16 float32 cosines and sines.
        "rope+write": Cost(0, 0, 2 * 15360 + 40 * 64),
        # 96 x 64 keys and as many values; 2560 in and out; two products of 4 x 40 x 96 x 16.
        "attention": Cost(0, 24576, 2 * 5120, 2 * 2 * 4 * 40 * 96 * 16),
        "out": Cost(8192, 0, 2 * 5120, 2 * 40 * 64 * 64),
        # Three (160, 64); 2560 in, 6400 out; 6400 in, 2560 out.
        "mlp": Cost(61440, 0, 2 * (5120 + 12800), 2 * 3 * 40 * 64 * 160),
    }


def test_last_layer_by_hand():
    """K and V of 40 rows, what follows of 16; 7 heads of 16 and one KV head; biases."""
    assert layer_cost(DREAM, SHAPE, 1) == {
        # 40 x 112: read twice, write twice; then 16 x 112 likewise.
        "norm": Cost(448, 0, 4 * 8960 + 4 * 3584),
        # (112 + 32, 112) weights and 144 biases; out: 16 x 112 and 40 x 32.
        "qkv": Cost(32256 + 288, 0, 8960 + 3584 + 2560, 2 * 112 * (16 * 112 + 40 * 32)),
        "rope+write": Cost(0, 0, 2 * (3584 + 2560) + 2560),
        "attention": Cost(0, 96 * 32 * 2, 2 * 3584, 4 * 7 * 16 * 96 * 16),
        "out": Cost(25088, 0, 2 * 3584, 2 * 16 * 112 * 112),
        "mlp": Cost(107520, 0, 2 * (3584 + 5120), 6 * 16 * 112 * 160),
    }


def test_outside_the_layers_by_hand():
    result = step_cost(TINY, SHAPE)
    assert tuple(result) == PHASES
    assert result["place"] == [Cost(0, 0, 40 * 2 * 8 + 16 * (4 + 2 * 8 + 1))]
    assert result["embed"] == [Cost(0, 0, 40 * 8 + 2 * 5120)]
    assert result["final norm"] == [Cost(128, 0, 3 * 16 * 64 * 2)]
    assert result["score"] == [Cost(65536, 0, 16 * (128 + 12), 2 * 16 * 64 * 512)]
    assert result["unmask"] == [Cost(0, 0, 64 * 8 + 16 * (8 + 4 + 4 + 4 + 8))]
    assert [len(result[name]) for name in LAYER_PHASES] == [2] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_the_models_own(name, dtype):
    model = random_model(PRESETS[name], dtype, "meta")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert weight_bytes(PRESETS[name], dtype.itemsize) == sum(p.nbytes for p in model.parameters())
    billions = {"llada-8b": 8.02, "illada-8b": 7.62}.get(name)  # as published
    assert billions in (None, round(weight_bytes(PRESETS[name], 1) / 1e9, 2))


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
def test_flops_are_those_that_torch_counts(name):
    """A full forward through transformers, every row scored; two prompts."""
    preset, L = PRESETS[name], 48
    model = random_model(preset, torch.float32, "cpu")
    model.set_attn_implementation("eager")  # products that the counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(random_prompts(model, None, 2, L, 0))
    counts = counter.get_flop_counts()
    # Some versions multiply positions by frequencies in a matrix product.
    angles = counts.get(f"{type(model).__name__}.model.rotary_emb", {})
    result = counter.get_total_flops() - sum(angles.values())
    assert result == total_cost(preset, StepSize(2, 2 * L, 2 * L, L, 16, 4)).flops


@pytest.mark.parametrize("name", ["tiny", "tiny-dream"])
def test_a_batch_has_the_weights_of_one_prompt(name):
    def cost(**change: int) -> Cost:
        return total_cost(PRESETS[name], dataclasses.replace(SHAPE, **change))

    one, batch = cost(), cost(batch=2, num_tokens=80, scored=32)
    assert batch == Cost(one.weights, 2 * one.cache, 2 * one.activations, 2 * one.flops)
    wide, longer = cost(itemsize=4), cost(length=2 * 96)
    assert (wide.weights, wide.cache, wide.flops) == (2 * one.weights, 2 * one.cache, one.flops)
    assert (longer.weights, longer.cache) == (one.weights, 2 * one.cache)


def test_budget_sums_the_phases():
    cost = Cost(weights=600, cache=300, activations=100, flops=5000)
    assert (cost.seconds(1e3, 1e6), cost.seconds(1e6, 1e3)) == (1.0, 5.0), "the slower of both"
    ceilings = Ceilings(1e-3, 1e-5, "made up")  # 1e6 B/s, 1e7 FLOP/s
    result = budget(TINY, "window", SHAPE, ceilings)
    assert result.phases["mlp"]["limit"] == "FLOPs" and result.phases["norm"]["limit"] == "bytes"
    by_layer = [layer_cost(TINY, SHAPE, i)["mlp"].flops / 1e7 * 1e6 for i in (0, 1)]
    assert result.phases["mlp"]["floor_us"] == pytest.approx(sum(by_layer))
    assert result.phases["mlp"]["one_layer_us"] == pytest.approx(by_layer[0])
    floors = [phase["floor_us"] for phase in result.phases.values()]
    assert result.floor_ms == pytest.approx(sum(floors) / 1e3)
    whole = total_cost(TINY, SHAPE)
    assert result.weights_ms == pytest.approx(whole.weights / 1e6 * 1e3)
    assert result.products_ms == pytest.approx(whole.flops / 1e7 * 1e3)
    assert result.floor_ms >= max(result.weights_ms, result.products_ms)


def test_step_sizes_and_refreshes():
    """Without --width a window is a block and the family's prefix."""
    window = step_sizes(TINY, 2, 100, 64, 16, None, 2)["window"]
    assert window == StepSize(2, 2 * (16 + 24), 32, 164, 64, 2)
    assert step_sizes(DREAM, 1, 100, 64, 16, None, 2)["window"].num_tokens == 16 + 4
    assert refresh_share(32, 4) == 1 / 8
    assert refresh_share(32, 3.5) == 1 / 10  # 9 forwards commit 31.5
    assert refresh_share(32, 32) == 1


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["llada-8b", "illada-8b", "dream-7b"])
def test_command(name, gpu, run):
    result, output = run(f"--preset {name} --gpu {gpu}")
    steps = result["steps"]
    mean = 0.9 * steps["window"]["floor_ms"] + 0.1 * steps["refresh"]["floor_ms"]
    assert result["step_ms"] == pytest.approx(mean)
    assert result["tokens_per_second"] == pytest.approx(3.5 / mean * 1e3)
    assert f"{result['tokens_per_second']:.1f} tokens/s" in output and "measured" not in output
    # An 8B model's window step is bound by its weights, its refresh by its products.
    assert 0.9 < steps["window"]["weights_ms"] / steps["window"]["floor_ms"] < 1
    assert 0.8 < steps["refresh"]["products_ms"] / steps["refresh"]["floor_ms"] < 1


def test_given_ceilings_and_shape(run):
    result, _ = run(
        "--preset tiny --bandwidth 10 --tflops 0.05 --prompt 64 --gen 32 --block 8 --width 12 "
        "--batch 3 --dtype float32 --tokens-per-forward 2 --refresh-share 0.5"
    )
    window, refresh = (result["steps"][kind] for kind in ("window", "refresh"))
    assert window["size"] == dataclasses.asdict(StepSize(3, 36, 24, 96, 32, 4))
    assert refresh["size"] == dataclasses.asdict(StepSize(3, 288, 24, 96, 32, 4))
    expected = budget(TINY, "window", StepSize(3, 36, 24, 96, 32, 4), Ceilings(10, 0.05, ""))
    assert window["floor_ms"] == expected.floor_ms
    assert result["step_ms"] == pytest.approx((window["floor_ms"] + refresh["floor_ms"]) / 2)
    assert result["tokens_per_second"] == pytest.approx(6 / result["step_ms"] * 1e3)


@pytest.fixture
def measured(tmp_path) -> Path:
    """The keys of a measurement that the budget reads; `test_benchmarks.py` takes a real one."""
    path = tmp_path / "measured.json"
    run = {"batch": 2, "window_width": 12.4, "window_step_ms": 4.0, "refresh_step_ms": 9.0,
           "tokens_per_forward": 3.0, "refresh_share": 0.25,
           "phase_us": {"window": {"mlp": 100.0, "outside": 7.0}}}  # fmt: skip
    result = {
        "machine": {"device": "a machine"},
        "settings": {"preset": "tiny", "dtype": "float32", "prompt": 64, "gen": 32, "block": 8},
        "ceilings": {"copy_gb_per_s": 10.0, "matmul_tflops": 0.05},
        "runs": [run],
    }
    path.write_text(json.dumps(result))
    return path


def test_measurement_beside(measured, run):
    result, output = run(f"--measured {measured}")
    window = result["steps"]["window"]
    assert window["size"] == dataclasses.asdict(StepSize(2, 24, 16, 96, 32, 4))
    assert result["ceilings"] == {"gb_per_s": 10.0, "tflops": 0.05,
                                 "source": "measured on a machine"}  # fmt: skip
    assert (result["refresh_share"], result["tokens_per_forward"]) == (0.25, 3.0)
    assert result["measured"]["step_ms"] == pytest.approx(0.75 * 4 + 0.25 * 9)
    assert result["measured"]["share_of_floor"] == pytest.approx(result["step_ms"] / 5.25)
    assert f"{window['floor_ms'] / 4:.0%}" in next(s for s in output.splitlines() if "sum" in s)
    mlp = next(s for s in output.splitlines() if "layer: mlp" in s)
    assert "7.0" in next(s for s in output.splitlines() if "outside of phases" in s)
    assert "100.0" in mlp and f"{window['phases']['mlp']['floor_us'] / 100:.0%}" in mlp
    result, _ = run(f"--measured {measured} --bandwidth 20 --tflops 1")
    assert result["ceilings"]["source"] == "command line"


@pytest.mark.parametrize(("option", "value", "other"), [("batch", 4, [2]), ("prompt", 65, 64)])
def test_a_shape_that_was_not_measured_is_refused(option, value, other, measured, capsys):
    with pytest.raises(SystemExit):
        main(["--measured", str(measured), f"--{option}", str(value)])
    assert f"--{option} {value}: --measured {measured} has {other}" in capsys.readouterr().err

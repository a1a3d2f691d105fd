"""The op benchmarks at their small shapes: what is checked before a time is taken, and what a line
of figures says."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import correct, gpu_hour, op_cases, ops, read_toml, sweep
from benchmarks.op_case import Case, check
from dsb_kernels import _configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="shapes are those of a CPU")


def cases() -> list[Any]:
    """(op, shape) of every benchmark."""
    return [pytest.param(each, shape, id=f"{op} {ops.words(shape)}")
            for op, each in ops.BENCHMARKS.items() for shape in each.shapes]  # fmt: skip


@pytest.mark.parametrize(("benchmark_of", "shape"), cases())
def test_every_contender_is_right(benchmark_of, shape):
    for contender in ("op", "definition", *benchmark_of.case(**shape).others):
        case = benchmark_of.case(**shape)
        before = [tensor.clone() for tensor in case.written]
        assert check(case, contender) <= 1, contender
        for tensor, old in zip(case.written, before, strict=True):
            case.restore()
            assert torch.equal(tensor, old), "a check leaves the case as it was"


def test_an_error_is_measured_against_what_is_allowed():
    def case_of(error: float, x: Tensor) -> Case:
        """Of an op whose result may be wrong."""

        def double(x: Tensor) -> Tensor:
            return 2 * x + x * error if error else 2 * x

        return Case(double, (x,), bytes=8, definition=lambda x: 2 * x)

    numbers = torch.linspace(1, 2, 100)
    for error, expected in ((0, 0), (0.5e-5, 0.25), (3e-5, 1.5)):
        assert check(case_of(error, numbers), "op") == pytest.approx(expected, rel=0.05)
    assert check(case_of(3e-5, numbers), "definition") == 0
    assert check(case_of(math.nan, numbers), "op") == math.inf
    assert check(case_of(1, torch.arange(9)), "op") == math.inf, "integers must be equal"


def test_what_a_call_writes_is_checked_and_restored():
    def add(x: Tensor, number: float = 1.0) -> None:
        x += number

    x = torch.zeros(4)
    case = Case(add, (x,), written=(x,), definition=add)
    case.others["wrong"] = lambda: add(x, 2.0)
    assert check(case, "op") == 0 and check(case, "wrong") > 1
    call = case.call("op")
    call.run()
    assert call.restore is not None and torch.equal(x, torch.ones(4))
    call.restore()
    assert torch.equal(x, torch.zeros(4))


def test_the_command_writes_a_line_for_every_contender(tmp_path, capsys):
    path = tmp_path / "ops.json"
    assert ops.main(["--op", "window_linear", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    lines = [line for line in record["lines"] if line["shape"]["layer"] == "small gated"]
    assert [line["contender"] for line in lines] == 2 * ["op", "matmul", "best of the others"]
    op, matmul, best = lines[:3]
    assert min(op[name] for name in ("cold_us", "warm_us", "bandwidth_share", "tflops")) > 0
    assert matmul["over_op"] == pytest.approx(matmul["cold_us"] / op["cold_us"], rel=0.01)
    assert (best["best"], best["over_op"]) == ("matmul", matmul["over_op"])
    assert "contender=matmul" in capsys.readouterr().out


def test_every_op_is_right_with_every_option(tmp_path):
    """In a precision that is not timed here, so that the shapes are those of the options alone."""
    path = tmp_path / "correct.json"
    assert correct.main(["--precision", "float16", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["lines"]
    assert {line["op"] for line in lines} == set(ops.BENCHMARKS) - {*gpu_hour.WITHOUT_PRECISION}
    assert max(line["error"] for line in lines) <= 1
    assert all(line["shape"]["precision"] == "float16" for line in lines)


def test_an_op_that_is_wrong_or_fails_fails_the_command(monkeypatch, capsys):
    for outcome in ({"return_value": 1.5}, {"side_effect": RuntimeError("bad launch")}):
        monkeypatch.setattr(correct, "check", mock.Mock(**outcome))
        assert correct.main(["--op", "place_rows"]) == 1
    assert "failed=RuntimeError: bad launch" in capsys.readouterr().out


def test_wrong_tokens_and_confidences_are_errors():
    """Of candidates that are scored, and of those that are skipped."""
    case = ops.BENCHMARKS["token_confidence"].case(
        candidates=6, V=300, confidence="margin", temperature=0.0, way="eligible"
    )
    assert case.error is not None
    token, value = case.call("op").run()
    assert case.error((token, value)) <= 1
    for index in (0, 1):  # the first is skipped
        wrong = token.clone()
        wrong[index] = (wrong[index] + 2) % 100
        assert case.error((wrong, value)) == math.inf
    assert case.error((token, value + 1e-3)) > 1


def test_the_checks_reach_every_configuration_of_16_bits(monkeypatch):
    """On a GPU; here only the shapes are made. Each head dim that is checked is checked at every
    class."""
    monkeypatch.setattr(correct, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    head_dims: set[int] = set()
    sizes: dict[str, set[int]] = {}
    for op in ops.BENCHMARKS:
        for shape in correct.shapes_of(op, is_timed=True):
            key, size = key_and_size(op, shape)
            sizes.setdefault(key, set()).add(size)
            if op.endswith("_attention"):
                head_dims.add(shape.get("head_dim", 128))
    assert head_dims == {64, 128, 256}
    for (name, _), table in _configs.CONFIGS.items():
        keys = [name]
        if name.startswith("window_attention"):
            small = name.endswith(" 128")
            keys = [f"window_attention {d}" for d in head_dims if (d <= 128) == small]
        for low, high in itertools.pairwise([0, *sorted(table)]) if "float32" not in name else ():
            for key in keys:
                assert any(low < size <= high for size in sizes[key]), (key, high)


def test_the_checks_fit_into_one_gpu_together(monkeypatch):
    """The definition of attention in float64, keys and values of every head twice and scores three
    times, is what takes most."""
    monkeypatch.setattr(correct, "on_gpu", lambda: True)
    monkeypatch.setattr(ops, "on_gpu", lambda: True)
    for shape in correct.shapes_of("window_attention", is_timed=True):
        heads, D = op_cases.MODELS[shape["model"]][0], shape.get("head_dim", 128)
        elements = shape["positions"] * (4 * D + 3 * shape["width"])
        assert 8 * shape["batch"] * heads * elements < 8e9, shape


@pytest.mark.parametrize("way", ["plain", "eligible", "excluded", "seeds"])
def test_logits_are_compared_slice_by_slice(monkeypatch, way):
    """With the same outcome, whichever slice an error is in."""
    case = ops.BENCHMARKS["token_confidence"].case(
        candidates=7, V=300, confidence="entropy", temperature=0.7, way=way
    )
    assert case.error is not None
    token, value = case.call("op").run()
    wrong = token.clone()
    wrong[5] = (wrong[5] + 2) % 100
    whole = case.error((token, value))
    monkeypatch.setattr(op_cases, "SLICE", 3)
    assert whole <= 1 and case.error((token, value)) <= 1
    assert case.error((wrong, value)) == math.inf and case.error((token, value + 1e-3)) > 1


def key_and_size(op: str, shape: dict[str, Any]) -> tuple[str, int]:
    """The entry of the table that a shape uses, and its size there."""
    if op.endswith("_attention"):
        heads, kv_heads = op_cases.MODELS[shape["model"]]
        width = shape.get("width", shape.get("positions"))
        return f"window_attention {shape.get('head_dim', 128)}", width * heads // kv_heads
    if op == "window_linear":
        gated = op_cases.LAYERS[shape["layer"]][3]
        return op + " gated" * gated, shape["num_tokens"]
    sampled = " sampled" * (shape.get("temperature", 0) > 0)
    names = {"linear_add_norm": "num_tokens", "rope_write_kv": "width", "place_rows": "batch"}
    if op == "unmask_and_slide":
        return op, shape.get("block", op_cases.BLOCK)
    return op + sampled, shape[names.get(op, "candidates")]


def test_candidates_of_the_sweep_are_entries_of_the_table():
    """Each stands for an entry of the table, names its blocks, and differs from it."""
    for item in read_toml("sweep.toml")["sweep"]:
        now = _configs.configuration(item["key"], item["size"], "sm_90")
        assert item["op"] in ops.BENCHMARKS
        for other in sweep.candidates(item):
            assert other.blocks.keys() == now.blocks.keys()
            assert other != now, f"{item['key']} {item['size']}: the table has it already"
            with sweep.using(item["key"], item["size"], other, "sm_90"):
                assert _configs.configuration(item["key"], item["size"], "sm_90") is other
            assert _configs.configuration(item["key"], item["size"], "sm_90") is now


def test_the_sweep_times_candidates_twice_and_survives_one_that_fails(tmp_path, monkeypatch):
    path, good = tmp_path / "sweep.json", {"cold_us": 5.0}
    failed = RuntimeError("out of resource: shared memory")
    times = mock.Mock(side_effect=itertools.chain([good, good, failed], itertools.repeat(good)))
    monkeypatch.setattr(sweep, "time_contender", times)
    assert sweep.main(["--size", "64", "--json", str(path)]) == 0
    lines = json.loads(path.read_text())["lines"]
    assert lines[0]["current"] and lines[0]["us"] == [5.0, 5.0]
    assert lines[1]["failed"].startswith("RuntimeError: out of resource")
    assert lines[2]["us"] == [5.0, 5.0] and not lines[2]["current"]
    with pytest.raises(SystemExit):
        sweep.main(["--size", "7"])

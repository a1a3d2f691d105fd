"""What is counted of more drafts than the engine runs, and the tables of measured drafts."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from benchmarks import batches_of, draft_chains, drafts, problems_parser, slow_forwards
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.files import read_json
from tests.commands import ROOT

NUM_PROBLEMS = 2
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def puzzles():
    args = problems_parser("test", None).parse_args(["--problems", str(NUM_PROBLEMS)])
    model, _, batches = batches_of(TASKS["sudoku"], args)
    return model, batches


@pytest.mark.parametrize("cache", drafts.CACHES)
@pytest.mark.parametrize(
    "rule", [{"threshold": 0.99}, {"steps": 18, "schedule": "naive"}], ids=["threshold", "quota"]
)
def test_one_draft_is_counted_as_the_engine_runs_it(puzzles, rule, cache):
    """Forwards without drafts and with one, and the tokens in every way to run drafts."""
    model, batches = puzzles
    how = {"gen_length": 36, "block_length": 12, "cache": cache, "stop_at_eos": True, **rule}
    counts = {}
    for way, (chain, second) in draft_chains.WAYS.items():
        counts[way], (canvas,) = draft_chains.count_forwards(model, batches, how, chain, second)
        for number in {0, 1} & {chain + second}:
            config = dsb.DecodingConfig(**how, drafts=number)
            (expected,), measured = drafts.decode(model, batches, config)
            assert counts[way] == sum(measured["kinds"].values())
        assert torch.equal(canvas, expected)
    assert counts["of three"] <= counts["a chain of two"] <= counts["one"] <= counts["no draft"]
    assert "threshold" in rule or counts["a chain of two"] < counts["one"] < counts["no draft"]
    assert counts["the two likeliest"] <= counts["one"]


def test_measured_drafts_are_printed_again(tmp_path, capsys):
    file = str(tmp_path / "guess.json")
    options = ["--task", "sudoku", "--problems", "2", "--block-length", "12"]
    drafts.main([*options, "--lowered", "0.5", "0.95", "--json", file])
    printed = capsys.readouterr().out
    drafts.main(["--from", file])
    assert capsys.readouterr().out == printed
    drafts.main(["--from", file, "--markdown"])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.endswith("| no drafts | 0.5 τ | 0.95 τ |") and len(lines) == len(drafts.CACHES)
    with pytest.raises(ValueError, match=r"expected what python -m benchmarks\.draft_chains"):
        draft_chains.main(["--from", file])


def test_the_page_has_the_computed_times_of_a_forward():
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    ms = drafts.step_ms()
    assert f"{ms['window+draft']:.2f} ms instead of {ms['window']:.2f}" in page
    assert f"{ms['refresh+draft']:.1f} ms\ninstead of {ms['refresh']:.1f}" in page


def test_kept_counts_are_the_measured_ones():
    """Of one draft and of none, in all that is counted."""
    measured = {}
    for task in TASKS:
        for line in read_json(BENCHMARKS / f"drafts_{task}.json")["lines"]:
            names = tuple(line[name] for name in ("cache", "problems", *drafts.NAMES))
            measured[names] = line["forwards"], line["forwards_with_drafts"]
    lines = read_json(BENCHMARKS / "draft_chains.json")["lines"]
    assert len(lines) >= 12
    for line in lines:
        names = tuple(line[name] for name in ("cache", "problems", *drafts.NAMES))
        assert (line["no draft"], line["one"]) == measured[names], names


def test_forwards_of_one_token_are_counted(puzzles):
    """Against the events of a decoding that is watched."""
    model, batches = puzzles
    config = dsb.DecodingConfig(
        gen_length=36, block_length=6, threshold=0.99, cache="none", stop_at_eos=True
    )
    committed = []

    def watch(event: dsb.StepEvent) -> None:
        committed.extend(event.commit[event.rows].sum(-1).tolist())

    counts = slow_forwards.count(model, batches, config)
    for _, ids, mask in batches:
        dsb.generate(model, ids, config, attention_mask=mask, on_step=watch)
    assert counts["forwards"] == len(committed)
    assert counts["one token"] == committed.count(1) > 0

"""Running out of memory: what was asked for, what would fit, and an engine that still works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.engine.cache import allocate, cache_shape_of, is_out_of_memory, largest
from tests import golden
from tests.golden import prompts
from tests.recorded import Recorder

ROOT = Path(__file__).parents[1]
SHAPE = {"gen_length": 24, "block_length": 8}

# A real limit on this process's memory, so that a real allocation fails.
LIMITED = """
import resource, torch
import dsb_runtime as dsb
from tests import golden
from tests.golden import prompts

torch.set_num_threads(1)
model, prompt = golden.model("llada"), prompts(1)[0][None]
engine = dsb.Engine(model)
settings = {"gen_length": 24, "block_length": 8}
expected = engine.generate(prompt, **settings).sequences
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20), resource.RLIM_INFINITY))
ids = torch.arange(2, 402).repeat(2000, 1)
try:
    engine.generate(ids, **settings)
except torch.OutOfMemoryError as error:
    print("refused:", error)
assert torch.equal(engine.generate(prompt, **settings).sequences, expected)
print("still right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_cache_that_does_not_fit():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    asked = re.search(r"batch of 2000 with 424 positions each: ([\d,]+) bytes asked", done.stdout)
    shape = cache_shape_of(golden.model("llada"))
    assert int(asked[1].replace(",", "")) == shape.nbytes(2000, 424)
    fits = int(re.search(r"a batch of (\d+) fits", done.stdout)[1])
    assert 0 < fits < 2000 and shape.nbytes(fits, 424) < 160 << 20
    assert "still right" in done.stdout


def test_largest_finds_the_edge():
    assert [largest(11, range(edge + 1).__contains__) for edge in range(12)] == list(range(12))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_that_runs_out_of_memory_while_captured(rows, kind):
    """The message says what would fit; what was captured is dropped and made again."""
    said = {
        torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 GiB.",
        RuntimeError: "CUDA error: out of memory",  # of a graph
    }[kind]
    capture = mock.Mock(side_effect=kind(said))
    model, ids = golden.model("llada"), prompts(1)[0].repeat(rows, 1)
    engine = dsb.Engine(model, capture=capture)
    expected = dsb.Engine(model, graphs=False).generate(ids, **SHAPE).sequences
    advice = "a shorter prompt or gen_length" if rows == 1 else "a batch of 1"
    with pytest.raises(torch.OutOfMemoryError, match=rf"refresh step.*{said}.*{advice}"):
        engine.generate(ids, **SHAPE)
    assert not engine.loop.sessions
    capture.side_effect = Recorder()
    assert torch.equal(engine.generate(ids, **SHAPE).sequences, expected)


@pytest.mark.parametrize("words", ["CUBLAS_STATUS_ALLOC_FAILED", "Error [CUDA]: out of memory"])
def test_what_counts_as_out_of_memory(words):
    assert is_out_of_memory(RuntimeError(f"Triton {words}"))


def test_other_errors_pass_through():
    capture = mock.Mock(side_effect=RuntimeError("an illegal memory access"))
    engine = dsb.Engine(golden.model("llada"), capture=capture)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access$"):
        engine.generate(prompts(1)[0][None], **SHAPE)
    with pytest.raises(RuntimeError, match="negative"):
        allocate(cache_shape_of(golden.model("llada")), -2, 10)

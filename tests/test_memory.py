"""Running out of memory: what was asked for, what would fit, and an engine that still works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
    for edge in range(12):
        assert largest(11, lambda n, edge=edge: n <= edge) == min(edge, 11)
    assert largest(0, lambda n: True) == 0


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_step_that_runs_out_of_memory_while_captured(rows, kind):
    """The message says what would fit; what was captured is dropped and made again."""
    tight = [False]
    said = {
        torch.OutOfMemoryError: "CUDA out of memory. Tried to allocate 2.00 GiB.",
        RuntimeError: "CUDA error: out of memory",  # of a graph
    }[kind]

    class Failing(Recorder):
        def __call__(self, run):
            if tight[0]:
                raise kind(said)
            return super().__call__(run)

    model, ids = golden.model("llada"), prompts(1)[0].repeat(rows, 1)
    engine = dsb.Engine(model, capture=Failing())
    expected = dsb.Engine(model, graphs=False).generate(ids, **SHAPE).sequences
    tight[0] = True
    advice = "a shorter prompt or gen_length" if rows == 1 else "a batch of 1"
    with pytest.raises(torch.OutOfMemoryError, match=rf"refresh step.*{said}.*{advice}"):
        engine.generate(ids, **SHAPE)
    assert not engine.loop.sessions
    tight[0] = False
    assert torch.equal(engine.generate(ids, **SHAPE).sequences, expected)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_other_errors_pass_through():
    def capture(run):
        raise RuntimeError("an illegal memory access")

    engine = dsb.Engine(golden.model("llada"), capture=capture)
    with pytest.raises(RuntimeError, match=r"^an illegal memory access$"):
        engine.generate(prompts(1)[0][None], **SHAPE)
    with pytest.raises(RuntimeError, match="negative"):
        allocate(cache_shape_of(golden.model("llada")), -2, 10)

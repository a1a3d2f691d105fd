"""Deliberate mistakes in kernels, and running the kernels at all where there is no GPU.

Tests of kernels run in one ordinary pytest process: `tests/conftest.py` sets `TRITON_INTERPRET=1`
before anything imports Triton where there is no GPU, and `kernels()` sends an op's CPU tensors to
the (interpreted) kernel. Whatever has to compile for a GPU (`tools.compile_report`) runs in a
subprocess without that variable.

A check that passes for the real kernel must fail for a broken one (`assert_caught`).
"""

from __future__ import annotations
import __future__

import contextlib
import inspect
import linecache
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType

import pytest
import torch

_PASSED: set[Hashable] = set()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Ops run their Triton kernel inside, on a GPU or under the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSB_BACKEND", "triton")
        yield


@contextlib.contextmanager
def mutated(module: ModuleType, name: str, old: str, new: str) -> Iterator[None]:
    """Replace `module.name` (a kernel or a jitted helper) by a copy in which the only occurrence
    of `old` in its source reads `new`. Kernels find helpers through the module, so a mutated
    helper reaches every kernel of that module."""
    original = getattr(module, name)
    source = inspect.getsource(original.fn)
    assert source.count(old) == 1, f"{name}: {source.count(old)} occurrences of {old!r}"
    source = source.replace(old, new)
    # Triton reads a kernel's source again, through linecache.
    filename = f"<{name} with {new!r}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    flags = __future__.annotations.compiler_flag
    exec(compile(source, filename, "exec", flags=flags), module.__dict__)
    try:
        yield
    finally:
        setattr(module, name, original)
        del linecache.cache[filename]


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Memory that is allocated inside holds NaN, or the largest integer, until it is written: not
    what the real kernel may have left there just before."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_caught(
    check: Callable[[], object], module: ModuleType, name: str, old: str, new: str,
    known_as: Hashable = None,
) -> None:  # fmt: skip
    """`check` passes for the real kernel (run once for all its mutations, which `known_as` may
    tell) and fails an assertion for the mutated one."""
    if (known_as or check) not in _PASSED:
        check()
        _PASSED.add(known_as or check)
    with mutated(module, name, old, new), unwritten_is_nan(), pytest.raises(AssertionError):
        check()

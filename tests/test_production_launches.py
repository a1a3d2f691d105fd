"""What a decoding of each family launches on an H100 is compiled for the chips: its kernels with
their constants, tiles, warps and stages, at every class of windows and at a refresh.

The launches are those of real steps of models of two layers on a CUDA made of metadata. The first
layer computes whole windows, the last one's queries are the candidates alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.runtime.jit import JITFunction

import dsb_runtime as dsb
from dsb_kernels.rows import StepKind
from dsb_runtime.engine import layers, sampling
from dsb_runtime.engine.step import StepShape
from dsb_runtime.measure import models
from tests.fake_cuda import Launcher, cuda, fake_cuda, on_gpu
from tools.compile_report.case import CompileCase
from tools.compile_report.cases import collect_cases

CANDIDATES, LENGTH = 32, 1280


def constants(kernel: JITFunction, values: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    """The constants of a kernel, and its pointers that are None. Token ids count by their number.
    Integers that are 1 are no constants here: a case need not know of them."""
    declared = {param.name for param in kernel.params if param.is_constexpr} - {"PDL"}
    return frozenset(
        (name, len(value) if isinstance(value, tuple) else value)
        for name, value in values.items()
        if value is None or name in declared
    )


@functools.cache
def compiled_for_h100() -> dict[Any, list[CompileCase]]:
    """The cases by kernel, constants, warps and stages."""
    cases: dict[Any, list[CompileCase]] = {}
    for case in collect_cases():
        if "sm_90" in case.architectures:
            kernel = Launcher(case.kernel).kernel
            key = (
                constants(kernel, case.constexprs),
                case.config.num_warps,
                case.config.num_stages,
            )
            cases.setdefault((kernel.__name__, *key), []).append(case)
    return cases


@pytest.mark.parametrize("preset", ["llada-8b", "illada-8b", "dream-7b"])
def test_every_launch_of_a_decoding_is_compiled_for_the_chips(monkeypatch, preset):
    monkeypatch.delenv("DSB_BACKEND", raising=False)
    # The type of a fake Parameter is FakeTensor.
    monkeypatch.setattr(layers, "is_plain", lambda module: True)
    monkeypatch.setattr(sampling, "is_plain_linear", lambda module: True)
    compiled = compiled_for_h100()
    launched: list[str] = []
    missing: dict[Any, str] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        values = {names[index]: value for (index, *_), value in compile["constants"].items()}
        key = (constants(fn.jit_function, values), compile["num_warps"], compile["num_stages"])
        types = {n: t.replace("u1", "i1") for n, t in compile["signature"].items() if "*" in t}
        # A case must not promise the compiler what the launch does not.
        divisible = {
            names[i] for each in compile["configs"] for (i, *_), has in each.items() if has
        }
        fit = any(
            types.items() <= case.signature.items() and set(case.divisible) <= divisible | {*values}
            for case in compiled.get((fn.name, *key), ())
        )
        launched.append(fn.name)
        if not fit:
            missing.setdefault((fn.name, *key), where)
        return True  # Triton does not compile

    small = models.random_model(replace(models.PRESETS[preset], layers=2), torch.bfloat16, "meta")
    settings = {"gen_length": 256, "block_length": CANDIDATES, "max_block_length": CANDIDATES}
    with fake_cuda() as gpu, mock.patch.object(triton.knobs.runtime, "jit_cache_hook", hook):
        engine = dsb.Engine(on_gpu(small), capture=lambda step: step)
        gpu.answers = [CANDIDATES]
        canvas, leftpad = cuda(1, LENGTH), cuda(1, dtype=torch.int32)
        config = dsb.DecodingConfig(threshold=0.9, **settings)
        session = engine.loop.session(config, canvas, leftpad, roomy=True)
        windows = [(StepKind.WINDOW, width) for width in (16, 32, 64, 128)]
        for kind, width in (*windows, (StepKind.REFRESH, LENGTH)):
            where = f"{kind.name.lower()} of {width}"
            with gpu.step():
                session.step(StepShape(kind, 1, width, CANDIDATES))
    assert launched.count("_attention_kernel") == launched.count("_combine_kernel") == 10
    assert not missing, "\n".join(f"{where}: {key}" for key, where in missing.items())

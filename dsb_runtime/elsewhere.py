"""Diffusion language models that this package does not run, what each is, and where it runs.

The method needs a decoder of Llama's modules that attends both ways over the whole response. A
model that was trained otherwise would decode into other tokens without a word. So it is refused, by
its `model_type` or by a class that its config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dsb_runtime.fields import RawConfig, shown

BY_BLOCKS = "attends to the blocks before it only (block-causal)"
# What a name looks like, what the model is, and what runs it.
ELSEWHERE = {
    "llada2": (f"a mixture of experts that {BY_BLOCKS}", "SGLang, LMDeploy, dInfer or dllm"),
    "llada_?moe": ("a mixture of experts", "dInfer or dllm"),
    "sdar": (f"a Qwen3 that {BY_BLOCKS}", "SGLang, LMDeploy or JetEngine"),
    "fast_dllm": (f"a Qwen2 that {BY_BLOCKS}", "its own code or Diffulex"),
    "stable_?diff_?coder": (f"a Llama that {BY_BLOCKS}", "its own code or Diffulex"),
    "nemotron_?labs_?diffusion": (f"a Ministral that {BY_BLOCKS}", "its own code or FluxServe"),
    "diffusion_?gemma": ("a model of uniform noise, without a mask token", "transformers or vLLM"),
    "bd3lm": (f"a DiT that {BY_BLOCKS}", "its own code"),
    "rnd1": ("a mixture of experts", "its own code"),
    "editflow": ("a model that inserts and deletes tokens", "dllm"),
    "gpt2": ("a GPT-2, with learned positions (as DiffuGPT)", "DiffuLLaMA's inf_diffugpt.py"),
}


def runs_elsewhere(names: Iterable[Any]) -> str | None:
    """What the first of these types and classes is that `ELSEWHERE` lists, and what runs it."""
    for name in names:
        for pattern, (what, where) in ELSEWHERE.items():
            if isinstance(name, str) and re.match(pattern, name, re.IGNORECASE):
                return f"{shown(name)}, {what}: not supported; {where} runs it"
    return None


def check_runs_here(raw: RawConfig) -> None:
    """Raise ValueError if the config is that of a model in `ELSEWHERE`."""
    classes = raw.get("architectures")
    other = runs_elsewhere([raw.get("model_type"), *(classes if isinstance(classes, list) else [])])
    if other is not None:
        raise ValueError(f"config.json names {other}")
    if raw.get("num_experts") is not None:
        raise ValueError(
            f"config.json has num_experts={shown(raw['num_experts'])}: a mixture of experts, not "
            "supported; expected none"
        )

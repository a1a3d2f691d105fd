"""Compile cases of token_confidence, lm_head_confidence and combine_partials."""

from __future__ import annotations

import itertools
from dataclasses import replace

from dsb_kernels import lm_head, token_confidence
from dsb_kernels._configs import ARCHITECTURES, Config
from dsb_kernels.score import CONFIDENCES, combine_kernel, combine_warps
from tools.compile_report.case import DTYPES, CompileCase

VOCABULARY, MASK_TOKEN = 126464, 126336  # LLaDA's; the mask token is banned
ENDS = (126081, 126348)  # LLaDA's EOS ids
SAMPLING = {"seed_ptr": "*i64", "noise_ids_ptr": "*i64"}
TYPES = SAMPLING | {"eligible_ptr": "*i1", "partial_ptr": "*fp32", "temperature": "fp32"}
LOGITS = [  # candidates, confidence, sampled, dtype
    *((n, "probability", False, "bf16") for n in (32, 256, 1024)),
    (64, "probability", True, "bf16"),
    *((64, c, sample, "bf16") for c in CONFIDENCES[1:] for sample in (False, True)),
    *((64, "probability", False, dtype) for dtype in ("fp16", "fp32")),
]
HEAD = [
    *((n, c, False, "bf16") for n in (16, 32, 64, 128) for c in CONFIDENCES),
    *((n, "probability", True, "bf16") for n in (16, 32, 64, 128)),
    *((32, c, True, "bf16") for c in CONFIDENCES[1:]),
    (32, "probability", False, "fp16"),
    *((n, "probability", sample, "fp32") for n in (32, 64) for sample in (False, True)),
]


def cases() -> list[CompileCase]:
    """Every variant of confidence, greedy and sampled, at every shape class on sm_90. On the other
    architectures the probability alone: the other confidences have its tiles."""
    # Triton turns arguments equal to 1 into constants, which makes another program to compile.
    parts = ((32, ()), (1024, ()), (2048, ()), (1, ("num_candidates", "parts", "first_allowed")))
    return [
        *(logits_case(*variant) for variant in LOGITS),
        *(
            head_case(architecture, *variant)
            for architecture, variant in itertools.product(ARCHITECTURES, HEAD)
            if architecture in compiled_for(*variant)
        ),
        excluding(logits_case(64, "probability", False, "bf16")),
        *(excluding(head_case("sm_90", n, "probability", False, "bf16")) for n in (32, 128)),
        *(combine_case(c, *part) for c, part in itertools.product(CONFIDENCES, parts)),
    ]


def compiled_for(n: int, confidence: str, sample: bool, dtype: str) -> tuple[str, ...]:
    """The architectures for which a variant is compiled."""
    usual = confidence == "probability" and dtype != "fp16"
    return ARCHITECTURES if usual else ("sm_90",)


def words(candidates: int, confidence: str, sample: bool, dtype: str) -> str:
    return f"{confidence}{' sampled' * sample} {dtype} {candidates} candidates"


def logits_case(candidates: int, confidence: str, sample: bool, dtype: str) -> CompileCase:
    launch = token_confidence.launch_of(candidates, VOCABULARY, "sm_90", sample)
    constexprs = {
        **launch.blocks, **({} if sample else dict.fromkeys(SAMPLING)), "BANNED": (MASK_TOKEN,),
        "excluding_ptr": None, "EXCLUDED": (), "SAMPLE": sample, "CONFIDENCE": confidence,
        "SEEDS": False,
    }  # fmt: skip
    usual = confidence == "probability" and not sample and dtype != "fp32"
    return CompileCase(
        "token_confidence", words(candidates, confidence, sample, dtype),
        token_confidence._token_confidence_kernel, launch, constexprs, f"*{dtype}",
        types=TYPES,
        odd=("num_candidates",),
        architectures=compiled_for(candidates, confidence, sample, dtype),
        expects_wide_loads=True,
        scalar_load_bytes=17 if sample else 1,
        # The loop scores 32 logits a thread, and a third of it runs only for a new best token.
        max_loop=560 if usual else None,
        max_exponentials=1.1,
        # The code has a tile in the loop and the masked last tile, both unrolled.
        elements_per_thread=2 * launch.blocks["BLOCK_V"] / (32 * launch.num_warps),
    )  # fmt: skip


def head_case(
    architecture: str, candidates: int, confidence: str, sample: bool, dtype: str
) -> CompileCase:
    launch = lm_head.launch_of(candidates, VOCABULARY, DTYPES[dtype], architecture, sample=sample)
    constexprs = {
        **launch.blocks, "bias_ptr": None, **({} if sample else dict.fromkeys(SAMPLING)),
        "EVEN_K": True, "BANNED": (MASK_TOKEN,), "excluding_ptr": None, "EXCLUDED": (),
        "SAMPLE": sample, "CONFIDENCE": confidence, "SEEDS": False,
    }  # fmt: skip
    return CompileCase(
        "lm_head_confidence", words(candidates, confidence, sample, dtype),
        lm_head._lm_head_kernel, launch, constexprs, f"*{dtype}",
        types=TYPES,
        odd=("num_candidates", "share", "token_base"),
        architectures=(architecture,),
        prefetches=True,
        expects_tensor_cores=dtype != "fp32",
    )  # fmt: skip


def excluding(case: CompileCase) -> CompileCase:
    """The same with two tokens that some candidates exclude, on sm_90 alone."""
    constexprs = {n: x for n, x in case.constexprs.items() if n != "excluding_ptr"}
    return replace(
        case, name=f"{case.name} excluding", constexprs={**constexprs, "EXCLUDED": ENDS},
        types={**case.types, "excluding_ptr": "*i1"}, architectures=("sm_90",),
        scalar_load_bytes=case.scalar_load_bytes + 1,
        # The code has a few more instructions in the loop for each excluded token.
        max_loop=None,
    )  # fmt: skip


def combine_case(confidence: str, parts: int, ones: tuple[str, ...]) -> CompileCase:
    constexprs = {"state_ptr": None, "PARTS": parts, "CONFIDENCE": confidence}
    return CompileCase(
        "combine_partials", f"{confidence} {parts} parts", combine_kernel,
        Config({}, combine_warps(parts)), constexprs | dict.fromkeys(ones, 1), "*fp32",
        types={"eligible_ptr": "*i1", "token_ptr": "*i64"},
        odd=combine_kernel.arg_names,
        architectures=compiled_for(1, confidence, False, "fp32"),
    )  # fmt: skip

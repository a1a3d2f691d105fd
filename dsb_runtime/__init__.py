"""DSB Kernels' runtime: decode diffusion language models with DSB and DSB Cache.

Importing this package registers the "dsb" attention implementation with transformers, and LLaDA
and Dream with its Auto classes.
"""

from dsb_runtime import attention, auto
from dsb_runtime.config import DecodingConfig
from dsb_runtime.decode import Engine, GenerationOutput, StepEvent, generate
from dsb_runtime.hf_generate import custom_generate
from dsb_runtime.load import load_model, load_tokenizer
from dsb_runtime.patch import patch, unpatch

__all__ = [
    "DecodingConfig",
    "Engine",
    "GenerationOutput",
    "StepEvent",
    "attention",
    "auto",
    "custom_generate",
    "generate",
    "load_model",
    "load_tokenizer",
    "patch",
    "unpatch",
]

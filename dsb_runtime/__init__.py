"""DSB Kernels' runtime: decode diffusion language models with DSB and DSB Cache.

Importing this package registers the "dsb" attention implementation with transformers.
"""

from dsb_runtime import attention
from dsb_runtime.config import DecodingConfig
from dsb_runtime.decode import GenerationOutput, StepEvent, generate
from dsb_runtime.load import load_model, load_tokenizer

__all__ = [
    "DecodingConfig",
    "GenerationOutput",
    "StepEvent",
    "attention",
    "generate",
    "load_model",
    "load_tokenizer",
]

"""DSB Kernels' runtime: decode diffusion language models with DSB and DSB Cache.

Importing this package registers the "dsb" attention implementation with transformers, and LLaDA,
Dream and A2D with its Auto classes.
"""

from dsb_runtime.config import DecodingConfig
from dsb_runtime.doors import auto
from dsb_runtime.doors.hf_generate import custom_generate
from dsb_runtime.doors.patch import patch, unpatch
from dsb_runtime.engine import attention
from dsb_runtime.engine.batch import BatchEngine, generate_batch
from dsb_runtime.engine.engine import Engine, generate, infill
from dsb_runtime.engine.output import GenerationOutput, StepEvent
from dsb_runtime.engine.request import Request, RowEvent
from dsb_runtime.models.load import load_model, load_tokenizer

__all__ = [
    "BatchEngine",
    "DecodingConfig",
    "Engine",
    "GenerationOutput",
    "Request",
    "RowEvent",
    "StepEvent",
    "attention",
    "auto",
    "custom_generate",
    "generate",
    "generate_batch",
    "infill",
    "load_model",
    "load_tokenizer",
    "patch",
    "unpatch",
]

"""generate: one engine for every schedule, cache policy and selection rule.

An engine checks the arguments, lets threads and streams take turns, and makes the output. Its loop
(`dsb_runtime.engine.loop`) launches one step (`dsb_runtime.engine.step`) after another.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dsb_kernels.rows import Row
from dsb_runtime.config import DecodingConfig
from dsb_runtime.defaults import defaults_for
from dsb_runtime.engine.check import check_inputs
from dsb_runtime.engine.forward import Phase, no_phase
from dsb_runtime.engine.graphs import Capture, CudaGraphs
from dsb_runtime.engine.loop import Loop, StepDone
from dsb_runtime.engine.parallel import agree, is_tensor_parallel
from dsb_runtime.engine.turns import Turns, surely
from dsb_runtime.families import check_model, device_of, unwrap

logger = logging.get_logger(__name__)
R = TypeVar("R")
PROCESS = os.getpid()  # the process that has imported this file, of which others may be forks
ENGINE = "_dsb_engine"  # where a model keeps the engine that `generate` made for it
PROMPT_MULTIPLE = 64  # where steps are captured, prompts are left-padded to a multiple of this


@dataclass
class GenerationOutput:
    """What `generate` returns for B rows with P prompt and G response positions each."""

    sequences: Tensor  # (B, P + G) int64, with the left padding
    nfe: int  # how many forwards ran
    tokens_per_forward: list[int]  # how many tokens each forward committed, over all rows
    row_nfe: list[int]  # how many forwards each row took part in
    row_tokens: list[int]  # how many response positions each row has, to its first EOS inclusive


@dataclass
class StepEvent:
    """One step, after its commit. `on_step` is called with it. Its tensors are copies, which the
    caller may keep and change. A confidence is the number by which candidates were ranked: for
    Dream, whose published code ranks so, it follows temperature, top_p and top_k; for LLaDA it does
    not."""

    index: int  # how many steps came before this one
    kind: str  # "refresh" (every position), "response" (without the prompt) or "window"
    rows: list[int]  # the batch rows that took part
    before: list[tuple[int, int, int]]  # their (start, end, prefix) in this step
    canvas: Tensor  # (B, L) after the commit
    position: Tensor  # (B, K) the candidates of this step, then -1
    commit: Tensor  # (B, K) bool, whether each candidate was committed
    confidence: Tensor  # (B, K) the confidence of each candidate, 0 where none was scored
    table: list[Row]  # every batch row as it is now: its block, and what it needs next


def count_tokens(response: Tensor, eos_ids: tuple[int, ...]) -> list[int]:
    """How many positions each row of `response` (B, G) has up to and including its first EOS. It is
    G for a row without an EOS."""
    length = response.shape[1]
    index = torch.arange(length, device=response.device)
    eos = torch.isin(response, torch.tensor(eos_ids, device=response.device, dtype=torch.int64))
    return (torch.where(eos, index, length - 1).amin(-1) + 1).tolist()


class Engine:
    """Decodes with one model, and keeps the K/V cache and captured steps between calls.

    `dsb_runtime.generate` keeps an engine for each model. Make your own to choose how it runs.

    Args:
        model: from `load_model` or `patch`.
        graphs: whether to capture steps and replay them. None means True on a GPU, or if `capture`
            is set.
        capture: how a step is captured. None means as a CUDA graph.
        phase: each phase of a step runs inside the context manager `phase(name)`, for a profiler.
        observer: each launch of a step runs inside the context manager `observer(kind)`, where
            `kind` is "window", "refresh" or "response".

    Raises:
        TypeError: `model` does not come from `load_model` or `patch`.
        ValueError: `graphs` is True, the model is not on a GPU, and `capture` is None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        graphs: bool | None = None,
        capture: Capture | None = None,
        phase: Phase = no_phase,
        observer: Phase = no_phase,
    ) -> None:
        model = unwrap(model)
        check_model(model)
        self.model, self.device = model, device_of(model)
        on_gpu = self.device.type == "cuda"
        if graphs is None:
            graphs = on_gpu or capture is not None
        if graphs and capture is None:
            if not on_gpu:
                raise ValueError("graphs=True: the model is not on a CUDA device; expected False")
            capture = CudaGraphs()
        self.loop = Loop(model, capture if graphs else None, phase, observer)
        self.turns = Turns()
        self.stream: torch.cuda.Stream | None = None  # the stream of the last call

    def release(self) -> None:
        """Give back the cache and every captured step; the next call makes them anew. If another
        thread is inside a call, this waits for its end.

        Raises:
            RuntimeError: an `on_step` of this engine calls it.
        """
        if self.in_call():
            raise RuntimeError("Engine.release: called by its own on_step; expected a later call")
        self.turns.run(self.loop.release)

    def in_call(self) -> bool:
        """Whether this thread is inside a call (another one waits for its turn)."""
        return self.turns.mine()

    def follow_last_call(self) -> None:
        """If the current stream is not that of the last call, let it wait for that stream, on which
        a speculative launch may still use the buffers that calls share."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream()
            if self.stream not in (None, stream):
                stream.wait_stream(self.stream)
            self.stream = stream

    def generate(
        self,
        input_ids: Tensor,
        config: DecodingConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        **settings: Any,
    ) -> GenerationOutput:
        """Decode as `dsb_runtime.generate` does, with this engine's model. Threads take turns.

        Raises:
            RuntimeError: an `on_step` of this engine calls it, or this process was forked from one
                that has used the GPU.
        """
        check_process(self.device)
        check_model(self.model)
        config = config_of(self.model, config, settings)
        if on_step is not None and not callable(on_step):
            raise TypeError(
                f"on_step={on_step!r}: expected a callable that takes a StepEvent, or None"
            )
        leftpad = check_inputs(self.model, config, input_ids, attention_mask, generator)
        if self.in_call():
            raise RuntimeError(
                "Engine.generate: called by its own on_step; expected another engine"
            )
        decode = functools.partial(self.decode, config, input_ids, leftpad, generator, on_step)
        return self.turns.run(lambda: as_published(self.model, self.device, decode))

    def decode(
        self,
        config: DecodingConfig,
        input_ids: Tensor,
        leftpad: Tensor,
        generator: torch.Generator | None,
        on_step: Callable[[StepEvent], None] | None,
    ) -> GenerationOutput:
        """Decode. The arguments must have been checked."""
        self.follow_last_call()
        batch, prompt = input_ids.shape
        watched = on_step is not None
        # A captured step serves every prompt up to the next multiple, so fewer graphs are captured.
        # A call with `on_step` adds no padding, since the caller sees the canvas.
        pad = 0 if watched or self.loop.capture is None else -prompt % PROMPT_MULTIPLE
        session = self.loop.session(config, input_ids, leftpad, pad)
        state, info = session.state, check_model(self.model)
        if config.temperature > 0:
            # A GPU's default generator refuses to draw while another thread captures a graph.
            source = "cpu" if generator is None else generator.device
            seed = torch.randint(2**62, (), dtype=torch.int64, generator=generator, device=source)
            seed = seed.to(input_ids.device)
            if is_tensor_parallel(self.model):
                agree(self.model.lm_head, seed)
            state.seed.copy_(seed)
        commits: list[int] = []
        row_nfe = [0] * batch
        position = state.position.clone()  # the candidates of the coming step

        def each(done: StepDone) -> None:
            nonlocal position
            commits.append(sum(row.new for row in done.after if row.took_part))
            for row in done.rows:
                row_nfe[row] += 1
            if on_step is not None:
                before = [done.before[row] for row in done.rows]
                event = StepEvent(
                    index=len(commits) - 1, kind=done.shape.kind.label, rows=done.rows,
                    before=[(row.start, row.end, row.prefix) for row in before],
                    canvas=state.canvas.clone(), position=position, commit=state.commit.clone(),
                    confidence=state.confidence.clone(), table=done.after,
                )  # fmt: skip
                on_step(event)
                position = state.position.clone()

        self.loop.run(session, each, speculative=not watched)
        canvas = state.canvas[:, pad:].clone()
        return GenerationOutput(
            sequences=canvas,
            nfe=len(commits),
            tokens_per_forward=commits,
            row_nfe=row_nfe,
            row_tokens=count_tokens(canvas[:, prompt:], info.eos_ids),
        )


def config_of(
    model: PreTrainedModel, config: DecodingConfig | None, settings: dict[str, Any]
) -> DecodingConfig:
    """Return the config, or one made of the named settings and the model's defaults.

    Raises:
        TypeError: both a config and settings are given.
    """
    if config is not None and settings:
        raise TypeError(f"config and {sorted(settings)[0]}: expected settings in one of the two")
    return defaults_for(model, **settings) if config is None else config


def check_process(device: torch.device) -> None:
    """Make torch usable on the device if this process was forked.

    Raises:
        RuntimeError: it was forked from one that has used the GPU.
    """
    if os.getpid() == PROCESS:
        return
    if device.type == "cuda":
        torch.cuda.init()  # which raises the error
    else:
        take_one_thread(os.getpid())


@functools.cache  # so that the caller can set more threads after the first call
def take_one_thread(process: int) -> None:
    """Let a forked process compute in the calling thread alone. OpenMP would wait for ever for the
    threads that stayed behind."""
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        logger.warning("in a forked process: torch.set_num_threads(1)")


def as_published(model: PreTrainedModel, device: torch.device, work: Callable[[], R]) -> R:
    """Return work(). The model computes inside what it was trained to, whatever the caller has set:
    it is in eval mode, its GPU is the current device, and autocast, gradients, inference mode, the
    default dtype and the default device are off or torch's own."""
    training = [module for module in model.modules() if module.training]
    dtype, default = torch.get_default_dtype(), torch.get_default_device()
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled(device.type)
    # Buffers that are made in inference mode could not be written outside it.
    plain_mode, cpu = torch.inference_mode(False), torch.device("cpu")
    on_gpu: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()

    def change() -> R:
        for module in training:
            module.training = False
        torch.set_default_dtype(torch.float32)
        # This context looks at every call of torch: on a CPU it costs a step a tenth of its time.
        if default.type != "cpu":
            cpu.__enter__()
        if inference:
            plain_mode.__enter__()
        torch.set_grad_enabled(False)
        torch.set_autocast_enabled(device.type, False)
        on_gpu.__enter__()
        return work()

    def give_back() -> None:
        for module in training:
            module.training = True
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != default:
            cpu.__exit__(None, None, None)
        if torch.is_inference_mode_enabled() != inference:
            plain_mode.__exit__(None, None, None)
        torch.set_grad_enabled(gradients)
        torch.set_autocast_enabled(device.type, autocast)
        on_gpu.__exit__(None, None, None)

    return surely(change, give_back)


class EngineSlot:
    """The place where a model keeps its engine. If a model is copied or unpickled, the new model's
    slot is empty: an engine belongs to one model, and its locks and GPU memory cannot be copied."""

    engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}


def engine_of(model: PreTrainedModel) -> Engine:
    """Return the engine that `generate` keeps with a model from its first call on. Inside a call of
    that engine (in `on_step`), return a new engine."""
    model = unwrap(model)
    check_model(model)
    slot = vars(model).setdefault(ENGINE, EngineSlot())
    if slot.engine is None or slot.engine.device != device_of(model):
        # The engine gets a proxy: a model whose engine referred to it would never be freed.
        slot.engine = Engine(cast(PreTrainedModel, weakref.proxy(model)))
    return Engine(model) if slot.engine.in_call() else slot.engine


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    **settings: Any,
) -> GenerationOutput:
    """Decode `gen_length` positions after each prompt with DSB and DSB Cache (arXiv 2602.05992).

    Args:
        model: from `load_model` or `patch`, or what torch.compile, DDP or PEFT made of it. Modules
            that something is wrapped around (hooks, adapters, quantised layers) are called.
        input_ids: (B, P) int64 or int32 on the model's device, left-padded where lengths differ.
        config: the settings. Instead of a config, settings may be named as keyword arguments; then
            `defaults_for` supplies the others.
        attention_mask: (B, P), 0 for left padding. None means that there is no padding.
        generator: the source of randomness at temperature > 0. The same seed gives the same tokens.
        on_step: a function that is called with a `StepEvent` after every step.

    Returns:
        `GenerationOutput`: the sequences, the number of forwards, and how many tokens each forward
        committed.

    Raises:
        TypeError, ValueError: an argument is not accepted, which is checked before the model runs.
            The message names the argument, its value and what is accepted.
        FloatingPointError: the model's logits are NaN; the message names the step and the row.
        torch.OutOfMemoryError: the message names what did not fit, and a setting that should fit.
    """
    return engine_of(model).generate(
        input_ids, config, attention_mask=attention_mask, generator=generator, on_step=on_step,
        **settings,
    )  # fmt: skip

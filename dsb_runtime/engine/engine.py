"""generate: one engine for every schedule, cache policy and selection rule.

An engine checks the arguments, takes turns between threads and streams, and makes the output; its
loop (`dsb_runtime.engine.loop`) launches step after step (`dsb_runtime.engine.step`).
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_kernels.rows import Row
from dsb_runtime.config import DecodingConfig
from dsb_runtime.defaults import defaults_for
from dsb_runtime.engine.check import check_inputs
from dsb_runtime.engine.forward import Phase, no_phase
from dsb_runtime.engine.graphs import Capture, CudaGraphs
from dsb_runtime.engine.loop import Loop, StepDone
from dsb_runtime.engine.parallel import agree, is_sharded
from dsb_runtime.families import check_model

ENGINE = "_dsb_engine"  # where a model keeps the engine that `generate` made for it
PROMPT_MULTIPLE = 64  # prompts are padded to it on the left where steps are captured


@dataclass
class GenerationOutput:
    """What `generate` returns; B rows, prompt P, response G."""

    sequences: Tensor  # (B, P + G) int64, with the left padding
    nfe: int  # forward passes run
    tokens_per_forward: list[int]  # positions committed by each forward, over all rows
    row_nfe: list[int]  # forward passes that each row took part in
    row_tokens: list[int]  # per row: response positions up to and including its first EOS


@dataclass
class StepEvent:
    """One forward, after its commit: what `on_step` is called with. Copy the canvas if it must
    outlast the call: the next step writes into it."""

    index: int  # forwards before this one
    kind: str  # "refresh" (every position), "response" (without the prompt) or "window"
    rows: list[int]  # batch rows that took part
    before: list[tuple[int, int, int]]  # their (start, end, prefix) in this forward
    canvas: Tensor  # (B, L) after the commit
    position: Tensor  # (B, K) candidates of this forward, -1 beyond
    commit: Tensor  # (B, K) bool, which of them were committed
    confidence: Tensor  # (B, K)
    table: list[Row]  # every batch row as it is now: its block, and what it needs next


def count_tokens(response: Tensor, eos_ids: tuple[int, ...]) -> list[int]:
    """How many positions of each row stand up to and including its first EOS. response: (B, G)."""
    length = response.shape[1]
    index = torch.arange(length, device=response.device)
    eos = torch.isin(response, torch.tensor(eos_ids, device=response.device, dtype=torch.int64))
    return (torch.where(eos, index, length - 1).amin(-1) + 1).tolist()


class Engine:
    """Decodes with one model, and keeps the K/V cache and captured steps between calls.

    `dsb_runtime.generate` keeps one for each model; make your own to set how it runs.

    Args:
        model: from `load_model` or `patch`.
        graphs: capture steps as CUDA graphs and replay them; None does so on a GPU.
        capture: how a step is captured; None takes CUDA graphs.
        phase: entered around each phase of a step by its name, for a profiler.
        observer: entered around each launch of a step by its kind, "window", "refresh" or
            "response".

    Raises:
        TypeError: not such a model.
        ValueError: graphs without a GPU.
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
        self.lock = threading.Lock()
        self.thread: int | None = None  # the one that is inside a call
        self.stream: torch.cuda.Stream | None = None  # of the last call

    def release(self) -> None:
        """Give back the cache and every captured step; the next call makes them anew."""
        self.loop.release()

    def in_call(self) -> bool:
        """Whether this thread is inside a call (another one waits for its turn)."""
        return self.thread == threading.get_ident()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Make the model's GPU the current one, which events, captures and the compiler take.

        A stream other than the last call's waits for that one, where a speculative launch may still
        run over the buffers that calls share.
        """
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.stream not in (None, stream):
                stream.wait_stream(self.stream)
            self.stream = stream
            yield

    # A caller may be in inference mode: buffers that were made in it could not be written later.
    @torch.inference_mode(False)
    @torch.no_grad()
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
            RuntimeError: called by `on_step` of a call of this engine.
        """
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
        with self.lock:
            self.thread = threading.get_ident()
            try:
                with self.on_device():
                    return self.decode(config, input_ids, leftpad, generator, on_step)
            finally:
                self.thread = None

    def decode(
        self,
        config: DecodingConfig,
        input_ids: Tensor,
        leftpad: Tensor,
        generator: torch.Generator | None,
        on_step: Callable[[StepEvent], None] | None,
    ) -> GenerationOutput:
        """Decode with arguments that have been checked."""
        batch, prompt = input_ids.shape
        watched = on_step is not None
        # Captured steps serve prompts up to the next multiple. A watcher sees the canvas unpadded.
        pad = 0 if watched or self.loop.capture is None else -prompt % PROMPT_MULTIPLE
        session = self.loop.session(config, input_ids, leftpad, pad)
        state, info = session.state, check_model(self.model)
        if config.temperature > 0:
            # A GPU's default generator refuses to draw while another thread captures a graph.
            source = "cpu" if generator is None else generator.device
            seed = torch.randint(2**62, (), dtype=torch.int64, generator=generator, device=source)
            seed = seed.to(input_ids.device)
            if is_sharded(self.model.lm_head):
                agree(self.model.lm_head, seed)
            state.seed.copy_(seed)
        commits: list[int] = []
        row_nfe = [0] * batch
        position = state.position.clone()  # of the coming step

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
                    canvas=state.canvas, position=position, commit=state.commit.clone(),
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
    """The config, or the settings by name with the model's defaults for the others; not both."""
    if config is not None and settings:
        raise TypeError(f"config and {sorted(settings)[0]}: expected settings in one of the two")
    return defaults_for(model, **settings) if config is None else config


class EngineSlot:
    """Where a model keeps its engine. The slot of a copied or unpickled model is empty: an engine
    belongs to one model, and has locks and GPU memory that cannot be copied."""

    engine: Engine | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {}


def device_of(model: PreTrainedModel) -> torch.device:
    return cast(torch.nn.Embedding, model.get_input_embeddings()).weight.device


def engine_of(model: PreTrainedModel) -> Engine:
    """The engine that `generate` keeps with a model from its first call on. Inside a call of that
    engine, a new one."""
    check_model(model)
    slot = vars(model).setdefault(ENGINE, EngineSlot())
    if slot.engine is None or slot.engine.device != device_of(model):
        # The engine has a proxy of the model, which must not keep itself alive.
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
        model: from `load_model` or `patch`.
        input_ids: (B, P) int64 or int32 on the model's device, left-padded where lengths differ.
        config: the settings; or name its fields as keyword arguments, not both. `defaults_for`
            gives those that are not named.
        attention_mask: (B, P), 0 for left padding; None means none.
        generator: source of randomness at temperature > 0; the same seed gives the same tokens.
        on_step: called after every forward with a `StepEvent`.

    Returns:
        `GenerationOutput`: sequences, forwards, tokens committed by each forward.

    Raises:
        TypeError, ValueError: bad input, before any compute; the message names argument, value and
            what is accepted.
        FloatingPointError: the model's logits are NaN; the message names the step and the row.
        torch.OutOfMemoryError: the message names the bytes asked for and a setting that fits.
    """
    return engine_of(model).generate(
        input_ids, config, attention_mask=attention_mask, generator=generator, on_step=on_step,
        **settings,
    )  # fmt: skip

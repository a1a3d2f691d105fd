"""generate and infill: one engine for every schedule, cache policy and selection rule.

An engine checks the arguments, lets threads and streams take turns, and makes the output. Its loop
(`dsb_runtime.engine.loop`) launches one step (`dsb_runtime.engine.step`) after another.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_kernels._op import use_triton
from dsb_runtime.config import DecodingConfig, check_bool
from dsb_runtime.defaults import infill_defaults
from dsb_runtime.engine.check import (
    check_config,
    check_infill,
    check_inputs,
    check_masks,
    check_samples,
    config_of,
)
from dsb_runtime.engine.drafts import NO_DRAFTS, DraftingStep, Drafts
from dsb_runtime.engine.forward import Phase, no_phase
from dsb_runtime.engine.graphs import Capture, CudaGraphs
from dsb_runtime.engine.loop import Loop, StepDone
from dsb_runtime.engine.output import GenerationOutput, StepEvent, make_output
from dsb_runtime.engine.parallel import agree, is_tensor_parallel
from dsb_runtime.engine.step import DecodeState
from dsb_runtime.engine.stops import RowEnds, StopStrings, check_stop_strings
from dsb_runtime.engine.turns import Turns, as_published, check_process
from dsb_runtime.families import check_model, device_of, unwrap

ENGINE = "_dsb_engine"  # where a model keeps the engine that `generate` made for it
MAKING = Turns()  # two threads may make the first call


@dataclass(frozen=True)
class Call:
    """The arguments of `generate`, or with `fill` of `infill`, as they are given."""

    fill: bool
    input_ids: Tensor
    config: DecodingConfig | None
    settings: dict[str, Any]
    attention_mask: Tensor | None
    generator: torch.Generator | None
    on_step: Callable[[StepEvent], None] | None
    num_return_sequences: int
    record: bool
    stops: StopStrings | None = None


class Engine:
    """Decodes with one model, and keeps the K/V cache and captured steps between calls.

    `dsb_runtime.generate` keeps an engine for each model. Make your own to choose how it runs.

    Args:
        model: from `load_model` or `patch`.
        graphs: whether to capture steps and replay them. None means True where the ops launch
            kernels on a GPU, or if `capture` is set.
        capture: how a step is captured. None means as a CUDA graph.
        phase: each phase of a step runs inside the context manager `phase(name)`, for a profiler.
        observer: each launch of a step runs inside the context manager `observer(kind)`, where
            `kind` is "window", "refresh" or "response".

    Raises:
        TypeError: `model` does not come from `load_model` or `patch`.
        ValueError: `graphs` is True, `capture` is None, and the model is not on a GPU or the ops
            run their definitions there.
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
        # The definitions read values on the host, which no graph can hold.
        by_kernels = on_gpu and use_triton(torch.empty(0, device=self.device))
        if graphs is None:
            graphs = by_kernels or capture is not None
        if graphs and capture is None:
            if not by_kernels:
                why = "no kernels run here" if on_gpu else "the model is not on a CUDA device"
                raise ValueError(f"graphs=True: {why}; expected False")
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
        num_return_sequences: int = 1,
        record: bool = False,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> GenerationOutput:
        """Decode as `dsb_runtime.generate` does, with this engine's model. Threads take turns.

        Raises:
            RuntimeError: an `on_step` of this engine calls it, or this process was forked from one
                that has used the GPU.
        """
        stops = check_stop_strings(stop_strings, tokenizer, check_model(self.model))
        call = Call(
            False, input_ids, config, settings, attention_mask, generator, on_step,
            num_return_sequences, record, stops,
        )  # fmt: skip
        return self.answer(call)

    def infill(
        self,
        input_ids: Tensor,
        config: DecodingConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        on_step: Callable[[StepEvent], None] | None = None,
        num_return_sequences: int = 1,
        record: bool = False,
        **settings: Any,
    ) -> GenerationOutput:
        """Fill masks as `dsb_runtime.infill` does, with this engine's model. Threads take turns.

        Raises:
            RuntimeError: as in `generate`.
        """
        call = Call(
            True, input_ids, config, settings, attention_mask, generator, on_step,
            num_return_sequences, record,
        )  # fmt: skip
        return self.answer(call)

    def answer(self, call: Call) -> GenerationOutput:
        """Check the arguments of a call, and decode."""
        check_process(self.device)
        config, leftpad = self.check(call)
        if self.in_call():
            raise RuntimeError(
                f"Engine.{'infill' if call.fill else 'generate'}: called by its own on_step; "
                "expected another engine"
            )

        def work() -> GenerationOutput:
            """Decode. A canvas that was made in the caller's inference mode could not be written
            outside it, so it is made here."""
            canvas = call.input_ids.long()
            if not call.fill:
                mask_id = check_model(self.model).mask_id
                response = canvas.new_full((len(canvas), config.gen_length), mask_id)
                canvas = torch.cat([canvas, response], dim=1)
            rows, padding = (
                x.repeat_interleave(call.num_return_sequences, 0) for x in (canvas, leftpad)
            )
            return self.decode(call, config, rows, padding)

        return self.turns.run(lambda: as_published(self.model, self.device, work))

    def check(self, call: Call) -> tuple[DecodingConfig, Tensor]:
        """Check all arguments of a call. Returns its config, and how many padding positions stand
        before each row, (B,) int32."""
        if call.fill:
            check_config(call.config, call.settings)
            leftpad, lengths = check_masks(self.model, call.input_ids, call.attention_mask)
            config = infill_defaults(self.model, max(lengths), call.config, **call.settings)
            check_infill(self.model, config, lengths, call.generator)
        else:
            config = config_of(self.model, call.config, call.settings)
            leftpad = check_inputs(
                self.model, config, call.input_ids, call.attention_mask, call.generator
            )
        if call.stops is not None and config.drafts:
            raise ValueError(
                f"drafts={config.drafts}: a stop string may end a row before its draft; expected 0 "
                "with stop_strings"
            )
        check_samples(call.num_return_sequences, config)
        check_bool("record", call.record)
        if call.on_step is not None and not callable(call.on_step):
            raise TypeError(
                f"on_step={call.on_step!r}: expected a callable that takes a StepEvent, or None"
            )
        return config, leftpad

    def decode(
        self, call: Call, config: DecodingConfig, canvas: Tensor, leftpad: Tensor
    ) -> GenerationOutput:
        """Fill the masks of a canvas (B, L). The arguments of the call have been checked."""
        self.follow_last_call()
        batch, length = canvas.shape
        watched = call.on_step is not None
        # A call with `on_step` adds no padding, since the caller sees the state's tensors.
        session = self.loop.session(config, canvas, leftpad, record=call.record, roomy=not watched)
        state, info = session.state, check_model(self.model)
        pad = state.canvas.shape[1] - length
        index = torch.arange(length, device=canvas.device)
        masked = (canvas == info.mask_id) & (index >= leftpad[:, None])

        def filled(state: DecodeState) -> Tensor:
            """The canvas of a state. A step that ends a row at an EOS writes EOS over the rest of
            its response: what was given there is put back."""
            return torch.where(masked, state.canvas[:, pad:], canvas)

        if config.draws:
            # A GPU's default generator refuses to draw while another thread captures a graph.
            source = "cpu" if call.generator is None else call.generator.device
            seed = torch.randint(
                2**62, (), dtype=torch.int64, generator=call.generator, device=source
            )
            seed = seed.to(canvas.device)
            if is_tensor_parallel(self.model):
                agree(self.model.lm_head, seed)
            state.seed.copy_(seed)
        steps = 0
        commits: list[int] = []  # of each forward
        row_nfe = [0] * batch
        end_rows = None if call.stops is None else RowEnds(call.stops, info, config.stop_at_eos)
        position = state.position.clone()  # the candidates of the coming step

        def each(done: StepDone) -> None:
            nonlocal position, steps
            new = sum(row.new for row in done.after if row.took_part)
            if done.draft:
                commits[-1] += new
            else:
                commits.append(new)
                for row in done.rows:
                    row_nfe[row] += 1
            steps += 1
            if end_rows is not None:
                end_rows(state, done.rows, done.after)
            if call.on_step is not None:
                before = [done.before[row] for row in done.rows]
                event = StepEvent(
                    index=steps - 1, kind=done.shape.kind.label, rows=done.rows,
                    before=[(row.start, row.end, row.prefix) for row in before],
                    canvas=filled(done.state), position=position,
                    commit=done.state.commit.clone(), confidence=done.state.confidence.clone(),
                    table=done.after, draft=done.draft,
                )  # fmt: skip
                call.on_step(event)
                position = done.state.position.clone()

        # With stop strings, `each` decides whether a row takes part in the next step.
        self.loop.run(session, each, speculative=not watched and call.stops is None)
        sequences = filled(state)
        if end_rows is not None:
            masked = masked & end_rows.before(range(batch), index + pad)
        drafts = NO_DRAFTS
        if isinstance(session.step, DraftingStep):
            drafts = Drafts(*session.step.drafts.counts.sum(0).tolist())
        own = slice(pad if call.fill else pad + length - config.gen_length, -1)
        return make_output(
            sequences, masked, config, info, commits, row_nfe,
            (state.step_map[:, own], state.logprobs[:, own]) if call.record else None,
            drafts=drafts, ends=not call.fill or config.stop_at_eos,
        )  # fmt: skip


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

    def is_there() -> bool:
        return slot.engine is not None and slot.engine.device == device_of(model)

    def make() -> None:
        if not is_there():
            # The engine gets a proxy: a model whose engine referred to it would never be freed.
            slot.engine = Engine(cast(PreTrainedModel, weakref.proxy(model)))

    if not is_there():
        MAKING.run(make)
    return Engine(model) if slot.engine.in_call() else slot.engine


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    num_return_sequences: int = 1,
    record: bool = False,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
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
        num_return_sequences: how many samples of each row there are, each with its own noise. They
            stand side by side: row i of the output is a sample of prompt i // num_return_sequences.
        record: whether the output has `step_map` and `logprobs`. It changes no token, and costs
            another product with the LM head in each step.
        stop_strings, tokenizer: a row ends once the text of its response before the first mask
            contains one of the strings, as the tokenizer decodes it without special tokens (a stop
            string may be one of these itself). As in transformers, the token that completes the
            string is the last that is kept; what follows becomes EOS. The model's first EOS id is
            taken, and is not counted.

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
        num_return_sequences=num_return_sequences, record=record, stop_strings=stop_strings,
        tokenizer=tokenizer, **settings,
    )  # fmt: skip


def infill(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: DecodingConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    num_return_sequences: int = 1,
    record: bool = False,
    **settings: Any,
) -> GenerationOutput:
    """Fill the mask ids of `input_ids`, wherever they stand, and keep every other token.

    A row's response begins at its first mask and ends behind its last one. It is decoded as by
    `generate`: tokens that are given between the two count as committed already, and what follows
    the response is context, which refreshes compute as they compute the prompt.

    Args:
        input_ids: (B, L) int64 or int32 on the model's device, left-padded where lengths differ.
            Every row has at least one mask id, and rows may have them in different places.
        config: the settings. The length of the longest response takes the place of `gen_length`.
            Instead of a config, settings may be named as keyword arguments, except `gen_length`.
        settings: as for `generate`, but `stop_at_eos` is False by default: an EOS is a token like
            others, since something may follow it. With True, a row is finished once its response
            has an EOS (given or committed) with no mask to its left, and its other masks become
            EOS.
        model, attention_mask, generator, on_step, num_return_sequences, record: as for `generate`,
            which raises the same errors.

    Returns:
        `GenerationOutput`, whose `sequences` are `input_ids` without masks.
    """
    return engine_of(model).infill(
        input_ids, config, attention_mask=attention_mask, generator=generator, on_step=on_step,
        num_return_sequences=num_return_sequences, record=record, **settings,
    )  # fmt: skip

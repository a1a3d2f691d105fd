"""The decode loop: choose a step, launch it, read the row table, repeat.

    while some row has a next step:
        step = next_step(table)        # refreshes first, then windows
        launch(step)                   # run it, or replay its CUDA graph
        table = read_back()            # (batch, columns) int32, the only copy to the host

On a GPU the loop launches the likely next step before it has read the table (speculative launch).
A wrong guess is harmless: a step skips every row that needs something else.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dsb_kernels.rows import Row, UnmaskSpec, read_rows
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import (
    CacheShape,
    KVCache,
    allocate,
    cache_shape_of,
    is_out_of_memory,
    step_message,
)
from dsb_runtime.engine.called import CalledModel, wrapped_module
from dsb_runtime.engine.drafts import DraftingStep, new_drafts
from dsb_runtime.engine.forward import Backbone, Phase, no_phase
from dsb_runtime.engine.graphs import Capture, HostCopy, length_class
from dsb_runtime.engine.layers import check_dtypes, fingerprint
from dsb_runtime.engine.sampling import ban_of
from dsb_runtime.engine.session import Session, next_step, speculate
from dsb_runtime.engine.step import DecodeState, Step, StepShape, new_state, spec_of
from dsb_runtime.families import check_model

logger = logging.get_logger(__name__)
Group = tuple[int, UnmaskSpec, tuple[Any, ...], bool, bool]  # batch, spec, settings, record, roomy
SESSIONS = 8  # how many sessions, of different batch sizes or settings, a loop keeps
SPECULATION_WINDOW = 8  # how many recent steps predict the most tokens that a row may commit


@dataclass
class LaunchedStep:
    """A step that has been launched, and the copy of the row tables as it will leave them."""

    shape: StepShape
    tables: HostCopy


class Tables(NamedTuple):
    """The row tables that a step leaves, on the host."""

    now: list[Row]  # after the step, and after the next one for a row whose draft was accepted
    between: list[Row]  # after the step alone
    drafts: list[Row]  # of the draft states that may run beside the next step


def read_tables(values: Tensor) -> Tables:
    """Read what `Step.tables` gives."""
    if values.ndim == 2:
        rows = read_rows(values)
        return Tables(rows, rows, [])
    return Tables(*map(read_rows, values))


@dataclass
class StepDone:
    """A step that has run: the row table before it and after it, and the state after it. If the
    host lags behind, the tensors of the state are later ones."""

    shape: StepShape
    before: list[Row]
    after: list[Row]
    state: DecodeState
    draft: bool = False  # whether it ran in the forward of the step before it

    @property
    def rows(self) -> list[int]:
        """The batch rows that took part."""
        return [i for i, row in enumerate(self.after) if row.took_part]


class Loop:
    """Decodes batches with one model, and keeps its K/V cache and captured steps between calls. Two
    threads must not use a loop at the same time.

    Args:
        model: from `load_model` or `patch`.
        capture: how a step is captured for replay. None means that no step is captured.
        phase: each phase of a step runs inside the context manager `phase(name)`.
        observer: each launch of a step runs inside the context manager `observer(kind)`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capture: Capture | None = None,
        phase: Phase = no_phase,
        observer: Phase = no_phase,
    ) -> None:
        self.model, self.capture, self.phase, self.observer = model, capture, phase, observer
        self.release()

    def release(self) -> None:
        """Give back the cache and every captured step; the next call makes them anew."""
        self.sessions: OrderedDict[Any, Session] = OrderedDict()
        self.storage: Tensor | None = None  # the memory of the K/V cache
        self.backbone: Backbone | CalledModel | None = None

    # --- buffers ------------------------------------------------------------------------------

    def reserve(
        self, batch: int, length: int, shape: CacheShape
    ) -> tuple[Backbone | CalledModel, Tensor]:
        """Make buffers for `batch` rows of `length` positions, unless the present ones suffice.

        Raises:
            torch.OutOfMemoryError: the message names the bytes that were asked for and a setting
                that fits.
        """
        if self.backbone is not None and self.backbone.fingerprint != fingerprint(self.model):
            self.release()
        if self.storage is None or len(self.storage) < shape.elements(batch, length):
            self.sessions.clear()  # captured steps point into the old cache
            self.storage = None
            self.storage = allocate(shape, batch, length)
        if self.backbone is None or self.backbone.max_length < length:
            self.sessions.clear()
            self.backbone = self.new_backbone(length)
        return self.backbone, self.storage

    def new_backbone(self, length: int) -> Backbone | CalledModel:
        wrapped = wrapped_module(self.model)
        if wrapped is None:
            check_dtypes(self.model)
            return Backbone(self.model, length, self.phase)
        logger.warning_once(
            f"{wrapped}: every step calls the model's own forward, which is slower than ours"
        )
        return CalledModel(self.model, self.phase)

    def session(
        self,
        config: DecodingConfig,
        canvas: Tensor,
        leftpad: Tensor,
        *,
        record: bool = False,
        roomy: bool = False,
    ) -> Session:
        """Return a session in the state before the first step, over a canvas (B, L). With `record`,
        its steps keep what they commit. With `roomy`, a captured session has more padding before
        the canvas, so that its steps serve every length up to its own."""
        info = check_model(self.model)
        spec = spec_of(config, info)
        roomy = roomy and self.capture is not None and wrapped_module(self.model) is None
        # Everything that a captured step takes as a constant, but for its canvas.
        settings = {**vars(config), "gen_length": None}
        group = (len(canvas), spec, tuple(settings.values()), record, roomy)
        pad = self.room(group, canvas.shape[1]) - canvas.shape[1] if roomy else 0
        try:
            return self.session_of(group, config, canvas, leftpad, pad)
        except torch.OutOfMemoryError:
            if pad == 0:
                raise
            return self.session_of(group, config, canvas, leftpad, 0)

    def room(self, group: Group, length: int) -> int:
        """How many positions the canvas of a captured session has that serves `length`: those that
        a session of the group has already, or a class of lengths."""
        sessions = [s for key, s in self.sessions.items() if key[0] == group]
        longest = max((s.state.canvas.shape[1] for s in sessions), default=0)
        # Some rotary tables change if they are longer than what the model was trained for.
        limit = self.model.config.max_position_embeddings
        return longest if longest >= length else min(length_class(length), limit)

    def session_of(
        self, group: Group, config: DecodingConfig, canvas: Tensor, leftpad: Tensor, pad: int
    ) -> Session:
        """Return a session of this group with `pad` more padding positions before the canvas."""
        info, (_, spec, _, record, roomy) = check_model(self.model), group
        canvas = torch.cat([canvas.new_zeros(len(canvas), pad), canvas], dim=1)
        state = new_state(canvas, leftpad + pad, spec, config, record)
        shape = cache_shape_of(self.model)
        num_layers = shape.layers
        if config.cache == "none":  # one buffer that all layers share
            shape = replace(shape, layers=1)
        batch, length = canvas.shape
        # With guidance, a row has a second copy of every layer's K/V; with cache="none" a draft is
        # a canvas beside its row's.
        second = config.cfg_scale > 0 or (config.drafts > 0 and config.cache == "none")
        copies = 2 if second else 1
        reserved = replace(shape, layers=copies * shape.layers)
        backbone, storage = self.reserve(batch, length, reserved)
        # Steps that serve other lengths take every row for padded.
        padded = roomy or bool((leftpad > 0).any())
        key = (group, canvas.shape, state.position.shape, padded)
        session = self.sessions.pop(key, None)
        if session is None:
            cache = KVCache.over(storage, shape, copies * batch, length, num_layers)
            ban = ban_of(config, self.model.config.vocab_size, storage)
            step_class = DraftingStep if config.drafts else Step
            step = step_class(backbone, info, cache, state, spec, config, padded, ban)
            session = Session(step, self.capture if backbone.replayable else None)
        else:
            values = (*state, *new_drafts(state)) if config.drafts else state
            for buffer, value in zip(session.step.buffers, values, strict=True):
                buffer.copy_(value)
        if self.capture is not None:
            self.sessions[key] = session
            while len(self.sessions) > SESSIONS:
                self.sessions.popitem(last=False)
        return session

    # --- steps --------------------------------------------------------------------------------

    def launch(self, session: Session, shape: StepShape) -> LaunchedStep:
        """Run a step, or replay it if it has been captured.

        Raises:
            torch.OutOfMemoryError: the message names the step and a setting that should fit.
        """
        replay = session.replays.get(shape)
        try:
            with self.observer(shape.kind.label):
                if replay is not None:
                    replay()
                else:
                    session.step(shape)
                launched = LaunchedStep(shape, HostCopy(session.step.tables()))
            if session.capture is not None and replay is None:
                # The run above was a step of the decoding, and has compiled all kernels. The
                # capture records the same launches without running them.
                session.replays[shape] = session.capture(lambda: session.step(shape))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.sessions.clear()
            message = step_message(shape.kind.label, shape.num_rows, shape.width, error)
            raise torch.OutOfMemoryError(message) from error
        return launched

    def run(self, session: Session, each: Callable[[StepDone], None], *, speculative: bool) -> None:
        """Decode a session to its end.

        Args:
            each: a function that is called with every step in which a row took part.
            speculative: whether to launch the likely next step before `each` gets this one.

        Raises:
            FloatingPointError: the model's logits are NaN.
        """
        tables = read_tables(HostCopy(session.step.tables()).wait())
        under_way: deque[LaunchedStep] = deque()
        # The most tokens that each recent step committed in one row.
        most_new: deque[int] = deque(maxlen=SPECULATION_WINDOW)
        steps, useful = 0, True
        while (shape := next_step(session, tables.now, tables.drafts)) is not None:
            if not under_way:
                under_way.append(self.launch(session, shape))
            if speculative and useful and len(under_way) == 1:
                expected = max(most_new, default=session.step.config.block_length)
                guess = speculate(session, tables.now, under_way[0].shape, expected)
                if guess is not None:
                    under_way.append(self.launch(session, guess))
            done, before = under_way.popleft(), tables.now
            tables = read_tables(done.tables.wait())
            useful = any(row.took_part for row in tables.between)
            if not useful:
                continue  # the guess was wrong: the next step is launched without another guess
            ran = [StepDone(done.shape, before, tables.between, session.step.between)]
            if done.shape.num_drafts and any(row.took_part for row in tables.now):
                after = StepDone(done.shape, tables.between, tables.now, session.state, draft=True)
                ran.append(after)
            most_new.append(max(sum(s.after[i].new for s in ran) for i in range(len(before))))
            for step in ran:
                failed = [index for index, row in enumerate(step.after) if row.failed]
                if failed:
                    # Also the copies of guidance, and what a step that is under way will leave.
                    session.step.cache.forget()
                    raise FloatingPointError(
                        f"step {steps}: the model's logits are NaN (row {failed[0]})"
                    )
                steps += 1
                each(step)
        if isinstance(session.step.backbone, CalledModel):
            session.step.backbone.join_others()

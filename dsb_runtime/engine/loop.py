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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from dsb_kernels.rows import Row, StepKind, read_rows
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
from dsb_runtime.engine.forward import Backbone, Phase, no_phase
from dsb_runtime.engine.graphs import Capture, HostCopy, row_class, width_class
from dsb_runtime.engine.layers import check_dtypes, fingerprint
from dsb_runtime.engine.step import DecodeState, Step, StepShape, new_state, spec_of
from dsb_runtime.families import check_model

logger = logging.get_logger(__name__)
SESSIONS = 8  # how many sessions, of different shapes or settings, a loop keeps
SPECULATION_WINDOW = 8  # how many recent steps predict the most tokens that a row may commit


@dataclass
class Launched:
    """A step that has been launched, and the copy of the row table as it will leave it."""

    shape: StepShape
    table: HostCopy


@dataclass
class StepDone:
    """A step that has run: the row table before it and after it."""

    shape: StepShape
    before: list[Row]
    after: list[Row]

    @property
    def rows(self) -> list[int]:
        """The batch rows that took part."""
        return [i for i, row in enumerate(self.after) if row.took_part]


@dataclass
class Session:
    """The state of a batch of one shape and the steps over it."""

    step: Step
    capture: Capture | None
    replays: dict[StepShape, Callable[[], None]] = field(default_factory=dict)

    @property
    def captured(self) -> bool:
        """Whether steps are captured, for which capacities are rounded up."""
        return self.capture is not None

    @property
    def state(self) -> DecodeState:
        return self.step.state


def capacity_for(session: Session, kind: StepKind, rows: list[Row], growth: int = 0) -> StepShape:
    """The capacity of a step of this kind for these rows. Until the step is launched, their windows
    may grow by `growth` positions."""
    batch, length = session.state.canvas.shape
    if kind == StepKind.WINDOW:
        width = max(row.end - row.start + row.prefix for row in rows) + growth
    else:
        width = length if kind == StepKind.REFRESH else session.step.response_width
    if not session.captured:
        return StepShape(kind, len(rows), width, max(row.num_candidates for row in rows))
    if kind == StepKind.WINDOW:
        width = width_class(width, length)
    return StepShape(kind, row_class(len(rows), batch), width, session.state.position.shape[1])


def next_step(session: Session, table: list[Row]) -> StepShape | None:
    """The step that the rows need now, or None if every row is done. Refreshes come first, so that
    the rows that were refreshed then share window steps with the others."""
    for kind in (StepKind.REFRESH, StepKind.RESPONSE, StepKind.WINDOW):
        rows = [row for row in table if row.next_kind == kind]
        if rows:
            return capacity_for(session, kind, rows)
    return None


def speculate(
    session: Session, table: list[Row], launched: StepShape, most_new: int
) -> StepShape | None:
    """The step that almost certainly follows `launched`, or None if the host must wait.

    The guess is right unless a row stops at an EOS or commits more than `most_new` tokens.

    Args:
        table: the row table that `launched` began with.
        most_new: the most tokens that `launched` is expected to commit in one row.
    """
    config, spec = session.step.config, session.step.spec
    rows = [row for row in table if row.next_kind != StepKind.NOTHING]
    if not session.captured or len(rows) > launched.num_rows:
        return None
    for row in rows:
        # The row must take part in `launched`, and have masks left after it.
        masks_left = row.response_end - row.response_start - row.unmasked
        if row.next_kind != launched.kind or masks_left <= most_new:
            return None
    if config.cache == "none":
        return launched  # with cache="none" every step is a refresh
    is_window = launched.kind == StepKind.WINDOW
    since_refresh = max(row.since_refresh for row in rows) if is_window else 0
    if since_refresh + most_new >= config.block_length:
        return None  # a refresh may be due
    growth = most_new if is_window else most_new + spec.prefix_window
    return capacity_for(session, StepKind.WINDOW, rows, growth)


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
        pad: int,
        record: bool = False,
    ) -> Session:
        """Return a session in the state before the first step, with `pad` more padding positions
        before the canvas (B, L). With `record`, its steps keep what they commit."""
        info = check_model(self.model)
        spec = spec_of(config, info)
        canvas = torch.cat([canvas.new_zeros(len(canvas), pad), canvas], dim=1)
        state, shape = new_state(canvas, leftpad + pad, spec, record), cache_shape_of(self.model)
        num_layers = shape.layers
        if config.cache == "none":  # one buffer that all layers share
            shape = replace(shape, layers=1)
        padded = pad > 0 or bool((leftpad > 0).any())
        batch, length = canvas.shape
        backbone, storage = self.reserve(batch, length, shape)
        key = (canvas.shape, state.position.shape, spec, config, padded, record)
        session = self.sessions.pop(key, None)
        if session is None:
            cache = KVCache.over(storage, shape, batch, length, num_layers)
            step = Step(backbone, info, cache, state, spec, config, padded)
            session = Session(step, self.capture if backbone.replayable else None)
        else:
            for buffer, value in zip(session.state, state, strict=True):
                buffer.copy_(value)
        if self.capture is not None:
            self.sessions[key] = session
            while len(self.sessions) > SESSIONS:
                self.sessions.popitem(last=False)
        return session

    # --- steps --------------------------------------------------------------------------------

    def launch(self, session: Session, shape: StepShape) -> Launched:
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
                launched = Launched(shape, HostCopy(session.state.table))
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
        table = read_rows(HostCopy(session.state.table).wait())
        under_way: deque[Launched] = deque()
        # The most tokens that each recent step committed in one row.
        most_new: deque[int] = deque(maxlen=SPECULATION_WINDOW)
        steps, useful = 0, True
        while (shape := next_step(session, table)) is not None:
            if not under_way:
                under_way.append(self.launch(session, shape))
            if speculative and useful and len(under_way) == 1:
                expected = max(most_new, default=session.step.config.block_length)
                guess = speculate(session, table, under_way[0].shape, expected)
                if guess is not None:
                    under_way.append(self.launch(session, guess))
            done, before = under_way.popleft(), table
            table = read_rows(done.table.wait())
            useful = any(row.took_part for row in table)
            if not useful:
                continue  # the guess was wrong: the next step is launched without another guess
            most_new.append(max(row.new for row in table if row.took_part))
            failed = [index for index, row in enumerate(table) if row.failed]
            if failed:
                for index in failed:
                    session.step.cache.forget(index)
                raise FloatingPointError(
                    f"step {steps}: the model's logits are NaN (row {failed[0]})"
                )
            steps += 1
            each(StepDone(done.shape, before, table))
        if isinstance(session.step.backbone, CalledModel):
            session.step.backbone.join_others()

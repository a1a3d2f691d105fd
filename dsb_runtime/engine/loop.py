"""Runner: the buffers of a model's decoding, kept between calls, and the loop over its steps.

The device decides everything but the shapes of the next step. The host learns by one small copy
per step what the rows need next (`RowFlags`) and launches it; where what comes next is all but
certain it launches that before the copy has arrived, so that a GPU never waits for it. A wrong
guess costs a step and changes nothing (`dsb_runtime.engine.step`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsb_kernels.rows import NOTHING, REFRESH, RESPONSE, WINDOW
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import WindowCache
from dsb_runtime.engine.forward import Backbone, Phase, no_phase
from dsb_runtime.engine.graphs import Capture, HostCopy, row_class, width_class
from dsb_runtime.engine.layers import fingerprint
from dsb_runtime.engine.memory import allocate, is_out_of_memory, layout_of, step_message
from dsb_runtime.engine.state import KINDS, DecodeState, RowFlags, copy_state, new_state, read_flags
from dsb_runtime.engine.step import Step, StepShape, spec_of

SESSIONS = 8  # calls of different shape or settings whose captured steps are kept


@dataclass
class Launched:
    """A step under way: its shape, and the flags that it will leave."""

    shape: StepShape
    flags: HostCopy


@dataclass
class StepDone:
    """A step that has run: what its rows were before it and are after it."""

    shape: StepShape
    before: list[RowFlags]
    after: list[RowFlags]

    @property
    def rows(self) -> list[int]:
        """Batch rows that took part."""
        return [i for i, row in enumerate(self.after) if row.took_part]


@dataclass
class Session:
    """The state of a batch of one shape and the steps over it, captured ones by their shape."""

    step: Step
    replays: dict[StepShape, Callable[[], None]] = field(default_factory=dict)

    @property
    def state(self) -> DecodeState:
        return self.step.state


class Runner:
    """Runs batches with one model; holds its K/V cache and captured steps between them. Not for two
    threads at a time.

    Args:
        model: from `load_model` or `patch`.
        capture: how a step is captured for replay; None runs every step directly.
        phase: entered around each phase of a step by its name.
    """

    def __init__(
        self, model: PreTrainedModel, capture: Capture | None = None, phase: Phase = no_phase
    ) -> None:
        self.model, self.capture, self.phase = model, capture, phase
        self.release()

    def release(self) -> None:
        """Give back the cache and every captured step; the next call makes them anew."""
        self.sessions: OrderedDict[Any, Session] = OrderedDict()
        self.storage: list[Tensor] = []
        self.backbone: Backbone | None = None

    # --- buffers ------------------------------------------------------------------------------

    def reserve(self, batch: int, length: int, cached: bool) -> None:
        """Have room for `batch` rows of `length` positions.

        Raises:
            torch.OutOfMemoryError: naming the bytes asked for and a setting that fits.
        """
        if self.backbone is not None and self.backbone.fingerprint != fingerprint(self.model):
            self.release()
        slots = batch * (length + 1)
        if cached and (not self.storage or self.storage[0].shape[1] < slots):
            self.sessions.clear()  # captured steps point into the old cache
            self.storage = []
            self.storage = allocate(layout_of(self.model), batch, length)
        if self.backbone is None or len(self.backbone.cos_sin) < length:
            self.sessions.clear()
            self.backbone = Backbone(self.model, length, self.phase)

    def session(
        self, config: DecodingConfig, input_ids: Tensor, leftpad: Tensor, pad: int
    ) -> Session:
        """A session in the state before the first step; `pad` columns stand before the prompts."""
        rows, info = len(input_ids), self.model.dsb
        spec = spec_of(config, info, input_ids.shape[1] + pad)
        response = input_ids.new_full((rows, config.gen_length), info.mask_id)
        canvas = torch.cat([input_ids.new_zeros(rows, pad), input_ids, response], dim=1).long()
        state, cached = new_state(canvas, leftpad + pad, spec), config.cache != "none"
        padded = bool((state.leftpad > 0).any())
        self.reserve(*canvas.shape, cached)
        key = (canvas.shape, spec, config, padded)
        session = self.sessions.pop(key, None)
        if session is None:
            cache = WindowCache.over(self.storage, *canvas.shape) if cached else None
            session = Session(
                Step(self.backbone, self.model.lm_head, info, cache, state, spec, config, padded)
            )
        else:
            copy_state(session.state, state)
        if self.capture is not None:
            self.sessions[key] = session
            while len(self.sessions) > SESSIONS:
                self.sessions.popitem(last=False)
        return session

    # --- steps --------------------------------------------------------------------------------

    def launch(self, session: Session, shape: StepShape) -> Launched:
        """Run a step, or replay it where it is captured.

        Raises:
            torch.OutOfMemoryError: naming the bytes asked for and a setting that fits.
        """
        replay = session.replays.get(shape)
        try:
            if replay is not None:
                replay()
            else:
                session.step(shape)
            launched = Launched(shape, HostCopy(session.state.window.flags))
            if self.capture is not None and replay is None:
                # That was a step like any other, which compiled what it launches; now keep it.
                session.replays[shape] = self.capture(lambda: session.step(shape))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.sessions.clear()
            message = step_message(shape.kind, shape.rows, shape.width, error)
            raise torch.OutOfMemoryError(message) from error
        return launched

    def shape_for(self, session: Session, flags: list[RowFlags], grown: int = 0) -> StepShape:
        """The step that rows with these flags need. Refreshes first: their rows then join the
        others' window steps. `grown`: positions that windows may have grown by since."""
        config, state = session.step.config, session.state
        batch, length = state.canvas.shape
        needs = {kind: [f for f in flags if f.needs == kind] for kind in (REFRESH, RESPONSE)}
        held = state.window.position.shape[1]
        if needs[REFRESH]:
            kind, group, width = "refresh", needs[REFRESH], length
        elif needs[RESPONSE]:
            kind, group = "response", needs[RESPONSE]
            width = config.gen_length + int(self.model.dsb.family.shift)
        else:
            kind, group = "window", [f for f in flags if f.needs == WINDOW]
            width = max(f.end - f.start + f.prefix for f in group) + grown
        if self.capture is None:
            return StepShape(kind, len(group), width, max(f.held for f in group))
        if kind == "window":
            width = width_class(width, length)
        return StepShape(kind, row_class(len(group), batch), width, held)

    def foresee(
        self, session: Session, flags: list[RowFlags], shape: StepShape, most: int
    ) -> StepShape | None:
        """The step that is all but certain to follow `shape`, launched on rows with `flags`, when
        no step commits more than `most` tokens of a row; None where the host should look first."""
        config, live = session.step.config, [f for f in flags if f.needs != NOTHING]
        if self.capture is None or len(live) > shape.rows:
            return None
        if any(f.needs != KINDS[shape.kind] or f.left <= most for f in live):
            return None
        if config.cache == "none":
            return shape
        since = 0 if shape.kind != "window" else max(f.since for f in live)
        if since + most >= config.block_length:
            return None
        grown = most if shape.kind == "window" else most + session.step.spec.prefix_window
        return self.shape_for(session, [replace(f, needs=WINDOW) for f in live], grown)

    def run(self, session: Session, each: Callable[[StepDone], None], *, ahead: bool) -> None:
        """Decode a session to its end. `each` is told of every step that moved a row; with
        `ahead` off, before the next one is launched.

        Raises:
            FloatingPointError: NaN logits.
        """
        flags = read_flags(HostCopy(session.state.window.flags).wait())
        under_way: deque[Launched] = deque()
        recent: deque[int] = deque([session.step.config.block_length], maxlen=8)
        steps, moved = 0, True
        while any(f.needs != NOTHING for f in flags):
            if not under_way:
                under_way.append(self.launch(session, self.shape_for(session, flags)))
            # After a wrong guess the host looks before it guesses again.
            if ahead and moved and len(under_way) == 1:
                guess = self.foresee(session, flags, under_way[0].shape, max(recent))
                if guess is not None:
                    under_way.append(self.launch(session, guess))
            done, before = under_way.popleft(), flags
            flags = read_flags(done.flags.wait())
            moved = any(f.took_part for f in flags)
            if not moved:
                continue
            recent.append(max(f.new for f in flags if f.took_part))
            if steps == 0:
                recent.popleft()  # which stood for "not known yet"
            steps += 1
            failed = [row for row, f in enumerate(flags) if f.failed]
            if failed:
                raise FloatingPointError(
                    f"step {steps - 1}: the model's logits are NaN (row {failed[0]})"
                )
            each(StepDone(done.shape, before, flags))

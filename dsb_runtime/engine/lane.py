"""A lane: rows of one canvas that requests enter and leave while the others go on.

Requests whose settings a step takes as constants share a lane. A lane is a session of fixed shape:
B rows of L positions. Responses end at the canvas's last position, so a shorter request has more
padding before its prompt. What differs between requests stands in their rows: where prompt and
response begin, the seed, the counters.

A row's first step is a refresh, which computes every position of the row. So nothing of the request
before it is left, and the row gets the tokens that its prompt gets alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from dsb_kernels.rows import Column, Row, StepKind, read_rows
from dsb_runtime.config import DecodingConfig
from dsb_runtime.engine.cache import (
    CacheShape,
    KVCache,
    allocate,
    cache_shape_of,
    is_out_of_memory,
    step_message,
)
from dsb_runtime.engine.graphs import HostCopy
from dsb_runtime.engine.loop import Loop
from dsb_runtime.engine.output import GenerationOutput, make_output
from dsb_runtime.engine.request import Request, RowEvent
from dsb_runtime.engine.sampling import ban_of
from dsb_runtime.engine.session import Session, capacity_for, width_of
from dsb_runtime.engine.step import DecodeState, Step, StepShape, new_state
from dsb_runtime.families import check_model, device_of

logger = logging.get_logger(__name__)
STEP_COST = 128  # what a step costs on a CPU besides its positions, in positions
MOST_NARROW = 3  # so many refreshes in a row may leave out those that are wider
LENGTH_MULTIPLE = 64  # a lane has a multiple of so many positions, so that others fit in later


def lane_length(model: PreTrainedModel, length: int) -> int:
    """How many positions the shortest lane for a request of `length` positions has. Some rotary
    tables change if they are longer than what the model was trained for, so no lane is."""
    rounded = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(rounded, model.config.max_position_embeddings)


def copies_of(config: DecodingConfig) -> int:
    """How many times a row's K/V are kept: with guidance, also those without the prompt."""
    return 2 if config.cfg_scale > 0 else 1


def buffers_of(loop: Loop, request: Request) -> CacheShape:
    """The K/V buffers that a lane for this request has."""
    shape = cache_shape_of(loop.model)
    layers = 1 if request.config.cache == "none" else shape.layers
    return replace(shape, layers=layers * copies_of(request.config))


def state_alone(request: Request, length: int, mask_id: int) -> DecodeState:
    """The state of the request before its first step, as the only row of a canvas of `length`
    positions. It is on the CPU."""
    leftpad = length - request.length
    # The padding holds a token of the prompt: keys of another could be NaN.
    canvas = torch.full((1, length), int(request.ids[0]))
    canvas[0, leftpad : leftpad + len(request.ids)] = request.ids
    canvas[0, leftpad + len(request.ids) :] = mask_id
    state = new_state(canvas, torch.tensor([leftpad]), request.spec, request.config, request.record)
    return state._replace(seed=torch.tensor([request.seed]))


def free_rows(state: DecodeState, rows: int, device: torch.device) -> DecodeState:
    """A state of so many rows that are done, whose shapes are those of `state`, which has one."""
    tensors = [x.new_zeros((rows, *x.shape[1:]), device=device) for x in state]
    free = DecodeState(*tensors)
    free.table[:, Column.NEXT_KIND] = int(StepKind.NOTHING)
    return free


class Lane:
    """`rows` rows of `length` positions for requests of one group. A request that leaves its row is
    put into `done`, with its outcome unless it was cancelled.

    Raises:
        torch.OutOfMemoryError: there is no memory for that; the message names what would fit.
    """

    def __init__(
        self, loop: Loop, request: Request, rows: int, length: int, done: list[Request]
    ) -> None:
        self.model = model = loop.model
        self.done = done
        self.info, self.group, self.length = check_model(model), request.group, length
        shape = buffers_of(loop, request)
        self.nbytes = rows * row_bytes(shape, length)
        storage = allocate(shape, rows, length)
        copies = copies_of(request.config)
        one = replace(shape, layers=shape.layers // copies)
        cache = KVCache.over(storage, one, copies * rows, length, model.config.num_hidden_layers)
        backbone = loop.new_backbone(length)
        ban = ban_of(request.config, model.config.vocab_size, storage)
        alone = state_alone(request, length, self.info.mask_id)
        state = free_rows(alone, rows, device_of(model))
        step = Step(backbone, self.info, cache, state, request.spec, request.config, True, ban)
        self.session = Session(step, loop.capture if backbone.replayable else None)
        self.table = read_rows(state.table.cpu())
        self.requests: list[Request | None] = [None] * rows
        self.most = rows  # how many rows one step may have: fewer once it ran out of memory
        # While others have windows to do, a refresh takes so many rows at most. The number doubles
        # for as long as rows are left over, so that none of them waits for long.
        self.crowd = self.usual_crowd = max(1, rows // 4)
        self.passed_over = 0  # how many refreshes in a row were too narrow for some that waited
        self.refreshed: StepKind | None = None  # the kind of the last step, if it was no window

    @property
    def fingerprint(self) -> list[object]:
        return self.session.step.backbone.fingerprint

    @property
    def occupied(self) -> list[int]:
        """The rows that have a request."""
        return [i for i, request in enumerate(self.requests) if request is not None]

    def takes(self, request: Request) -> bool:
        """Whether a request may enter. One that is much shorter would waste the memory of a row,
        and its attention would look at many positions that are padding."""
        shortest = lane_length(self.model, request.length)
        fits = self.group == request.group and shortest <= self.length <= 2 * shortest
        return fits and None in self.requests

    # --- rows ---------------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """Put a request into a free row. The steps of other rows go on as they were."""
        row, alone = self.requests.index(None), state_alone(request, self.length, self.info.mask_id)
        for buffer, value in zip(self.session.state, alone, strict=True):
            buffer[row].copy_(value[0])
        self.requests[row], self.table[row] = request, read_rows(alone.table)[0]

    def leave(self, row: int, outcome: GenerationOutput | BaseException | None) -> None:
        """Free a row, whatever it still needs. Its request is done."""
        request = self.requests[row]
        assert request is not None
        request.outcome, self.requests[row] = outcome, None
        self.done.append(request)
        self.session.state.table[row, Column.NEXT_KIND] = int(StepKind.NOTHING)
        self.table[row].next_kind = StepKind.NOTHING

    def leave_cancelled(self) -> None:
        """Free the rows of cancelled requests."""
        for row in self.occupied:
            if self.requests[row].cancelled():  # type: ignore[union-attr]
                self.leave(row, None)

    # --- steps --------------------------------------------------------------------------------

    def next_shape(self) -> tuple[StepShape, list[int]]:
        """The step that comes next, and the rows that take part first in it.

        Window steps and refreshes alternate, and a refresh takes few rows while others have windows
        to do. So requests that arrive together keep nobody waiting.
        """
        rows_of: dict[int, list[int]] = {kind: [] for kind in StepKind}
        for index in self.occupied:
            rows_of[self.table[index].next_kind].append(index)
        windows = rows_of[StepKind.WINDOW]
        order = [StepKind.REFRESH, StepKind.RESPONSE]
        if self.refreshed == StepKind.REFRESH:
            order.reverse()
        waiting = [kind for kind in order if rows_of[kind]]
        if not waiting or (windows and self.refreshed is not None):
            kind, rows, self.refreshed = StepKind.WINDOW, windows, None
        else:
            kind = self.refreshed = waiting[0]
            rows = self.narrow(rows_of[kind], kind)
            left_over = bool(windows) and len(rows) > self.crowd
            if windows:
                rows = rows[: self.crowd]
            self.crowd = 2 * self.crowd if left_over else self.usual_crowd
        rows = rows[: self.most]
        return capacity_for(self.session, kind, [self.table[index] for index in rows]), rows

    def narrow(self, rows: list[int], kind: StepKind) -> list[int]:
        """The rows of a refresh: all, or those that are so much narrower than the widest that two
        steps are cheaper than one. The wide ones are passed over a few times at most. Captured
        steps are those of a GPU, where a step of few positions costs what one of many does."""
        widths = {index: width_of(self.session, self.table[index], kind) for index in rows}
        ordered = sorted(widths.values())
        saved, widest = max(
            (n * (ordered[-1] - width), width) for n, width in enumerate(ordered, 1)
        )
        if self.session.captured or saved <= STEP_COST or self.passed_over == MOST_NARROW:
            self.passed_over = 0
            return rows
        self.passed_over += 1
        return [index for index in rows if widths[index] <= widest]

    def launch(self, shape: StepShape) -> list[Row]:
        """Run a step, or replay it if it has been captured. Returns the row table after it."""
        session = self.session
        replay = session.replays.get(shape)
        if replay is not None:
            replay()
        else:
            session.step(shape)
        table = read_rows(HostCopy(session.state.table).wait())
        if session.capture is not None and replay is None:
            try:
                session.replays[shape] = session.capture(lambda: session.step(shape))
            except Exception as error:  # of a step that has run: the lane goes on without captures
                session.capture = None
                logger.warning(f"a {shape.kind.label} step could not be captured: {error}")
        return table

    def step(self) -> None:
        """Run the lane's next step. Requests that end with it, or fail in it, leave their rows."""
        shape, rows = self.next_shape()
        try:
            self.table = self.launch(shape)
        except Exception as error:
            # Nothing has been committed. Fewer rows are tried next, so that what fails of itself
            # fails alone.
            self.session.replays.pop(shape, None)
            if len(rows) > 1:
                self.most = len(rows) // 2
                return
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                said = step_message(shape.kind.label, 1, shape.width, error)
                error = torch.OutOfMemoryError(said)
            else:
                self.most = len(self.requests)
            self.leave(rows[0], error)
        else:
            self.after_step()

    def after_step(self) -> None:
        """Count what the rows have committed, and let those leave that are done."""
        watched: list[int] = []
        for index in self.occupied:
            row, request = self.table[index], self.requests[index]
            assert request is not None
            if not row.took_part:
                continue
            if row.failed:
                said = f"step {row.forwards}: the model's logits are NaN (row 0)"
                self.leave(index, FloatingPointError(said))
                # The row, and its copy if there is guidance.
                self.session.step.cache.forget(slice(index, None, len(self.requests)))
                continue
            request.commits.append(row.new)
            try:
                if request.end_row is not None:
                    request.end_row(self.session.state, [index], self.table)
                if row.next_kind == StepKind.NOTHING:
                    output = self.output(index, request)
                    if request.on_step is not None:
                        response = output.sequences[0, len(request.ids) :]
                        request.on_step(self.event(index, request, response.tolist()))
                    request.grow(response_of(output, request))
                    self.leave(index, output)
                elif row.new and request.watched:
                    watched.append(index)
            except Exception as error:  # of the caller's own function or tokenizer
                self.leave(index, error)
        self.tell(watched)

    def tell(self, watched: list[int]) -> None:
        """Tell the requests of these rows what is finished. Those whose callback fails leave."""
        if not watched:
            return
        canvas = self.session.state.canvas[watched].tolist()
        for index, tokens in zip(watched, canvas, strict=True):
            request = self.requests[index]
            assert request is not None
            response = tokens[self.length - request.config.gen_length :]
            ends = (self.info.mask_id, *self.info.eos_ids)
            end = next(i for i, token in enumerate(response) if token in ends)  # a mask is left
            try:
                if request.on_step is not None:
                    request.on_step(self.event(index, request, response))
                request.grow(response[: end + int(response[end] != self.info.mask_id)])
            except Exception as error:  # of the caller's own function
                self.leave(index, error)

    def event(self, index: int, request: Request, response: list[int]) -> RowEvent:
        """What `on_step` is called with after a step of this row."""
        row, first = self.table[index], self.length - len(response)
        return RowEvent(len(request.commits), response, (row.start - first, row.end - first))

    def output(self, row: int, request: Request) -> GenerationOutput:
        """What `generate` returns for the prompt alone."""
        state, prompt = self.session.state, len(request.ids)
        own = slice(self.length - request.length, self.length)
        sequences = state.canvas[row, own].clone()[None]
        masked = torch.ones_like(sequences, dtype=torch.bool)
        masked[:, :prompt] = False
        if request.end_row is not None:
            index = torch.arange(own.start, own.stop, device=state.canvas.device)
            masked &= request.end_row.before([row], index)
        own = slice(self.length - request.config.gen_length, self.length)
        return make_output(
            sequences, masked, request.config, self.info, request.commits,
            [len(request.commits)],
            (state.step_map[row : row + 1, own], state.logprobs[row : row + 1, own])
            if request.record else None,
        )  # fmt: skip


def row_bytes(shape: CacheShape, length: int) -> int:
    """How much memory a row of `length` positions has for its tokens, keys and values."""
    return length * torch.int64.itemsize + shape.nbytes(1, length)


def response_of(output: GenerationOutput, request: Request) -> list[int]:
    """The ids of a response, up to and including its first EOS."""
    prompt = len(request.ids)
    return output.sequences[0, prompt : prompt + output.row_tokens[0]].tolist()

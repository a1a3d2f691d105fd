"""Which request gets which row: requests wait, enter lanes, and take their steps side by side.

`Batcher` does that in the thread that calls it. `dsb_runtime.engine.batch` has the ways in.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel

from dsb_runtime.config import check_int
from dsb_runtime.engine.cache import allocate, free_bytes
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.graphs import Capture
from dsb_runtime.engine.lane import Lane, buffers_of, lane_length, row_bytes
from dsb_runtime.engine.layers import fingerprint
from dsb_runtime.engine.parallel import is_fully_sharded, is_tensor_parallel
from dsb_runtime.engine.request import Request
from dsb_runtime.engine.turns import as_published, check_process

MOST_ROWS = 64  # where max_rows is None and memory is plenty: more rows are hardly faster
LANES = 8  # how many lanes are kept; more only while all of them have requests
READ_AHEAD = 4  # how many prompts are read before there is a row for them


class Batcher:
    """Decodes requests side by side, each as if it were alone. Only one thread may use it.

    Requests of one group (`Request.group`) share a lane, and so each of its steps. `max_rows`
    requests are decoded at a time, over all lanes. The lanes' memory is at most half of what was
    free when the first of them was made; the steps need the other half.

    Raises:
        TypeError, ValueError: `model` or `max_rows` is not accepted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_rows: int | None = None,
        *,
        graphs: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        if max_rows is not None:
            check_int("max_rows", max_rows, 1)
        self.engine = Engine(model, graphs=graphs, capture=capture)
        self.model, self.device = self.engine.model, self.engine.device
        if is_tensor_parallel(self.model) or is_fully_sharded(self.model):
            raise ValueError(
                "model: several processes share its weights, and requests may reach them in any "
                "order; expected a whole model (dsb_runtime.generate decodes with this one)"
            )
        self.max_rows = MOST_ROWS if max_rows is None else int(max_rows)
        self.waiting: deque[Request] = deque()
        self.done: list[Request] = []  # with their outcome, and not handed out yet
        self.steps = 0  # how many have run
        self.release()

    def release(self) -> None:
        """Give back the lanes' memory and captured steps. No request may be under way."""
        self.lanes: list[Lane] = []

    @property
    def running(self) -> int:
        """How many requests have a row."""
        return sum(len(lane.occupied) for lane in self.lanes)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    # --- rows ---------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let those enter that have waited longest. Those that were cancelled meanwhile are done,
        and so are those that fail, as when memory is too small for them."""
        resting = self.lanes and self.waiting and not self.running
        # Captured steps and packed layers have the weights of before, if these stand elsewhere now.
        if resting and self.lanes[0].fingerprint != fingerprint(self.model):
            self.release()
        while self.waiting and self.running < self.max_rows:
            request, entered = self.waiting[0], False
            try:
                if not request.cancelled():
                    lane = self.lane_for(request)
                    if lane is None:
                        break
                    lane.enter(request)
                    entered = True
            except Exception as error:
                request.outcome = error
            self.waiting.popleft()
            if not entered:
                self.done.append(request)

    def lane_for(self, request: Request) -> Lane | None:
        """A lane with a free row for the request, or None if it must wait for memory.

        Raises:
            torch.OutOfMemoryError: the request does not fit into the memory even if it is alone.
        """
        lanes = [lane for lane in self.lanes if lane.takes(request)]
        if lanes:
            return min(lanes, key=lambda lane: lane.length)
        # Others of the group that wait will fit in as well, unless they are much longer.
        model = self.engine.model
        shortest = lane_length(model, request.length)
        first = itertools.islice(self.waiting, self.max_rows)
        lengths = [lane_length(model, r.length) for r in first if r.group == request.group]
        length = max(n for n in lengths if n <= 2 * shortest)
        unused = [lane for lane in self.lanes if not lane.occupied]
        for lane in unused[: max(0, len(self.lanes) - LANES + 1)]:
            self.lanes.remove(lane)
        while True:
            made = self.new_lane(request, length)
            if made is not None:
                self.lanes.append(made)
                return made
            unused = [lane for lane in self.lanes if not lane.occupied]
            if unused:
                self.lanes.remove(unused[0])
            elif self.lanes:
                return None
            elif length > shortest:
                length = shortest
            else:
                allocate(buffers_of(self.engine.loop, request), 1, length)
                raise torch.OutOfMemoryError(self.too_long(request))

    def new_lane(self, request: Request, length: int) -> Lane | None:
        """A lane of as many rows as there is memory for, or None if that is none."""
        if not self.lanes:
            free = free_bytes(self.device)
            self.budget = None if free is None else free // 2
        rows = self.max_rows
        if self.budget is not None:
            left = self.budget - sum(lane.nbytes for lane in self.lanes)
            rows = min(rows, left // row_bytes(buffers_of(self.engine.loop, request), length))
        while rows > 0:
            try:
                return Lane(self.engine.loop, request, rows, length, self.done)
            except torch.OutOfMemoryError:
                rows //= 2
        return None

    def too_long(self, request: Request) -> str:
        shape = buffers_of(self.engine.loop, request)
        fits = (self.budget or 0) // row_bytes(shape, 1)
        return (
            f"gen_length={request.config.gen_length} after a prompt of {len(request.ids)}: "
            f"{row_bytes(shape, request.length):,} bytes of K/V, and half of the free memory on "
            f"{self.device} is {self.budget or 0:,}; expected at most {fits} positions"
        )

    # --- steps --------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take out what was cancelled, let others enter, and run a step of each lane that has
        requests."""
        for lane in self.lanes:
            lane.leave_cancelled()
        self.admit()
        for lane in list(self.lanes):
            if lane.occupied:
                self.steps += 1
                lane.step()

    def hand_out(self) -> list[Request]:
        """The requests that are done, each of them once."""
        done = self.done.copy()
        self.done.clear()  # the lanes put more into this list
        return done

    def abandon(self, error: BaseException) -> list[Request]:
        """Give up all requests that are not done, which fail of `error`, and everything that they
        used. Returns them, and those that were done."""
        running = [r for lane in self.lanes for r in lane.requests if r is not None]
        for request in (*running, *self.waiting):
            request.outcome = error
            self.done.append(request)
        self.waiting.clear()
        self.release()
        return self.hand_out()

    def run(self, until: Callable[[list[Request]], bool]) -> list[Request]:
        """`advance` until nothing is left to do, or until(what is done), which may take from that.
        Returns what is done then."""
        check_process(self.device)

        def work() -> None:
            self.engine.follow_last_call()
            self.advance()
            while not self.idle and not until(self.done):
                self.advance()

        as_published(self.model, self.device, work)
        return self.hand_out()

    def decode(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Decode requests, and yield them as they are done. A request is taken from `requests` when
        a row is free for it, or a few before. One that has an outcome already is yielded as it is.
        """
        source = iter(requests)
        more = True
        while True:
            while more and self.running + len(self.waiting) < self.max_rows + READ_AHEAD:
                request = next(source, None)
                if request is None:
                    more = False
                elif request.outcome is not None:
                    yield request
                else:
                    self.waiting.append(request)
            if self.idle:
                return
            yield from self.run(bool)

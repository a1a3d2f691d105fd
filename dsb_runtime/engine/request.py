"""A request: one prompt that is decoded beside others, as a future of the standard library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from dsb_kernels.rows import UnmaskSpec
from dsb_runtime.config import DecodingConfig, check_bool
from dsb_runtime.engine.check import (
    check_family_settings,
    check_generator,
    check_no_masks,
    check_positions,
    check_prompt_ids,
    check_side_by_side,
    check_tokens,
    config_of,
)
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.engine.step import spec_of
from dsb_runtime.engine.stops import RowEnds, check_stop_strings
from dsb_runtime.families import DiffusionInfo, check_model, device_of

logger = logging.get_logger(__name__)
OnTokens = Callable[[list[int]], object]


def check_request(
    model: PreTrainedModel, config: DecodingConfig, generator: Any, record: Any
) -> DiffusionInfo:
    """Check what a request has beside its prompt, and return what its model is."""
    info = check_model(model)
    check_positions(model, 1, config.gen_length)  # no prompt is shorter
    check_family_settings(info, config)
    check_tokens(info, config, model.config.vocab_size)
    check_side_by_side(config)
    check_generator(generator, device_of(model))
    check_bool("record", record)
    return info


@dataclass
class RowEvent:
    """A request's response after a forward of its row that has committed tokens."""

    forward: int  # how many forwards the row has taken part in
    response: list[int]  # the ids at its G positions, the mask id where there is no token yet
    block: tuple[int, int]  # the active block [start, end) now, in positions of the response


OnStep = Callable[[RowEvent], object]


class Request(Future[GenerationOutput]):
    """One prompt that `BatchEngine.submit` decodes.

    It is a `concurrent.futures.Future`, so `asyncio.wrap_future`, `concurrent.futures.as_completed`
    and `add_done_callback` take it. `result()` waits for the output, or raises what the request
    failed of. `cancel()` takes it out at any time, also while it is decoded; its row is free after
    the step that runs. Iterating yields lists of token ids: what has been finished of the response
    since the last of them, where a token is finished once no mask is left before it, up to the
    first EOS inclusive.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Tensor | Sequence[int],
        config: DecodingConfig | None,
        generator: torch.Generator | None = None,
        record: bool = False,
        on_tokens: OnTokens | None = None,
        on_step: OnStep | None = None,
        stop_strings: str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        """Check the arguments of `BatchEngine.submit`, and draw the request's seed."""
        super().__init__()
        self.config = config_of(model, config, settings)
        # All of this on the CPU: the decoding thread has the GPU.
        info = check_request(model, self.config, generator, record)
        self.ids = as_ids(ids)
        check_prompt_ids(model, self.ids[None], self.config.gen_length)
        check_no_masks(self.ids[None], torch.zeros(1), info)
        if on_tokens is not None and not callable(on_tokens):
            raise TypeError(
                f"on_tokens={on_tokens!r}: expected a callable that takes token ids, or None"
            )
        if on_step is not None and not callable(on_step):
            raise TypeError(
                f"on_step={on_step!r}: expected a callable that takes a RowEvent, or None"
            )
        stops = check_stop_strings(stop_strings, tokenizer, info)
        at_eos = self.config.stop_at_eos
        self.end_row = None if stops is None else RowEnds(stops, info, at_eos)
        self.record, self.on_tokens, self.on_step = record, on_tokens, on_step
        self.spec = spec_of(self.config, info)
        self.seed = draw_seed(generator) if self.config.draws else 0
        self.commits: list[int] = []  # how many tokens each of its forwards has committed
        self.outcome: GenerationOutput | BaseException | None = None
        # Whether somebody wants to hear of it while it is decoded:
        self.watched = on_tokens is not None or on_step is not None
        self.prefix: list[int] = []
        self.grown = threading.Condition()

    @property
    def group(self) -> tuple[UnmaskSpec, dict[str, Any], bool]:
        """What a step takes as constants. Requests of one group can share a step. Of the settings,
        only `gen_length` is a row's own."""
        constants = {**vars(self.config), "gen_length": None}
        return self.spec, constants, self.record

    @property
    def length(self) -> int:
        """How many positions prompt and response have."""
        return len(self.ids) + self.config.gen_length

    def grow(self, prefix: list[int]) -> None:
        """Tell whoever watches that the response begins with `prefix`, which extends the last."""
        new = prefix[len(self.prefix) :]
        if not new or self.done():
            return
        with self.grown:
            self.prefix = prefix
            self.grown.notify_all()
        if self.on_tokens is not None:
            self.on_tokens(new)

    def settle(self) -> None:
        """Make `outcome` the result of the future, unless it was cancelled. Call this once. What a
        callback raises is logged, since the other requests have no part in it."""
        try:
            if not self.set_running_or_notify_cancel():
                return
            if isinstance(self.outcome, BaseException):
                self.set_exception(self.outcome)
            elif self.outcome is not None:
                self.set_result(self.outcome)
        except BaseException:  # as SystemExit; the future itself logs an Exception
            logger.exception("a callback of a request that is done has raised")
            self.wake()  # the callbacks after that one are not called

    def wake(self, _: Any = None) -> None:
        with self.grown:
            self.grown.notify_all()

    def __iter__(self) -> Iterator[list[int]]:
        self.watched = True
        self.add_done_callback(self.wake)
        given = 0
        while True:
            with self.grown:
                while len(self.prefix) == given and not self.done():
                    self.grown.wait()
                new = self.prefix[given:]
            if not new:
                break
            given += len(new)
            yield new
        self.result()  # raises what the request failed of


def as_ids(ids: Any) -> Tensor:
    """A prompt as (P,) int64 on the CPU.

    Raises:
        TypeError, ValueError: it is neither a list of ints nor a tensor (P,) of integers.
    """
    if isinstance(ids, Tensor):
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids has dtype {ids.dtype}: expected torch.int64 or int32")
        if ids.ndim != 1:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: expected (P,), one prompt")
        ids = ids.tolist()
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise TypeError(f"ids={type(ids).__name__}: expected a list of token ids or a tensor (P,)")
    for i, token in enumerate(ids):
        whole = isinstance(token, Integral) and not isinstance(token, bool)
        if not whole or abs(int(token)) >= 2**63:
            raise TypeError(f"ids[{i}]={token!r}: expected a token id")
    if not ids:
        raise ValueError("ids: an empty prompt; expected at least one token")
    return torch.tensor([int(token) for token in ids], dtype=torch.int64)


def draw_seed(generator: torch.Generator | None) -> int:
    """The seed of one decoding, drawn as `generate` draws it."""
    # A GPU's default generator refuses to draw while another thread captures a graph.
    source = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), dtype=torch.int64, generator=generator, device=source))

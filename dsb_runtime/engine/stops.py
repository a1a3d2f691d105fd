"""Stop strings: a row ends where the text of its response before the first mask contains one.

The host looks at the text between two steps, only in calls that name stop strings.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsb_kernels.rows import Column, Row, StepKind
from dsb_runtime.config import MAX_INT
from dsb_runtime.engine.step import DecodeState
from dsb_runtime.families import DiffusionInfo


def special_stops(stops: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of the special tokens that are stop strings, whose text is usually skipped."""
    special = tokenizer.all_special_ids
    return {token for token in special if tokenizer.convert_ids_to_tokens(token) in set(stops)}


def decoded_text(tokenizer: PreTrainedTokenizerBase, ids: list[int] | Tensor) -> str:
    """The text of a response's tokens, by every door. Spaces before punctuation stay, whatever the
    tokenizer's own default is: otherwise later tokens would change the text of earlier ones, and a
    stop string that was reached might not stand in the answer."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


class StopStrings:
    """Where a list of tokens first completes one of some strings. A stop string may begin and end
    inside of tokens. One that is a special token is that token, whatever the text is."""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings, self.tokenizer = strings, tokenizer
        self.tokens = special_stops(strings, tokenizer)

    def reached(self, ids: list[int]) -> bool:
        """Whether the tokens contain a stop string. Half a character, with which they may end, is
        decoded to U+FFFD, and never to a part of a stop string."""
        text = decoded_text(self.tokenizer, ids)
        return any(stop in text for stop in self.strings) or not self.tokens.isdisjoint(ids)

    def length(self, ids: list[int]) -> int | None:
        """How many of the tokens it takes to complete a stop string, None if there is none."""
        if not self.reached(ids):
            return None
        counts = range(len(ids) + 1)
        return bisect.bisect_left(counts, True, key=lambda n: self.reached(ids[:n]))


def check_stop_strings(stops: Any, tokenizer: Any, info: DiffusionInfo) -> StopStrings | None:
    """The stop strings of a call; None if it names none.

    Raises:
        TypeError, ValueError: the message names the argument, its value and what is accepted.
    """
    strings = [stops] if isinstance(stops, str) else [] if stops is None else stops
    if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
        raise TypeError(f"stop_strings={stops!r}: expected a string or a list of strings")
    if not strings:
        return None
    if any(not s or "\ufffd" in s for s in strings):
        raise ValueError(f"stop_strings={stops!r}: expected some text in each, without U+FFFD")
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer={type(tokenizer).__name__}: stop_strings needs the model's tokenizer; "
            "expected tokenizer=..."
        )
    if not info.eos_ids:
        raise ValueError(
            f"stop_strings={stops!r}: an EOS fills what follows, and the model names no EOS id; "
            "load it with eos_ids=(...)"
        )
    return StopStrings(strings, tokenizer)


class RowEnds:
    """Ends the rows of a call at their stop strings.

    Args:
        stops: the stop strings.
        info: of the model, whose first EOS id fills the rest of a response.
        stop_at_eos: whether a row's text ends at its first EOS.
    """

    def __init__(self, stops: StopStrings, info: DiffusionInfo, stop_at_eos: bool) -> None:
        self.stops, self.fill = stops, info.eos_ids[0]
        self.no_text = {info.mask_id, *(info.eos_ids if stop_at_eos else ())}
        self.ends: dict[int, int] = {}  # of a row, where its stop string's last token ends

    def __call__(self, state: DecodeState, rows: list[int], table: list[Row]) -> None:
        """End those of the rows `rows`, which took part in the last step, whose text contains a
        stop string: what follows it becomes EOS, and the row needs no step any more. `state` and
        the row table on the host are changed."""
        canvas = state.canvas[rows].tolist()
        for index, ids in zip(rows, canvas, strict=True):
            row = table[index]
            response = ids[row.response_start : row.response_end]
            text = [*itertools.takewhile(lambda token: token not in self.no_text, response)]
            length = self.stops.length(text)
            if length is None:
                continue
            self.ends[index] = end = row.response_start + length
            state.canvas[index, end : row.response_end] = self.fill
            state.table[index, Column.NEXT_KIND] = row.next_kind = int(StepKind.NOTHING)

    def before(self, rows: Iterable[int], index: Tensor) -> Tensor:
        """Which of the positions `index` (L,) of the canvas come before the end of each of the
        `rows`: (rows, L) bool."""
        ends = [self.ends.get(row, MAX_INT) for row in rows]
        return index < torch.tensor(ends, device=index.device)[:, None]

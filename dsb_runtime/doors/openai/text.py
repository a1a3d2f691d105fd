"""The text of a response while its finished prefix grows, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from dsb_runtime.engine.stops import StopStrings, decoded_text

HALF = "\ufffd"  # what the bytes of half a character are decoded to
CONTEXT = 8  # with so many tokens before them tokens are decoded, at least


@dataclass
class GrowingText:
    """The text of a response. `grow` and `finish` return what may be shown of it since the last
    call: never half a character, and nothing that may still belong to a stop string.

    Args:
        tokenizer: of the model.
        eos_ids: the response's text ends before the first of them.
        stops: its text ends before the first of these strings. A stop string that is a special
            token is that token. The response's tokens end with the one that completes it.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_ids: Sequence[int]
    stops: Sequence[str] = ()
    ids: list[int] = field(default_factory=list)  # up to and including the end
    text: str = ""  # what has been returned
    stopped: bool = False  # by a stop string

    def __post_init__(self) -> None:
        self.stop = StopStrings(self.stops, self.tokenizer)

    def decoded(self, count: int, first: int = 0) -> str:
        """The text of the first `count` tokens from `first` on, up to an EOS."""
        ids = self.ids[first:count]
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), count)
        return decoded_text(self.tokenizer, ids[:end])

    def stop_at(self, text: str) -> int:
        """Where the first stop string begins in a text, or -1."""
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)

    def grow(self, ids: list[int]) -> str:
        """Add finished tokens. Once `stopped`, they are dropped."""
        if self.stopped:
            return ""
        self.ids += ids
        length = self.stop.length(self.ids) if self.stops else None
        if length is not None:
            del self.ids[length:]
            self.stopped = True
            return self.finish()
        text = self.decoded(len(self.ids)).rstrip(HALF)
        unsure = max((overlap(text, stop) for stop in self.stops), default=0)
        return self.show(text[: len(text) - unsure])

    def finish(self) -> str:
        """The rest of the text, once no token comes any more."""
        text = self.decoded(len(self.ids))
        stop = self.stop_at(text)
        return self.show(text if stop < 0 else text[:stop], last=True)

    def show(self, text: str, last: bool = False) -> str:
        """Extend what has been shown. Where a tokenizer changes earlier text, that waits."""
        if not (last or text.startswith(self.text)):
            return ""
        new = text[len(self.text) :]
        self.text += new
        return new

    def prefixes(self) -> Iterator[str]:
        """The text of the first token, of the first two, and so on. Decoding all of them for each
        token took 8 seconds for 4096 tokens, so that a few before it are decoded with it."""
        known, first, before = "", 0, ""  # `before` is the end of `known`, decoded from `first` on
        for count in range(1, len(self.ids) + 1):
            text = known + self.decoded(count, first)[len(before) :]
            yield text
            if count - first >= 2 * CONTEXT and not text.endswith(HALF):
                known, first = text, count - CONTEXT
                before = self.decoded(count, first)

    def pieces(self) -> list[tuple[str, int]]:
        """The text that each token adds, and where in the text it begins. Tokens that add text
        behind the end (an EOS, a stop string) are left out."""
        pieces, end, count = [], 0, len(self.ids)
        texts = [*self.prefixes()]
        if texts and texts[-1] != self.decoded(count):  # what is far before a token changes it
            texts = [self.decoded(n) for n in range(1, count + 1)]
        for number, text in enumerate(texts, 1):
            if end >= len(self.text):
                break
            text = self.text[: len(text.rstrip(HALF))] if number < count else self.text
            pieces.append((text[end:], end))
            end = max(end, len(text))
        return pieces


def overlap(text: str, stop: str) -> int:
    """How many characters at the text's end may be the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)

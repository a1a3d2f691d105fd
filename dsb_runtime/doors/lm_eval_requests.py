"""What lm-evaluation-harness asks for: settings, a batch size, and where an answer ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import check_int, rule_names, settings
from dsb_runtime.defaults import defaults_for, fitted
from dsb_runtime.doors.hf_generate import NEUTRAL, RENAMED, no_cuts
from dsb_runtime.engine.stops import decoded_text, special_stops

# Names under which a request may say how many tokens its answer has at most.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LARGEST_BATCH = 64  # which --batch_size auto begins with, as in the harness's own model


def check_request(kwargs: Mapping[str, Any]) -> list[str]:
    """The names in a request's `generation_kwargs` that mean nothing here and change nothing.

    Raises:
        ValueError: one of them would change the answer and does not exist here, as a repetition
            penalty.
    """
    neutral = {**NEUTRAL, **RENAMED}
    for name in sorted(set(kwargs) & set(neutral)):
        if kwargs[name] is not None and kwargs[name] != neutral[name]:
            raise ValueError(
                f"generation_kwargs {name}={kwargs[name]!r}: model dsb cannot honour it; "
                f"expected {neutral[name]!r}"
            )
    known = {*settings(), *LENGTHS, "until", "do_sample"}
    return sorted(name for name in set(kwargs) - known if kwargs[name] is not None)


def read_ids(named: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with lists in place of what the harness passes on for `banned_tokens=5` (a
    number) and `banned_tokens=5:6` (text; it reads a comma as the next argument's)."""
    read = dict(named)
    for name in [n for n, entry in settings().items() if entry.kind is tuple and n in named]:
        parts = str(named[name]).split(":")
        if isinstance(named[name], (int, str)) and all(part.isdecimal() for part in parts):
            read[name] = [int(part) for part in parts]
    return read


def request_settings(
    model: PreTrainedModel, own: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a request whose `generation_kwargs` are `kwargs`, for `defaults_for`. `own`
    are those of `--model_args`. The request's temperature, `top_p` and `top_k` hold where it asks
    for sampling; any other setting in it (`--gen_kwargs threshold=0.8`) overrides the model's. A
    number of tokens makes the canvas shorter, never longer than that of `--model_args`, whose other
    settings are `fitted` to it.

    Raises:
        TypeError, ValueError: the request's length is not accepted.
    """
    kwargs = read_ids({name: value for name, value in kwargs.items() if value is not None})
    left = set(settings())
    if not (kwargs.get("do_sample", True) and kwargs.get("temperature", 0) > 0):
        left -= {"temperature", "top_p", "top_k"}
    override = {k: v for k, v in kwargs.items() if k in left}
    override |= no_cuts(override)
    before = defaults_for(model, **own).gen_length
    if set(rule_names()) & set(override):  # the request's rule replaces the model's
        own = {k: v for k, v in own.items() if k not in rule_names()}
    merged = {**own, **override}
    name = next((name for name in LENGTHS if name in kwargs), "gen_length")
    lengths = {k: v for k, v in {**kwargs, **merged}.items() if k in (name, "gen_length")}
    for name, length in lengths.items():
        check_int(name, length, 1)
    if lengths:
        merged["gen_length"] = min(lengths.values())
        # The steps that a request names are those of its own length.
        own_steps = {"steps"} & set(override)
        fits = {k: v for k, v in merged.items() if k not in own_steps and isinstance(v, int)}
        merged |= fitted(fits, before, merged["gen_length"])
    return merged


def first_batch_size(batch_size: Any, max_batch_size: Any) -> int:
    """The batch size to begin with. The harness passes numbers as text.

    Raises:
        TypeError, ValueError: one of the two is not accepted.
    """
    auto = batch_size == "auto"
    if max_batch_size is not None and not auto:
        raise ValueError(f"max_batch_size={max_batch_size!r}: expected it with batch_size='auto'")
    if auto:
        most = LARGEST_BATCH if max_batch_size is None else max_batch_size
        check_int("max_batch_size", most, 1)
        return int(most)
    if isinstance(batch_size, str):
        try:
            batch_size = int(batch_size)
        except ValueError:
            raise ValueError(f"batch_size={batch_size!r}: expected an int >= 1 or 'auto'") from None
    check_int("batch_size", batch_size, 1)
    return int(batch_size)


def first_copies(requests: Sequence[Instance]) -> list[int]:
    """For every request, the index of the request whose answer it takes. That is its own unless it
    is a copy: the harness repeats a process's last request until all have equally many."""
    source: list[int] = []
    seen: dict[int, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        same = seen[id(request)]
        source.append(i if len(same) < request.repeats else same[0])
        same.append(i)
    return source


def added_up(
    pieces: Sequence[int], on_total: Callable[[int, float], None]
) -> Callable[[int, float], None]:
    """A function of a piece's index and score, which calls `on_total` with the index and the total
    of a text once all of its pieces have come, in whatever order. `pieces` says how many each text
    has; those of a text stand side by side."""
    text_of = [text for text, count in enumerate(pieces) for _ in range(count)]
    scores: list[dict[int, float]] = [{} for _ in pieces]

    def add(piece: int, score: float) -> None:
        text = text_of[piece]
        scores[text][piece] = score
        if len(scores[text]) == pieces[text]:  # they are added in the text's own order
            on_total(text, sum(score for _, score in sorted(scores[text].items())))

    return add


def stops_of(request: Instance) -> list[str]:
    """The strings at which the answer to a request ends."""
    stops = request.args[1].get("until") or []
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text before whichever stop string comes first."""
    ends = [index for stop in stops if stop and (index := text.find(stop)) >= 0]
    return text[: min(ends, default=None)]


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: Iterable[int], stops: Sequence[str]
) -> str:
    """A response's text, up to its first EOS and the first stop string. A stop string that is a
    special token ends the response as an EOS does."""
    ends = special_stops(stops, tokenizer) | set(eos_ids)
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return cut_at_stop(decoded_text(tokenizer, ids[:end]), stops)

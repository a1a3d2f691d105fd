"""What requests of lm-evaluation-harness ask for, and what is measured while they are answered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsb_runtime.config import check_int, rule_names, settings

# Names under which a request may say how many tokens its answer has at most.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def read_batch_size(value: Any) -> int:
    """The harness passes an int or its digits."""
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    check_int("batch_size", number, 1)
    return number


def request_settings(own: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request whose `generation_kwargs` are `asked`, for `defaults_for`.

    `own` are those of `--model_args`. The request's temperature, `top_p` and `top_k` hold where it
    asks for sampling; any other setting in it (`--gen_kwargs threshold=0.8`) overrides the
    model's. A number of tokens makes the canvas shorter, never longer than the model's.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    sampling = asked.get("do_sample", True) and asked.get("temperature", 0) > 0
    if not sampling:
        asked = {k: v for k, v in asked.items() if k not in ("temperature", "top_p", "top_k")}
    override = {k: v for k, v in asked.items() if k in settings()}
    merged = {**own, **override}
    if set(rule_names()) & set(override):  # the request's rule replaces the model's
        merged = {k: v for k, v in merged.items() if k not in rule_names() or k in override}
    length = next((asked[name] for name in LENGTHS if name in asked), None)
    if length is not None:
        check_int("max_gen_toks", length, 1)
        merged["gen_length"] = min(merged.get("gen_length", length), length)
        if isinstance(merged.get("block_length"), int):
            merged["block_length"] = min(merged["block_length"], merged["gen_length"])
    return merged


def first_copies(requests: Sequence[Instance]) -> list[int]:
    """For every request, the index of the one whose answer it takes; its own but for copies.

    The harness repeats a process's last request until all processes have equally many.
    """
    source: list[int] = []
    seen: dict[int, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        same = seen[id(request)]
        source.append(i if len(same) < request.repeats else same[0])
        same.append(i)
    return source


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text before whichever stop string comes first."""
    ends = [index for stop in stops if stop and (index := text.find(stop)) >= 0]
    return text[: min(ends, default=None)]


def answer_text(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], eos_ids: Iterable[int], stops: Sequence[str]
) -> str:
    """A response's text, up to its first EOS and the first stop string.

    A stop string that is a special token ends the response as an EOS does.
    """
    special = set(tokenizer.all_special_ids)
    ends = {tokenizer.convert_tokens_to_ids(stop) for stop in stops} & special | set(eos_ids)
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return cut_at_stop(str(tokenizer.decode(ids[:end], skip_special_tokens=True)), stops)


def rolling_windows(
    ids: list[int], prefix_id: int, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """A whole text as (context, text) pairs of at most `max_length` tokens; every token of it is
    in one text, and `prefix_id` stands before the first."""
    windows = get_rolling_token_windows(
        ids, prefix_token=prefix_id, max_seq_len=max_length - 1, context_len=1
    )
    return [make_disjoint_window(window) for window in windows]


def summarize(parts: Tensor) -> dict[str, float]:
    """The measurements of all processes, {} where none has decoded.

    Args:
        parts: (processes, 4): answers, tokens, forwards and seconds. The seconds of the slowest
            process count.
    """
    answers, tokens, forwards, _ = parts.sum(0).tolist()
    seconds = parts[:, -1].max().item()
    if not forwards:
        return {}
    return {
        "answers": answers, "tokens": tokens, "forwards": forwards,
        "tokens_per_forward": tokens / forwards, "tokens_per_second": tokens / seconds,
        "seconds": seconds, "processes": len(parts),
    }  # fmt: skip

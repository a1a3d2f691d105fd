"""The lines of `dsb batch`: what one asks for, in our format or OpenAI's, and its answer."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsb_runtime.cli.generate import check_text, encode, encode_messages
from dsb_runtime.config import check_int, rule_names, settings
from dsb_runtime.engine.engine import GenerationOutput
from dsb_runtime.engine.request import Request

MOST_BYTES = 2**26  # of a line
INVALID, SERVER = "invalid_request", "server_error"  # codes of errors
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# What a body of OpenAI's may have that changes no answer, and what has only one value here.
WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "stream_options")
ONLY = {
    "n": 1, "best_of": 1, "stream": False, "echo": False, "logprobs": False, "frequency_penalty": 0,
    "presence_penalty": 0, "logit_bias": {}, "tools": [], "suffix": "",
}  # fmt: skip
LENGTHS = ("max_completion_tokens", "max_tokens")


@dataclass
class Line:
    """One line of the input: its number, its id and what it asks for. `url` is that of OpenAI's
    format, None in ours. `wrong` says why it cannot be answered."""

    number: int
    id: Any = None
    url: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    wrong: str | None = None
    stops: list[str] = field(default_factory=list)

    def request(
        self, tokenizer: PreTrainedTokenizerBase, raw: bool, named: dict[str, Any]
    ) -> tuple[list[int], dict[str, Any], int | None]:
        """The prompt's ids, the settings (those of the line, and `named` where it names no others),
        and the seed.

        Raises:
            TypeError, ValueError: the line cannot be answered; the message is one line.
        """
        if self.wrong is not None:
            raise ValueError(self.wrong)
        asked = {name: value for name, value in self.body.items() if value is not None}
        prompt, messages = asked.pop("prompt", None), asked.pop("messages", None)
        if (prompt is None) == (messages is None):
            raise ValueError("expected either prompt or messages")
        seed = asked.pop("seed", None)
        if seed is not None:
            check_int("seed", seed, 0, 2**63 - 1)
        self.stops = stops_of(asked.pop("stop", None))
        if self.url is not None:
            asked = of_openai(asked)
        if messages is not None:
            ids = encode_messages(tokenizer, checked_messages(messages))
        elif isinstance(prompt, str) and prompt.strip():
            check_text("prompt", prompt)
            ids = encode(tokenizer, prompt, raw or self.url == TEXT)
        else:
            raise ValueError(f"prompt={shown(prompt)}: expected some text")
        return ids[0].tolist(), merged(named, asked), seed


def read_line(number: int, text: bytes) -> Line:
    """What a line says. A line that is wrong says so in `Line.wrong`."""
    line = Line(number)
    if len(text) > MOST_BYTES:
        line.wrong = f"expected at most {MOST_BYTES} bytes"
        return line
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        line.wrong = f"no JSON: {error}"
        return line
    if not isinstance(record, dict):
        line.wrong = f"{shown(record)}: expected a JSON object"
        return line
    openai = "custom_id" in record
    line.id = record.pop("custom_id" if openai else "id", None)
    if openai:
        line.url, body = record.get("url", CHAT), record.get("body")
        if line.url not in (CHAT, TEXT):
            line.wrong = f"url={shown(line.url)}: expected {CHAT} or {TEXT}"
        elif not isinstance(body, dict):
            line.wrong = f"body={shown(body)}: expected a JSON object"
        else:
            line.body = body
    else:
        line.body = record
    named = line.id is not None or not openai
    if not named or isinstance(line.id, bool) or not isinstance(line.id, str | int | None):
        line.wrong = f"{'custom_id' if openai else 'id'}={shown(line.id)}: expected text or an int"
    return line


def shown(value: Any) -> str:
    """A value as a message names it: its beginning, in one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def stops_of(stop: Any) -> list[str]:
    """The texts before which an answer ends."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise TypeError(f"stop={shown(stop)}: expected text, or a list of texts")
    return stops


def checked_messages(messages: Any) -> list[dict[str, str]]:
    """The messages of a chat.

    Raises:
        TypeError: they are no list of {"role": text, "content": text}.
    """
    fits = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )  # fmt: skip
    if not fits:
        raise TypeError(f"messages={shown(messages)}: expected a list of role and content, as text")
    for message in messages:
        check_text("messages", message["content"])
    return messages


def of_openai(asked: dict[str, Any]) -> dict[str, Any]:
    """The settings that a body of OpenAI's asks for.

    Raises:
        ValueError: it asks for what would change the answer and does not exist here.
    """
    asked = {name: value for name, value in asked.items() if name not in WITHOUT_EFFECT}
    for name, value in ONLY.items():
        given = asked.pop(name, value)
        if given != value and not (name == "logprobs" and given == 0):
            raise ValueError(f"{name}={shown(given)}: expected {shown(value)}, or none")
    length = [asked.pop(name) for name in LENGTHS if name in asked]
    return {**asked, **({"gen_length": length[0]} if length else {})}


def merged(named: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The settings of a line. Its selection rule replaces that of the command line, and a block is
    at most as long as the response."""
    if set(asked) & set(rule_names()):
        named = {name: value for name, value in named.items() if name not in rule_names()}
    both = {**named, **asked}
    length, block = both.get("gen_length"), both.get("block_length")
    if "gen_length" in asked and isinstance(length, int) and isinstance(block, int):
        both["block_length"] = min(length, block)
    for name in sorted(set(both) - set(settings())):
        known = ", ".join(("prompt", "messages", "seed", "stop", *settings()))
        raise ValueError(f"{name}={shown(both[name])}: expected one of {known}")
    return both


def answer_of(
    line: Line, request: Request, out: GenerationOutput, tokenizer: PreTrainedTokenizerBase,
    model: str,
) -> dict[str, Any]:  # fmt: skip
    """The answer of a line, in its format. It ends for "stop" at an EOS or a stop text, for
    "length" where the response is full."""
    prompt, tokens = len(request.ids), out.row_tokens[0]
    ids = out.sequences[0, prompt : prompt + tokens]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    ends = [at for stop in line.stops if (at := text.find(stop)) >= 0]
    text = text[: min(ends, default=None)].strip()
    stopped = bool(ends) or int(ids[-1]) in request.spec.eos_ids
    reason = "stop" if stopped else "length"
    if line.url is None:
        return {
            "line": line.number, "id": line.id, "answer": text, "tokens": tokens,
            "forwards": out.nfe, "finish_reason": reason,
        }  # fmt: skip
    chat = line.url == CHAT
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{line.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}],
        "usage": {
            "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
        },
        "forwards": out.nfe,
    }  # fmt: skip
    name = f"batch_req_{line.number}"
    response = {"status_code": 200, "request_id": name, "body": body}
    return {
        "line": line.number, "id": name, "custom_id": line.id, "response": response, "error": None,
    }  # fmt: skip


def error_of(line: Line, error: BaseException, code: str) -> dict[str, Any]:
    """The answer of a line that has none. The code is INVALID for what the line asks wrongly, and
    SERVER for what failed here while it was decoded."""
    message = " ".join(str(error).split()) or type(error).__name__
    said = {"code": code, "message": message}
    if line.url is None:
        return {"line": line.number, "id": line.id, "error": said}
    return {
        "line": line.number, "id": f"batch_req_{line.number}", "custom_id": line.id,
        "response": None, "error": said,
    }  # fmt: skip

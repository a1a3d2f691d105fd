"""What a client asks for: the bodies of OpenAI's two completion requests, and what they mean here.

A field of OpenAI's API that would change the answer and does not exist here is refused unless its
value changes nothing. A field that neither OpenAI's API nor this package knows is refused as well,
as OpenAI does: a misspelt setting would otherwise change the answer without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig, check_int, rule_names, settings
from dsb_runtime.defaults import defaults_for, fitted
from dsb_runtime.doors.openai.errors import BodyError, as_json, refusal
from dsb_runtime.engine.request import check_request
from dsb_runtime.families import check_model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON_WORDS = {"None": "null", "True": "true", "False": "false"}
LENGTHS = ("max_completion_tokens", "max_tokens", "gen_length")  # three names of one setting
MOST_STOPS, MOST_SAMPLES = 4, 128  # as OpenAI's API has them
ROLES = ("system", "developer", "user", "assistant")
FIELDS = {
    CHAT: (
        "model", "messages", "stream", "stream_options", "n", "seed", "stop", "logprobs",
        "top_logprobs",
    ),
    TEXT: ("model", "prompt", "stream", "stream_options", "n", "seed", "stop", "logprobs"),
}  # fmt: skip
# Fields that change nothing here whatever they hold: labels of the client's own.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
Neutral = dict[str, tuple[Any, ...]]
# Fields that cannot be honoured, and the values beside null that change nothing.
SHARED: Neutral = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "service_tier": ("auto", "default"),
}  # fmt: skip
NEUTRAL: dict[str, Neutral] = {
    CHAT: {
        **SHARED, "tools": ([],), "tool_choice": ("none",), "functions": ([],),
        "function_call": ("none",), "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
        "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
        "verbosity": ("medium",), "store": (False,), "moderation": (),
    },
    TEXT: {**SHARED, "echo": (False,), "suffix": ("",), "best_of": (1,)},
}  # fmt: skip
NEUTRAL_MESSAGE: Neutral = {
    "refusal": (), "tool_calls": ([],), "function_call": (), "audio": (), "annotations": ([],),
}  # fmt: skip


def setting_error(error: Exception, values: Mapping[str, Any]) -> BodyError:
    """What a check of this package says of a setting, whose name its message begins with. `values`
    has the settings by their names. What the message has in Python is written as JSON."""
    name, said = re.split(r"\W", str(error), maxsplit=1)[0], str(error)
    if name not in (*LENGTHS, *settings()):
        return BodyError(said)
    begin, own = f"{name}={values.get(name)!r}:", ""
    if said.startswith(begin):
        own, said = f"{name}={as_json(values[name])}:", said[len(begin) :]
    said = re.sub(r"\b(None|True|False)\b", lambda word: JSON_WORDS[word[0]], said)
    return BodyError(own + said, name)


# --- one field each ---------------------------------------------------------------------------


def read_object(what: str, text: bytes) -> dict[str, Any]:
    """The JSON object that is written there.

    Raises:
        BodyError: it is none; the message begins with `what`.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BodyError(f"{what} is no JSON ({error}); expected a JSON object") from error
    if not isinstance(read, dict):
        raise BodyError(f"{what} is {as_json(read)}; expected a JSON object")
    return read


def check_fields(
    body: Mapping[str, Any], neutral: Neutral, known: tuple[str, ...], where: str = ""
) -> None:
    """Raise BodyError for a field that cannot be honoured or that nobody knows."""
    for name, value in body.items():
        if name in neutral:
            if value is not None and value not in neutral[name]:
                accepted = " or ".join(map(as_json, [None, *neutral[name]]))
                raise refusal(where + name, value, accepted, " it cannot be honoured here;")
        elif name not in known:
            accepted = ", ".join(dict.fromkeys([*known, *neutral]))
            raise refusal(where + name, value, f"one of {accepted}", " no such field;")


def typed(body: Mapping[str, Any], name: str, kind: type, accepted: str, where: str = "") -> Any:
    """The value of a field, None where it is absent or null. "1" and true are no ints."""
    value = body.get(name)
    if value is not None and type(value) is not kind:
        raise refusal(where + name, value, accepted)
    return value


def seed_of(body: Mapping[str, Any]) -> int | None:
    accepted = "an int of 64 bits"
    seed: int | None = typed(body, "seed", int, accepted)
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise refusal("seed", seed, accepted)
    return seed


def stops_of(body: Mapping[str, Any]) -> list[str]:
    """The texts before which an answer ends."""
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(
        isinstance(s, str) and s and "\ufffd" not in s for s in stops
    )  # fmt: skip
    if not fits:
        accepted = f"a string, or up to {MOST_STOPS} of them, of some text, without U+FFFD"
        raise refusal("stop", stop, accepted)
    return list(stops)


def length_of(body: Mapping[str, Any]) -> tuple[str, Any] | None:
    """How many tokens are asked for, and by which name."""
    named = [(name, body[name]) for name in LENGTHS if body.get(name) is not None]
    for name, value in named[1:]:
        if value != named[0][1]:
            raise refusal(name, value, f"the same as {named[0][0]}={as_json(named[0][1])}")
    return named[0] if named else None


def check_text(name: str, text: str) -> None:
    """Raise BodyError for half of a surrogate pair, which JSON may have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{name}: character {error.start} is half of a surrogate pair; expected text"
        raise BodyError(said, name) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a text, checked by `check_text`."""
    check_text(name, text)
    return list(tokenizer(text, add_special_tokens=add_special_tokens).input_ids)


def message_of(given: Any, where: str) -> dict[str, str]:
    """A message as chat templates know it."""
    if not isinstance(given, dict):
        raise refusal(where, given, '{"role": "...", "content": "..."}')
    check_fields(given, NEUTRAL_MESSAGE, ("role", "content", "name"), f"{where}.")
    role, parts = given.get("role"), given.get("content")
    if role not in ROLES:
        raise refusal(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    name = typed(given, "name", str, "text", f"{where}.")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, list) or not parts:
        raise refusal(f"{where}.content", parts, "text, or a list of text parts")
    for part in parts:
        fits = isinstance(part, dict) and part.get("type") == "text"
        if not fits or not isinstance(part.get("text"), str):
            raise refusal(f"{where}.content", part, '{"type": "text", "text": "..."}')
    message = {
        "role": "system" if role == "developer" else role,
        "content": "".join(part["text"] for part in parts),
    }
    return message if name is None else {**message, "name": name}


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any) -> list[int]:
    """The ids of a chat, in the checkpoint's template."""
    if not isinstance(messages, list) or not messages:
        raise refusal("messages", messages, "a list of one message at least")
    if not tokenizer.chat_template:
        raise BodyError("messages: the model has no chat template; expected a prompt", "messages")
    chat = [message_of(message, f"messages.{i}") for i, message in enumerate(messages)]
    return template_ids(tokenizer, "messages", chat)


def template_ids(
    tokenizer: PreTrainedTokenizerBase, name: str, chat: list[dict[str, str]]
) -> list[int]:
    """The ids of a chat in the checkpoint's template. `name` is the field that it is from."""
    try:
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a checkpoint's template may raise anything
        raise BodyError(f"{name}: refused by the model's chat template: {error}", name) from error
    return encode(tokenizer, name, str(text), add_special_tokens=False)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> list[int]:
    """The ids of a prompt: of a chat of one message, or of the text alone where that is `raw` or
    the checkpoint has no template."""
    check_text("prompt", prompt)  # its characters, and not those of the template, are counted
    if raw or not tokenizer.chat_template:
        return encode(tokenizer, "prompt", prompt)
    return template_ids(tokenizer, "prompt", [{"role": "user", "content": prompt}])


def prompts_of(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[list[int]]:
    """The ids of a text or of each of some texts; ids stay as they are."""

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)

    prompts = [prompt] if isinstance(prompt, str) or is_ids(prompt) else prompt
    texts = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
    if not prompts or not (texts or (isinstance(prompts, list) and all(map(is_ids, prompts)))):
        accepted = "a text, a list of texts, a list of token ids, or a list of such lists"
        raise refusal("prompt", prompt, accepted)
    return [p if isinstance(p, list) else encode(tokenizer, "prompt", p) for p in prompts]


def wants_logprobs(url: str, body: Mapping[str, Any]) -> bool:
    if url == TEXT:
        logprobs = typed(body, "logprobs", int, "0: only chosen tokens have one")
        if logprobs:
            raise refusal("logprobs", logprobs, "0: only chosen tokens have one")
        return logprobs is not None
    if top := typed(body, "top_logprobs", int, "0: only chosen tokens have one"):
        raise refusal("top_logprobs", top, "0: only chosen tokens have one")
    return bool(typed(body, "logprobs", bool, "true or false"))


# --- a body -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request as it is decoded: which rows, with which settings."""

    prompts: list[list[int]]
    config: DecodingConfig
    seed: int | None
    stops: list[str]
    samples: int = 1
    logprobs: bool = False
    stream: bool = False
    usage: bool = False  # whether a stream ends with the usage
    canvas: bool = False  # whether a stream has the canvas after each forward


@dataclass(frozen=True)
class Reader:
    """What reads bodies for one model.

    Args:
        model, tokenizer: what decodes.
        model_name: what clients call it.
        streams: whether an answer may be streamed.
        named: settings that hold where a body names no others. The selection rule of a body
            replaces theirs, and for a response of another length than theirs they are `fitted`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_name: str
    streams: bool = True
    named: Mapping[str, Any] = field(default_factory=dict)

    def read(self, url: str, body: Mapping[str, Any]) -> Asked:
        """Check a body for `url`, which is CHAT or TEXT, and say what is to be decoded.

        Raises:
            BodyError: the message names the field, its value and what is accepted.
        """
        check_fields(body, NEUTRAL[url], (*FIELDS[url], *LENGTHS, *LABELS, *settings()))
        self.check_name(typed(body, "model", str, as_json(self.model_name)))
        stream, options = self.streaming(body)
        length = length_of(body)
        config = self.config(body, length)
        samples = self.samples(body, config)
        if url == CHAT:
            name, prompts = "messages", [chat_ids(self.tokenizer, body.get("messages"))]
        else:
            name, prompts = "prompt", prompts_of(self.tokenizer, body.get("prompt"))
        self.check(name, prompts, config, length)
        return Asked(
            prompts, config, seed_of(body), stops_of(body), samples, wants_logprobs(url, body),
            stream, bool(options.get("include_usage")), bool(options.get("include_canvas")),
        )  # fmt: skip

    def check_name(self, name: str | None) -> None:
        if name not in (None, self.model_name):
            said = f"model={as_json(name)}: not served here; expected {as_json(self.model_name)}"
            raise BodyError(said, "model", "model_not_found", 404)

    def streaming(self, body: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
        """Whether an answer is streamed, and what the stream has."""
        stream = bool(typed(body, "stream", bool, "true or false"))
        if stream and not self.streams:
            raise refusal("stream", stream, "false: a line is answered whole")
        options = typed(body, "stream_options", dict, "a JSON object")
        if options is not None and not stream:
            raise refusal("stream_options", options, 'it with "stream": true only')
        options, where = options or {}, "stream_options."
        known = ("include_usage", "include_canvas")  # the second is ours
        check_fields(options, {"include_obfuscation": (False,)}, known, where)
        for name in known:
            typed(options, name, bool, "true or false", where)
        return stream, options

    def samples(self, body: Mapping[str, Any], config: DecodingConfig) -> int:
        accepted = f"an int from 1 to {MOST_SAMPLES}"
        given = typed(body, "n", int, accepted)
        samples = 1 if given is None else int(given)
        if not 1 <= samples <= MOST_SAMPLES:
            raise refusal("n", samples, accepted)
        if samples > 1 and not config.draws:
            same = " all answers are the same at temperature=0;"
            raise refusal("n", samples, "1, or a temperature above 0", same)
        return samples

    def config(self, body: Mapping[str, Any], length: tuple[str, Any] | None) -> DecodingConfig:
        """The settings that a body names, those of `named`, and the model's defaults."""
        own = {name: body[name] for name in settings() if body.get(name) is not None}
        named = {k: v for k, v in self.named.items() if k not in own}
        if set(own) & set(rule_names()):
            named = {k: v for k, v in named.items() if k not in rule_names()}
        both = {**named, **own}
        if both.get("top_p") == 1 and both["top_p"] is not True:  # what many clients send: no cut
            del both["top_p"]
        try:
            if length is not None:
                check_int(*length, 1)
                before = defaults_for(self.model, **self.named).gen_length
                both = {**both, **fitted(named, before, length[1]), "gen_length": length[1]}
            return defaults_for(self.model, **both)
        except (TypeError, ValueError) as error:
            values = both if length is None else {**both, length[0]: length[1]}
            raise setting_error(error, values) from error
        except RecursionError as error:  # of a message that would show the value
            said = "a setting is a list of more levels than Python can write; expected its own type"
            raise BodyError(said) from error

    def check(
        self, name: str, prompts: list[list[int]], config: DecodingConfig,
        length: tuple[str, Any] | None,
    ) -> None:  # fmt: skip
        """Raise BodyError unless the model takes these prompts with these settings. `name` is the
        field that the prompts are from, `length` as of `length_of`."""
        for ids in prompts:
            self.check_prompt(name, ids, config, length)
        try:
            check_request(self.model, config, None, False)
        except (TypeError, ValueError) as error:
            raise setting_error(error, vars(config)) from error

    def check_prompt(
        self, name: str, ids: list[int], config: DecodingConfig, length: tuple[str, Any] | None
    ) -> None:
        """Raise BodyError unless the model takes the ids, with room for the answer."""
        most, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if not ids:
            raise BodyError(f"{name}: no token; expected some text", name)
        if len(ids) + config.gen_length > most:
            said = (
                f"{length[0] if length else 'gen_length'}={config.gen_length} after {name} of "
                f"{len(ids)} tokens: expected at most the model's {most} positions together"
            )
            raise BodyError(said, length[0] if length else name, "context_length_exceeded")
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise BodyError(f"{name}: id {wrong}; expected 0 to {vocabulary - 1}", name)
        if check_model(self.model).mask_id in ids:
            raise BodyError(f"{name}: the mask token; expected other text", name)

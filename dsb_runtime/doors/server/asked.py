"""What a client asks for: the bodies of OpenAI's two completion requests, and what they mean here.

A field of OpenAI's API that would change the answer and does not exist here is refused unless its
value changes nothing. A field that neither OpenAI's API nor this package knows is refused as well,
as OpenAI does: a misspelt setting would otherwise change the answer without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.config import DecodingConfig, check_int, settings
from dsb_runtime.defaults import defaults_for
from dsb_runtime.doors.server.errors import ApiError, refusal, setting_error
from dsb_runtime.engine.check import check_family_settings
from dsb_runtime.families import check_model

LENGTHS = ("max_completion_tokens", "max_tokens", "gen_length")  # three names of one setting
MOST_STOPS, MOST_SAMPLES = 4, 128  # as OpenAI's API has them
# Fields that change nothing here whatever they hold: labels of the client's own.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Fields that cannot be honoured, and the values beside null that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "service_tier": ("auto", "default"),
}  # fmt: skip
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **NEUTRAL, "tools": ([],), "tool_choice": ("none",), "functions": ([],),
    "function_call": ("none",), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",), "store": (False,), "moderation": (),
}  # fmt: skip
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {
    **NEUTRAL, "echo": (False,), "suffix": ("",), "best_of": (1,),
}  # fmt: skip
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (), "tool_calls": ([],), "function_call": (), "audio": (), "annotations": ([],),
}  # fmt: skip


def check_extra(
    extra: dict[str, Any], neutral: dict[str, tuple[Any, ...]], known: tuple[str, ...], where: str
) -> None:
    """Raise ApiError for a field that cannot be honoured or that nobody knows."""
    for name, value in extra.items():
        if name in neutral:
            if value is not None and value not in neutral[name]:
                accepted = " or ".join(["null", *map(repr, neutral[name])])
                raise refusal(where + name, value, accepted, " this server cannot honour it;")
        elif name not in known:
            accepted = ", ".join(dict.fromkeys([*known, *neutral]))
            raise refusal(where + name, value, f"one of {accepted}", " no such field;")


class Strict(BaseModel):
    """A JSON object whose values are not converted: "1" is no number."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_canvas: bool | None = None  # our own: the canvas after each forward


class Body(Strict):
    """The fields that both requests have. Settings of this package are among the extra ones."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]]
    prompt_field: ClassVar[str]

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    @property
    def extra(self) -> dict[str, Any]:
        return self.model_extra or {}

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The ids of each prompt."""
        raise NotImplementedError

    def wants_logprobs(self) -> bool:
        raise NotImplementedError

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops) or any("\ufffd" in stop for stop in stops):
            accepted = f"up to {MOST_STOPS} strings of some text, without U+FFFD"
            raise refusal("stop", self.stop, accepted)
        return stops

    def length(self) -> tuple[str, Any] | None:
        """How many tokens are asked for, and by which name."""
        named = [(name, self.extra[name]) for name in LENGTHS if self.extra.get(name) is not None]
        for name, value in named[1:]:
            if value != named[0][1]:
                raise refusal(name, value, f"the same as {named[0][0]}={named[0][1]!r}")
        return named[0] if named else None

    def config(self, model: PreTrainedModel) -> DecodingConfig:
        """The settings that are named, and the model's defaults for the others."""
        named = {k: v for k, v in self.extra.items() if k in settings() and v is not None}
        named.pop("gen_length", None)
        if named.get("top_p") == 1:  # what many clients send: no cut
            named.pop("top_p")
        length = self.length()
        try:
            if length is not None:
                check_int(*length, 1)
            config = defaults_for(model, None if length is None else length[1], **named)
            check_family_settings(check_model(model), config)
        except (TypeError, ValueError) as error:
            raise setting_error(error) from error
        return config


@dataclass(frozen=True)
class Asked:
    """A request as it is decoded: which rows, with which settings."""

    prompts: list[list[int]]
    config: DecodingConfig
    samples: int
    seed: int | None
    stops: list[str]
    logprobs: bool
    stream: bool
    usage: bool  # whether a stream ends with the usage
    canvas: bool  # whether a stream has the canvas after each forward


def encode(
    tokenizer: PreTrainedTokenizerBase, field: str, text: str, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a text, which must not have half of a surrogate pair (JSON may)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{field}: character {error.start} is half of a surrogate pair; expected text"
        raise ApiError(400, said, param=field) from error
    return tokenizer(text, add_special_tokens=add_special_tokens).input_ids


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    name: str | None = None

    def for_template(self, where: str) -> dict[str, str]:
        """The message as chat templates know it."""
        known = tuple(Message.model_fields)
        check_extra(self.model_extra or {}, NEUTRAL_MESSAGE, known, f"{where}.")
        parts, name = self.content, f"{where}.content"
        if isinstance(parts, str):
            text = parts
        elif isinstance(parts, list) and parts:
            for part in parts:
                if not (isinstance(part, dict) and part.get("type") == "text"
                        and isinstance(part.get("text"), str)):  # fmt: skip
                    raise refusal(name, part, '{"type": "text", "text": "..."}')
            text = "".join(part["text"] for part in parts)
        else:
            raise refusal(name, parts, "text, or a list of text parts")
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": text}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    neutral = NEUTRAL_CHAT
    prompt_field = "messages"

    messages: list[Message]
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        if not self.messages:
            raise refusal("messages", self.messages, "one message at least")
        if not tokenizer.chat_template:
            lacks = "the model has no chat template; use /v1/completions"
            raise ApiError(400, f"messages: {lacks}", param="messages")
        chat = [m.for_template(f"messages.{i}") for i, m in enumerate(self.messages)]
        try:
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a checkpoint's template may raise anything
            said = f"messages: the model's chat template refuses them: {error}"
            raise ApiError(400, said, param="messages") from error
        return [encode(tokenizer, "messages", str(text), add_special_tokens=False)]

    def wants_logprobs(self) -> bool:
        if self.top_logprobs:
            raise refusal("top_logprobs", self.top_logprobs, "0: only chosen tokens have one")
        return bool(self.logprobs)


class CompletionBody(Body):
    """The body of /v1/completions."""

    neutral = NEUTRAL_COMPLETION
    prompt_field = "prompt"

    prompt: Any
    logprobs: int | None = None

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        def is_ids(value: Any) -> bool:
            return isinstance(value, list) and bool(value) and all(type(x) is int for x in value)

        given = self.prompt
        if isinstance(given, str) or is_ids(given):
            given = [given]
        texts = isinstance(given, list) and all(isinstance(p, str) for p in given)
        if not given or not (texts or (isinstance(given, list) and all(map(is_ids, given)))):
            accepted = "a text, a list of texts, a list of token ids, or a list of such lists"
            raise refusal("prompt", self.prompt, accepted)
        return [p if isinstance(p, list) else encode(tokenizer, "prompt", p) for p in given]

    def wants_logprobs(self) -> bool:
        if self.logprobs:
            raise refusal("logprobs", self.logprobs, "0: only chosen tokens have one")
        return self.logprobs is not None


def read(body: Body, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """Check a body, and say what is to be decoded.

    Raises:
        ApiError: 400, which names the field, its value and what is accepted.
    """
    known = (*type(body).model_fields, *LENGTHS, *LABELS, *settings())
    check_extra(body.extra, body.neutral, known, "")
    options = body.stream_options or StreamOptions()
    if body.stream_options is not None and not body.stream:
        raise refusal("stream_options", options.model_dump(), "it with stream=true only")
    check_extra(
        options.model_extra or {}, {"include_obfuscation": (False,)},
        tuple(StreamOptions.model_fields), "stream_options.",
    )  # fmt: skip
    config, samples = body.config(model), 1 if body.n is None else body.n
    if not 1 <= samples <= MOST_SAMPLES:
        raise refusal("n", samples, f"an int from 1 to {MOST_SAMPLES}")
    if samples > 1 and not config.draws:
        same = " all answers are the same at temperature=0;"
        raise refusal("n", samples, "1, or a temperature above 0", same)
    if body.seed is not None and not -(2**63) <= body.seed < 2**63:
        raise refusal("seed", body.seed, "an int of 64 bits")
    return Asked(
        prompts=[check_prompt(ids, body, config, model) for ids in body.prompts(tokenizer)],
        config=config, samples=samples, seed=body.seed, stops=body.stops(),
        logprobs=body.wants_logprobs(), stream=bool(body.stream),
        usage=bool(options.include_usage), canvas=bool(options.include_canvas),
    )  # fmt: skip


def check_prompt(
    ids: list[int], body: Body, config: DecodingConfig, model: PreTrainedModel
) -> list[int]:
    """Return the ids if the model takes them, with room for the answer."""
    field, most = body.prompt_field, model.config.max_position_embeddings
    vocabulary, mask_id = model.config.vocab_size, check_model(model).mask_id
    if not ids:
        raise ApiError(400, f"{field}: no token; expected some text", param=field)
    if len(ids) + config.gen_length > most:
        length = body.length()
        name = "max_tokens" if length is None else length[0]
        raise ApiError(
            400,
            f"{name}={config.gen_length} after {field} of {len(ids)} tokens: expected at most "
            f"the model's {most} positions together",
            param=field if length is None else name,
            code="context_length_exceeded",
        )
    wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise ApiError(400, f"{field}: id {wrong}; expected 0 to {vocabulary - 1}", param=field)
    if mask_id in ids:
        raise ApiError(400, f"{field}: the mask token; expected other text", param=field)
    return ids

"""custom_generate: DSB as `model.generate(custom_generate=...)` of transformers.

transformers prepares the prompt, its padding mask and a GenerationConfig, and calls a function in
place of its own loop. This one reads the fields of the GenerationConfig that mean the same here. A
field that means nothing where positions are committed in any order raises an error that names it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from dsb_runtime.config import DecodingConfig, Setting, check_bool, check_ids, check_int, settings
from dsb_runtime.defaults import defaults_for
from dsb_runtime.engine.engine import ENGINE, generate
from dsb_runtime.engine.output import StepEvent
from dsb_runtime.families import check_model, checked_info

DOOR = "custom_generate"
DEFAULT_TOP_K = 50  # what transformers fills in where nobody named one
# Fields that would change the result, and the one value (or None) that changes nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "speculation_type": None, "use_mtp": False,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "max_time": None, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "constraints": None, "force_words_ids": None,
    "renormalize_logits": False, "remove_invalid_values": False,
    "begin_suppress_tokens": None, "sequence_bias": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": None,
    "watermarking_config": None, "token_healing": False, "cache_implementation": None,
    "output_attentions": False, "output_hidden_states": False, "output_logits": False,
}  # fmt: skip
# Fields that custom_generate honours by settings of other names; `generation_kwargs` of the harness
# do not.
RENAMED: dict[str, Any] = {
    "min_length": 0, "stop_strings": None, "bad_words_ids": None, "suppress_tokens": None,
}  # fmt: skip
# The processors that are honoured, and the fields that make them.
PROCESSORS: dict[type, str] = {
    SuppressTokensLogitsProcessor: "suppress_tokens", NoBadWordsLogitsProcessor: "bad_words_ids",
    MinLengthLogitsProcessor: "min_length", MinNewTokensLengthLogitsProcessor: "min_new_tokens",
}  # fmt: skip
CALL_ONLY = (
    "assistant_model", "stopping_criteria", "prefix_allowed_tokens_fn", "negative_prompt_ids",
)  # fmt: skip
# Arguments of the model's forward that transformers passes on and DSB does not read.
FORWARD_ONLY = ("cache", "past_key_values", "inputs_embeds", "position_ids")
# The published loops' own names for a confidence: Dream's and LLaDA's.
CONFIDENCE_NAMES = {
    "alg": {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"},
    "remasking": {"low_confidence": "probability", "random": "random"},
}
# What transformers itself builds from fields that are honoured here.
OWN = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MaxLengthCriteria",
    "EosTokenCriteria", "StopStringCriteria",
)  # fmt: skip


@dataclasses.dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `return_dict_in_generate` returns: `GenerationOutput` as a transformers output."""

    sequences: Tensor | None = None  # (B, P + G)
    nfe: int | None = None
    tokens_per_forward: list[int] | None = None
    row_nfe: list[int] | None = None
    row_tokens: list[int] | None = None
    drafts: tuple[int, int] | None = None  # as in `GenerationOutput`
    # With `output_scores`, as in `GenerationOutput`:
    step_map: Tensor | None = None  # (B, G)
    logprobs: Tensor | None = None  # (B, G)
    # With `output_history`, as Dream's `diffusion_generate` has it: the canvas after each forward.
    history: list[Tensor] | None = None  # nfe of (B, P + G)


@dataclasses.dataclass
class PrefixStreamer:
    """Feeds a streamer the tokens of row 0 in order, as the prefix without masks grows."""

    streamer: BaseStreamer
    position: int  # of the next token that the streamer gets
    mask_id: int
    eos_ids: tuple[int, ...]
    ended: bool = False  # the streamer has an EOS; the tokens after it only fill the canvas

    def __call__(self, event: StepEvent) -> None:
        for token in event.canvas[0, self.position :].tolist():
            if self.ended or token == self.mask_id:
                return
            self.streamer.put(torch.tensor([token]))
            self.position += 1
            self.ended = token in self.eos_ids


def call_arguments() -> dict[str, Any]:
    """The local variables of the running `GenerationMixin.generate`, which is on the stack.

    No release of transformers up to 5.24 passes `streamer` and a few other arguments on to a
    `custom_generate` function; the first one that does makes this function unnecessary. It takes
    `tokenizer` out of its own arguments: those of the decorator around it still have it.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    around = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    return {**(around if isinstance(around, dict) else {}), **frame.f_locals}


def refuse(name: str, value: object, expected: object) -> None:
    raise ValueError(f"{name}={value!r}: custom_generate cannot honour it; expected {expected!r}")


def check_dictionary(name: str, value: object, config: GenerationConfig) -> None:
    """Raise unless `value` is a bool, and True only where the output has a field for it."""
    check_bool(name, value)
    if value and not config.return_dict_in_generate:
        raise ValueError(f"{name}=True: expected return_dict_in_generate=True with it")


def check_fields(
    config: GenerationConfig, call: dict[str, Any], processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> None:  # fmt: skip
    """Raise ValueError for the first field or argument that cannot be honoured."""
    for name, neutral in NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            refuse(name, value, neutral)
    if config.output_scores is not None:
        check_dictionary("output_scores", config.output_scores, config)
    arguments = [(name, call.get(name)) for name in CALL_ONLY if call.get(name) != []]
    arguments += [(name, call.get("kwargs", {}).get(name)) for name in FORWARD_ONLY]
    given = [id(processor) for processor in call.get("logits_processor") or ()]
    arguments += [
        ("logits_processor", p) for p in processors
        if type(p) not in PROCESSORS and (type(p).__name__ not in OWN or id(p) in given)
    ]  # fmt: skip
    arguments += [("stopping_criteria", c) for c in criteria if type(c).__name__ not in OWN]
    for name, value in arguments:
        if value is not None:
            refuse(name, type(value).__name__, None)


def no_cuts(named: dict[str, Any]) -> dict[str, None]:
    """None for those of `top_p` and `top_k` by which transformers cuts nothing."""
    cut = {name: value for name, value in named.items() if not isinstance(value, bool)}
    return {name: None for name, value in (("top_p", 1), ("top_k", 0)) if cut.get(name) == value}


def read_sampling(config: GenerationConfig, named: dict[str, Any]) -> dict[str, Any]:
    """The temperature, `top_p` and `top_k` of the call, or else those of the GenerationConfig."""
    values = {name: named.get(name) for name in ("temperature", "top_p", "top_k")}
    if not config.do_sample:
        neutral = {"temperature": (0, 1), "top_p": (1,), "top_k": (0, DEFAULT_TOP_K)}
        for name, value in values.items():
            if value is not None and value not in neutral[name]:
                raise ValueError(f"{name}={value!r}: expected do_sample=True with it")
        return dict.fromkeys(values)
    for name in [name for name, value in values.items() if value is None]:
        if name != "top_k" or config.top_k != DEFAULT_TOP_K:
            values[name] = getattr(config, name)
    return values | no_cuts(values)


def read_processors(
    processors: LogitsProcessorList, config: GenerationConfig, prompt: int, model: PreTrainedModel,
    named: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """`banned_tokens` and `min_new_tokens` of the call, with what the processors ask for. These are
    the caller's, and those that transformers makes of `suppress_tokens`, `bad_words_ids`,
    `min_length` and `min_new_tokens`.

    Raises:
        ValueError: one of them forbids a sequence of several tokens, or another EOS than the
            model's.
    """
    theirs = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    banned, earliest = named.get("banned_tokens") or (), named.get("min_new_tokens") or 0
    check_ids("banned_tokens", banned)
    check_int("min_new_tokens", earliest, 0)
    banned = [*banned]
    for processor in (p for p in processors if type(p) in PROCESSORS):
        name = PROCESSORS[type(processor)]
        if isinstance(processor, SuppressTokensLogitsProcessor):
            sequences = [(token,) for token in processor.suppress_tokens.tolist()]
        elif isinstance(processor, NoBadWordsLogitsProcessor):
            sequences = list(processor.sequence_bias)
        else:
            sequences = []
            ends = tuple(processor.eos_token_id.flatten().tolist())
            if not {*ends} <= {*check_model(model).eos_ids, *theirs}:
                refuse(f"eos_token_id of {name}", ends, check_model(model).eos_ids)
            earliest = max(earliest, least_new_tokens(processor, prompt))
        for sequence in sequences:
            if len(sequence) > 1:
                raise ValueError(
                    f"{name} has {list(sequence)}: tokens are not decoded one after another, so "
                    "only single ones can be forbidden; expected sequences of one id"
                )
            check_int(name, sequence[0], 0, model.config.vocab_size - 1)
            banned.append(sequence[0])
    return {"banned_tokens": banned, "min_new_tokens": earliest}


def least_new_tokens(
    processor: MinLengthLogitsProcessor | MinNewTokensLengthLogitsProcessor, prompt: int
) -> int:
    """How many tokens after the prompt have no EOS."""
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length - prompt
    return processor.prompt_length_to_skip + processor.min_new_tokens - prompt


def read_confidence(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `confidence` in place of Dream's `alg` or LLaDA's `remasking`."""
    named = dict(named)
    for argument, names in CONFIDENCE_NAMES.items():
        value = named.pop(argument, None)
        if value is None:
            continue
        if value not in names:
            raise ValueError(f"{argument}={value!r}: expected one of {', '.join(names)}")
        if named.get("confidence") is not None:
            raise ValueError(f"{argument} and confidence: expected one of the two")
        named["confidence"] = names[value]
    return named


def model_with_eos(
    model: PreTrainedModel, config: GenerationConfig, named: int | list[int] | None
) -> PreTrainedModel:
    """The model, or a view of it with the EOS ids that the call or its config names.

    A view shares the modules and weights. It does not share the engine, which would decode with the
    model's own ids. For the call it makes another one, with buffers and captured steps of its own.
    """
    info = check_model(model)
    if named is None:
        theirs, own = config.eos_token_id, model.generation_config.eos_token_id
        ids = theirs if isinstance(theirs, list) else [theirs]
        # The model's own generation config may have got others since the model was loaded.
        named = theirs if theirs != own or not {*ids} <= {*info.eos_ids} else None
    if named is None:
        return model
    eos_ids = tuple(named) if isinstance(named, (list, tuple)) else (named,)
    for eos in eos_ids:
        check_int("eos_token_id", eos, 0, model.config.vocab_size - 1)
    view = copy.copy(model)
    vars(view).pop(ENGINE, None)
    size = model.config.vocab_size
    vars(view)["dsb"] = checked_info(info.family, info.mask_id, eos_ids, size)
    return view


def read_settings(
    model: PreTrainedModel, config: GenerationConfig, prompt: int, call: dict[str, Any],
    named: dict[str, Any],
) -> DecodingConfig:  # fmt: skip
    """The settings of the call, of its GenerationConfig, and the model's defaults.

    Args:
        prompt: positions of the prompt.
        call: transformers' local variables, which tell whether the caller named a length.
        named: settings by their names in this door, None where the caller does not name them.
    """
    named = {**read_confidence(named), **read_sampling(config, named)}
    ours: dict[str, Any] = {}
    for name, entry in settings().items():
        here = entry.doors.get(DOOR, name)
        if named.get(here) is not None:
            if here != name:  # an error names the argument as the caller did
                entry.check(here, named[here], None)
            ours[name] = named[here]
    if config.max_new_tokens is not None or not call.get("has_default_max_length"):
        ours["gen_length"] = config.max_length - prompt
    return defaults_for(model, **ours)


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    eos_token_id: int | list[int] | None = None,
    output_history: bool | None = None,
    **named: Any,
) -> Tensor | DiffusionGenerateOutput:
    """`dsb_runtime.generate` as `model.generate(input_ids, custom_generate=custom_generate, ...)`.

    Args:
        model: from `load_model` or `AutoModelForCausalLM`.
        generation_config: `max_new_tokens` is `gen_length`. `eos_token_id`,
            `return_dict_in_generate` and, with `do_sample`, `temperature`, `top_p` and `top_k` mean
            what they mean in transformers, and so does `num_return_sequences`. `output_scores`
            fills `step_map` and `logprobs` of the output: its scores are the log-probabilities of
            the tokens that were committed. `output_history` is Dream's: it fills `history` with the
            canvas after each forward, and may also be an argument. A top_k of 50 in a
            GenerationConfig is transformers' own default and counts as not set; a
            `generate(top_k=50)` counts.
        logits_processor: processors that forbid single tokens, or an EOS before a number of tokens
            (`SuppressTokensLogitsProcessor`, `NoBadWordsLogitsProcessor`, `MinLength...`,
            `MinNewTokensLength...`), whether they are the caller's or those of the fields
            `suppress_tokens`, `bad_words_ids`, `min_length` and `min_new_tokens`. Any other one
            sees the tokens before a position, where masks may stand here, and is refused.
        stop_strings, tokenizer: as in `dsb_runtime.generate`, named in the call. (transformers
            itself refuses those of a GenerationConfig, since it does not find the tokenizer then.)
        streamer: gets each token once no mask is left before it; works with one prompt only.
        generator, seed: the source of random numbers, which is never torch's global generator.
        named: any setting of `DecodingConfig` (this function's signature lists them), and what
            transformers passes to a model's forward. The setting `cache` is called `cache_policy`,
            since `cache` is transformers' own argument for a Cache object: transformers raises an
            error for a policy under that name before it calls this function. Dream's `alg` and
            `alg_temp` and LLaDA's `remasking` are accepted under these names. A setting that is not
            named, or is None, has the default of `dsb_runtime.generate`.

    Returns:
        (B, P + G) sequences, or `DiffusionGenerateOutput` with `return_dict_in_generate`.

    Raises:
        TypeError, ValueError: a field that cannot be honoured, or bad input; the message names it.
    """
    call = call_arguments()
    streamer = call.get("streamer") if streamer is None else streamer
    tokenizer = call.get("tokenizer") if tokenizer is None else tokenizer
    stop_strings = generation_config.stop_strings if stop_strings is None else stop_strings
    try:
        check_fields(generation_config, call, logits_processor, stopping_criteria)
        if output_history is None:
            output_history = getattr(generation_config, "output_history", False)
        check_dictionary("output_history", output_history, generation_config)
        model = model_with_eos(model, generation_config, eos_token_id)
        prompt = input_ids.shape[1]
        named |= read_processors(logits_processor, generation_config, prompt, model, named)
        config = read_settings(model, generation_config, prompt, call, named)
        if seed is not None:
            if generator is not None:
                raise ValueError("generator and seed: expected one of the two")
            check_int("seed", seed, 0, 2**63 - 1)
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"streamer: {len(input_ids)} prompts; expected one")
        watchers = [on_step] if on_step is not None else []
        if streamer is not None:
            info = check_model(model)
            eos_ids = info.eos_ids if config.stop_at_eos or stop_strings else ()
            watchers.append(PrefixStreamer(streamer, prompt, info.mask_id, eos_ids))
        history: list[Tensor] = []
        if output_history:
            watchers.append(lambda event: history.append(event.canvas.clone()))

        def watch(event: StepEvent) -> None:
            for watcher in watchers:
                watcher(event)

        out = generate(
            model, input_ids, config, attention_mask=named.get("attention_mask"),
            generator=generator,
            on_step=watch if watchers else None, record=bool(generation_config.output_scores),
            stop_strings=stop_strings, tokenizer=tokenizer,
        )  # fmt: skip
    finally:
        if streamer is not None:  # after an error too, since a consumer may wait for the end
            streamer.end()
    if generation_config.return_dict_in_generate:
        return DiffusionGenerateOutput(**vars(out), history=history if output_history else None)
    return out.sequences


def signature_with(entries: dict[str, Setting]) -> inspect.Signature:
    """`custom_generate`'s signature with the settings as keywords.

    transformers passes a function the arguments that its signature lists. `gen_length` is not one
    of them: it is the GenerationConfig's `max_new_tokens`.
    """
    plain = inspect.signature(custom_generate)
    *parameters, rest = plain.parameters.values()
    names = [entry.doors.get(DOOR, name) for name, entry in entries.items() if name != "gen_length"]
    names += [*CONFIDENCE_NAMES]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names
    ]
    return plain.replace(parameters=[*parameters, rest])


custom_generate.__signature__ = signature_with(settings())  # type: ignore[attr-defined]

"""custom_generate: DSB through transformers' own door, `model.generate(custom_generate=...)`.

transformers prepares the prompt, its padding mask and a GenerationConfig and calls a function in
place of its loop. What means the same there is taken from the GenerationConfig; what cannot hold
for positions committed in any order is an error that names the field.
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
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from dsb_runtime.config import CACHES, DecodingConfig, check_choice, check_int
from dsb_runtime.engine.check import check_model
from dsb_runtime.engine.engine import ENGINE, StepEvent, generate

DEFAULT_BLOCK = 32
DEFAULT_TOP_K = 50  # what transformers fills in where nobody named one
# Fields that would change the result, and the one value (or None) that changes nothing.
NEUTRAL: dict[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "diversity_penalty": 0.0,
    "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "speculation_type": None, "use_mtp": False,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "min_new_tokens": 0, "min_length": 0, "max_time": None, "stop_strings": None,
    "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "renormalize_logits": False, "remove_invalid_values": False, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": None,
    "watermarking_config": None, "token_healing": False, "cache_implementation": None,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "output_logits": False,
}  # fmt: skip
CALL_ONLY = (
    "assistant_model", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
)  # fmt: skip
# Arguments of the model's forward that transformers passes through and no loop of ours reads.
FORWARD_ONLY = ("cache", "past_key_values", "inputs_embeds", "position_ids")
# What transformers itself makes of fields that are honoured here.
OWN_PROCESSORS = ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")
OWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclasses.dataclass
class DiffusionGenerateOutput(ModelOutput):
    """What `return_dict_in_generate` returns: `GenerationOutput` as a transformers output."""

    sequences: Tensor | None = None  # (B, P + G)
    nfe: int | None = None
    tokens_per_forward: list[int] | None = None
    row_nfe: list[int] | None = None
    row_tokens: list[int] | None = None


class PrefixStreamer:
    """Feeds a streamer the tokens of row 0 in order, as the prefix without masks grows."""

    def __init__(
        self, streamer: BaseStreamer, prompt: int, mask_id: int, ends: tuple[int, ...]
    ) -> None:
        self.streamer, self.sent = streamer, prompt
        self.mask_id, self.ends = mask_id, ends
        self.ended = False  # an EOS was fed: what follows it is filling

    def __call__(self, event: StepEvent) -> None:
        for token in event.canvas[0, self.sent :].tolist():
            if self.ended or token == self.mask_id:
                return
            self.streamer.put(torch.tensor([token]))
            self.sent += 1
            self.ended = token in self.ends


def call_arguments() -> dict[str, Any]:
    """The arguments of the running `generate`, some of which it does not pass on (the streamer)."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)


def refuse(name: str, value: object, expected: object) -> None:
    raise ValueError(f"{name}={value!r}: custom_generate cannot honour it; expected {expected!r}")


def check_fields(
    settings: GenerationConfig,
    call: dict[str, Any],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
) -> None:
    """Raise ValueError for the first thing that was asked for and cannot hold."""
    for name, neutral in NEUTRAL.items():
        value = getattr(settings, name, None)
        if value is not None and value != neutral:
            refuse(name, value, neutral)
    for name in CALL_ONLY:
        value = call.get(name)
        if value is not None and not (isinstance(value, list) and not value):
            refuse(name, type(value).__name__, None)
    for name in FORWARD_ONLY:
        value = call.get("kwargs", {}).get(name)
        if value is not None:
            refuse(name, type(value).__name__, None)
    for name, made, own in (
        ("logits_processor", processors, OWN_PROCESSORS),
        ("stopping_criteria", criteria, OWN_CRITERIA),
    ):
        for item in made:
            if type(item).__name__ not in own:
                refuse(name, type(item).__name__, None)


def sampling(
    settings: GenerationConfig,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
) -> dict[str, Any]:
    """Temperature and cuts: those named in the call before those of the GenerationConfig."""
    if not settings.do_sample:
        for name, value, neutral in (
            ("temperature", temperature, (0, 1)), ("top_p", top_p, (1,)), ("top_k", top_k, ()),
        ):  # fmt: skip
            if value is not None and value not in neutral:
                raise ValueError(f"{name}={value!r}: expected do_sample=True with it")
        return {}
    if temperature is None:
        temperature = settings.temperature
    if top_p is None and settings.top_p not in (None, 1.0):
        top_p = settings.top_p
    if top_k is None and settings.top_k not in (None, 0, DEFAULT_TOP_K):
        top_k = settings.top_k
    return {"temperature": temperature, "top_p": top_p, "top_k": top_k}


def with_ends(
    model: PreTrainedModel, settings: GenerationConfig, named: int | list[int] | None
) -> PreTrainedModel:
    """The model, or the same one with the EOS ids that the call or its config names.

    The latter has no engine, which would decode with the model's own ids: it makes one for the
    call, buffers and captured steps included.
    """
    info = check_model(model)
    if named is None and settings.eos_token_id != model.generation_config.eos_token_id:
        named = settings.eos_token_id
    if named is None:
        return model
    ends = tuple(named) if isinstance(named, (list, tuple)) else (named,)
    for end in ends:
        check_int("eos_token_id", end, 0, model.config.vocab_size - 1)
    view = copy.copy(model)  # the same modules and weights
    vars(view).pop(ENGINE, None)
    view.dsb = dataclasses.replace(info, eos_ids=ends)
    return view


def custom_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    streamer: BaseStreamer | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    eos_token_id: int | list[int] | None = None,
    stop_at_eos: bool | None = None,
    block_length: int | None = None,
    cache_policy: str | None = None,
    schedule: str | None = None,
    max_block_length: int | None = None,
    prefix_window: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    frechet: float | None = None,
    steps: int | None = None,
    refresh_commit: str | None = None,
    refresh_policy: str | None = None,
    full_refresh_every: int | None = None,
    **model_kwargs: Any,
) -> Tensor | DiffusionGenerateOutput:
    """`dsb_runtime.generate` as `model.generate(input_ids, custom_generate=custom_generate, ...)`.

    Args:
        model: from `load_model` or `AutoModelForCausalLM`.
        generation_config: `max_new_tokens` is `gen_length`; with `do_sample`, `temperature`,
            `top_p` and `top_k` are taken; `eos_token_id`; `return_dict_in_generate`. A top_k of
            50 there is transformers' own default and counts as not set: `generate(top_k=50)`,
            named in the call, is taken.
        streamer: fed token by token as the finished prefix grows, one prompt at a time.
        generator, seed: source of randomness; neither is torch's global one.
        stop_at_eos: None is True where the model has an EOS, as everywhere in transformers.
        block_length: None is 32, at most `max_new_tokens`.
        cache_policy: `DecodingConfig.cache`. `cache` is transformers' own argument, a Cache
            object: a policy under that name is an error before this function is called.
        The others are `DecodingConfig`'s fields.

    Returns:
        (B, P + G) sequences, or `DiffusionGenerateOutput` with `return_dict_in_generate`.

    Raises:
        TypeError, ValueError: a field that cannot hold, or bad input; the message names it.
    """
    call = call_arguments()
    streamer = call.get("streamer") if streamer is None else streamer
    try:
        check_fields(generation_config, call, logits_processor, stopping_criteria)
        model = with_ends(model, generation_config, eos_token_id)
        prompt = input_ids.shape[1]
        if cache_policy is not None:
            check_choice("cache_policy", cache_policy, CACHES)
        given = {
            "gen_length": generation_config.max_length - prompt,
            "block_length": block_length, "cache": cache_policy, "schedule": schedule,
            "max_block_length": max_block_length, "prefix_window": prefix_window,
            "threshold": threshold, "factor": factor, "frechet": frechet, "steps": steps,
            "refresh_commit": refresh_commit, "refresh_policy": refresh_policy,
            "full_refresh_every": full_refresh_every, "stop_at_eos": stop_at_eos,
            **sampling(generation_config, temperature, top_p, top_k),
        }  # fmt: skip
        if block_length is None:
            given["block_length"] = min(DEFAULT_BLOCK, given["gen_length"])
        if stop_at_eos is None:
            given["stop_at_eos"] = bool(model.dsb.eos_ids)
        config = DecodingConfig(**{k: v for k, v in given.items() if v is not None})
        if seed is not None:
            if generator is not None:
                raise ValueError("generator and seed: expected one of the two")
            check_int("seed", seed, 0, 2**63 - 1)
            generator = torch.Generator(input_ids.device).manual_seed(seed)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"streamer: {len(input_ids)} prompts; expected one")
        watchers = [on_step] if on_step is not None else []
        if streamer is not None:
            ends = model.dsb.eos_ids if config.stop_at_eos else ()
            watchers.append(PrefixStreamer(streamer, prompt, model.dsb.mask_id, ends))

        def watch(event: StepEvent) -> None:
            for watcher in watchers:
                watcher(event)

        out = generate(
            model,
            input_ids,
            config,
            attention_mask=model_kwargs.get("attention_mask"),
            generator=generator,
            on_step=watch if watchers else None,
        )
    finally:
        if streamer is not None:  # also after an error: somebody may be waiting for the end
            streamer.end()
    if generation_config.return_dict_in_generate:
        return DiffusionGenerateOutput(**vars(out))
    return out.sequences

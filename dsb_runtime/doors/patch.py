"""patch and unpatch: DSB decoding for a model that is in memory already.

No parameter is stored twice: patching sets a few attributes, and `unpatch` puts every one back.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

from transformers import PreTrainedModel

from dsb_runtime.elsewhere import runs_elsewhere
from dsb_runtime.engine.engine import ENGINE, generate
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.families import (
    FAMILIES,
    DiffusionInfo,
    check_model,
    checked_info,
    config_family,
    unwrap,
)
from dsb_runtime.fields import listed_ids
from dsb_runtime.models.load import diffusion_attributes

# Each model class and the family that its logits follow. Where that is None, the caller has to
# name a family. All these classes have Llama's modules.
SUPPORTED: dict[str, str | None] = {
    "LlamaForCausalLM": "llada", "LladaForCausalLM": "llada", "Qwen2ForCausalLM": "dream",
    "DreamForCausalLM": "dream", "Qwen3ForCausalLM": None, "MistralForCausalLM": None,
}  # fmt: skip
REPLACED = "_dsb_replaced"  # where a model keeps what `patch` replaced


def supported_class(model: Any) -> str | None:
    """The name in `SUPPORTED` of the model's class or of one that it derives from."""
    return next((c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED), None)


def refusal(model: Any) -> str | None:
    """Why a model cannot be patched, None where it can."""
    if supported_class(model) is None:
        return f"{type(model).__name__} has other modules than theirs"
    loaded_from = getattr(model.config, "architectures", None) or []
    other = runs_elsewhere([*(c.__name__ for c in type(model).__mro__), *loaded_from])
    if other is not None:
        return f"the model is {other}"
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
    if heads % groups:
        return f"config.num_key_value_heads={groups} does not divide num_attention_heads={heads}"
    if dim % 2:
        return f"its heads have {dim} dimensions, and RoPE rotates pairs"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # one table could not serve rows of several lengths
        return "its rotary angles (rope_type='longrope') depend on the length of the text"
    layer_types = getattr(model.config, "layer_types", None) or []
    if any(t != "full_attention" for t in layer_types):
        return "some of its layers attend to a sliding window"
    if getattr(model.config, "sliding_window", None) and not layer_types:
        return f"config.sliding_window={model.config.sliding_window}"
    return None


class BoundGenerate:
    """`dsb_runtime.generate` with the model that has this as its `dsb_generate`.

    It does not keep the model alive: with a reference in a circle, `del model` would leave the
    weights in memory until the next garbage collection. A copy of the model has its own.
    """

    __signature__ = inspect.signature(functools.partial(generate, None))  # type: ignore[arg-type]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundGenerate, (self.model(),)

    def __call__(self, *args: Any, **named: Any) -> GenerationOutput:
        """Raises ReferenceError where the model is gone, and otherwise what `generate` does."""
        model = self.model()
        if model is None:
            raise ReferenceError("dsb_generate: its model is gone; expected a variable for it")
        return generate(model, *args, **named)


def describe(
    model: PreTrainedModel, family: str | None, mask_id: int | None,
    eos_ids: tuple[int, ...] | list[int] | None,
) -> DiffusionInfo:  # fmt: skip
    """The arguments, and in place of each None what the model says: its `dsb`, its config, or for
    the family its class.

    Raises:
        TypeError, ValueError: an argument is not accepted, or names another family than the model.
    """
    config, kind = model.config, str(supported_class(model))
    dsb = getattr(model, "dsb", None)
    own = dsb if isinstance(dsb, DiffusionInfo) else None
    says = own.family if own is not None else config_family(config.to_dict())
    name = SUPPORTED[kind] if family is None else family
    if says is None and name not in FAMILIES:
        raise ValueError(f"family={name!r}: expected one of {', '.join(FAMILIES)} for a {kind}")
    if says is not None and family not in (None, says.name):
        source = "config" if own is None else "dsb"
        hint = ", or unpatch(model) before" if REPLACED in vars(model) else ""
        raise ValueError(
            f"family={family!r}: model.{source} says {says.name!r}; expected that{hint}"
        )
    if mask_id is None:
        mask_id = getattr(config, "mask_token_id", None) if own is None else own.mask_id
    if eos_ids is None and own is not None:
        eos_ids = own.eos_ids
    elif eos_ids is None:
        eos_ids = listed_ids("config.eos_token_id", config.eos_token_id, config.vocab_size)
    return checked_info(says or FAMILIES[str(name)], mask_id, eos_ids, config.vocab_size)


def patch(
    model: PreTrainedModel,
    *,
    family: str | None = None,
    mask_id: int | None = None,
    eos_ids: tuple[int, ...] | list[int] | None = None,
) -> PreTrainedModel:
    """Make a Llama, Qwen2, Qwen3 or Mistral in memory decode with DSB; returns the model.

    Its attention becomes bidirectional and runs through the "dsb" implementation. At the first call
    its q, k and v weights become views of one storage, and so do its gate and up weights
    (`engine.packing`); `unpatch` leaves them so. It gains
    `model.dsb_generate(input_ids, **settings)`, which scores without logits and does not keep the
    model in memory.

    Args:
        model: a causal or bidirectional model whose weights are a diffusion model's.
        family: a name in `dsb_runtime.families.FAMILIES`, such as "llada" or "dream", whose logits,
            sampling and prefix window the model follows. None takes the one of `model.dsb`
            (a model of `load_model` or of the Auto classes) or of the config (`dsb_family`, which
            `dsb convert` writes, or `model_type`). Where neither names one, None means llada for a
            Llama and dream for a Qwen2.
        mask_id: the mask token; None takes the one of `model.dsb` or `config.mask_token_id`.
        eos_ids: ids that end a response; None takes those of `model.dsb` or the config's.

    Raises:
        TypeError: a model that cannot be patched; the message says why, and what is supported. Or
            `eos_ids` is neither a tuple nor a list.
        ValueError: an argument that is not accepted, a family other than the model's own, a mask
            that is also an EOS id, or other arguments than those that the model is patched with.
    """
    given, model = model, unwrap(model)
    why = refusal(model)
    if why is not None:
        raise TypeError(f"patch: {why}; supported are {', '.join(SUPPORTED)} with full attention")
    if REPLACED in vars(model) and "dsb_generate" not in vars(model):
        unpatch(model)  # an interrupt has left it half-way
    config, info = model.config, describe(model, family, mask_id, eos_ids)
    if REPLACED in vars(model):
        now = check_model(model)
        if info != now:
            raise ValueError(
                f"mask_id={info.mask_id}, eos_ids={info.eos_ids}: the model is patched with "
                f"mask_id={now.mask_id}, eos_ids={now.eos_ids}; expected these, or unpatch(model) "
                "before"
            )
        return given
    attributes = diffusion_attributes(info)
    # A model that has this one is patched: it is set last, and `unpatch` removes it first.
    attributes["dsb_generate"] = BoundGenerate(model)
    # `custom_generate` follows the generation config's ids, which may be others than the caller's.
    ends = {} if eos_ids is None else {"eos_token_id": list(info.eos_ids) or None}
    ours: list[tuple[Any, dict[str, Any]]] = [
        (model.generation_config, ends),
        (config, {"is_causal": False, "mask_token_id": info.mask_id}), (model, attributes),
    ]  # fmt: skip
    replaced = [
        {n: [vars(target)[n]] if n in vars(target) else [] for n in new} for target, new in ours
    ]
    try:
        # This comes first, so that `unpatch` restores all from wherever an interrupt comes.
        setattr(model, REPLACED, (config._attn_implementation, replaced))
        model.set_attn_implementation("dsb")
        for target, new in ours:
            for attribute, value in new.items():
                setattr(target, attribute, value)
    except BaseException:
        unpatch(model)
        raise
    return given


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Put back every attribute that `patch` set; a model that is not patched stays as it is."""
    given, model = model, unwrap(model)
    if REPLACED not in vars(model):
        return given
    before, replaced = vars(model)[REPLACED]
    vars(model).pop(ENGINE, None)
    targets = (model, model.config, model.generation_config)
    for target, values in zip(targets, reversed(replaced), strict=True):
        for name, value in reversed(values.items()):  # [the value before], [] where none was
            if value:
                setattr(target, name, value[0])
            else:
                vars(target).pop(name, None)
    model.set_attn_implementation(before)
    del vars(model)[REPLACED]  # the last step, so that an interrupted call can be made again
    return given

"""LLaDA, Dream and A2D models in transformers' Auto classes, which then need no remote code.

Importing this file registers them. transformers then ignores a repository's own `auto_map`, as it
prefers the class that a package has registered to code in a repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dsb_runtime.doors import hf_generate
from dsb_runtime.families import (
    A2D_LLAMA,
    A2D_QWEN2,
    A2D_QWEN3,
    DREAM,
    LLADA,
    DiffusionInfo,
    Family,
    supported_config,
)
from dsb_runtime.fields import shown
from dsb_runtime.models.folder import find_folder, read_config
from dsb_runtime.models.load import check_name, diffusion_attributes, diffusion_info, read_model

# Fields of a published config that are neither the network's nor remote code's.
KEPT = ("mask_token_id", "eos_token_id", "bos_token_id", "dtype", "torch_dtype", "dsb_family")
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "token")


class DiffusionConfig(PretrainedConfig):
    """A published config, read into the fields of the network that it describes."""

    family: ClassVar[Family]
    is_causal = False
    mask_token_id = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Raises ValueError for a field that is missing, malformed or would change the result."""
        family = config_dict.get("dsb_family")
        if family not in (None, cls.family.name):
            raise ValueError(
                f"config.json has dsb_family={shown(family)}: expected {cls.family.name!r} for "
                f"model_type={cls.model_type!r}"
            )
        fields = supported_config(config_dict, cls.family).to_dict()
        for name in ("model_type", "transformers_version", "architectures", "_name_or_path"):
            fields.pop(name, None)
        fields.update({name: config_dict[name] for name in KEPT if name in config_dict})
        return super().from_dict({**fields, "is_causal": False}, **kwargs)


class DiffusionModel(PreTrainedModel):
    """A transformers model with `.dsb`: what `dsb_runtime.generate` needs to know of it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        ends = [] if config.eos_token_id is None else config.eos_token_id
        ends = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
        # A mask that also ends a response says nothing: `from_pretrained` may be given other ids.
        if config.mask_token_id is not None and config.mask_token_id not in ends:
            info = DiffusionInfo(config.family, config.mask_token_id, ends)
            vars(self).update(diffusion_attributes(info))

    def generate(self, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
        """transformers' `generate`, which decodes by `dsb_runtime.custom_generate` unless another
        function is named."""
        parent: Any = super()
        recipe = hf_generate.custom_generate if custom_generate is None else custom_generate
        return parent.generate(*args, custom_generate=recipe, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # it has arguments of its own
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: Any = None,
        mask_id: int | None = None,
        eos_ids: tuple[int, ...] | list[int] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load as transformers does, with `load_model`'s checks and its `mask_id` and `eos_ids`.

        Raises:
            FileNotFoundError, OSError: no such folder, file or hub repository.
            TypeError: `config` is of another class.
            ValueError: unsupported config field, wrong weight, damaged file, or an argument that is
                not accepted.
        """
        source = pretrained_model_name_or_path
        for name, accepted in (("use_safetensors", (None, True)), ("key_mapping", (None, {}))):
            if (value := kwargs.pop(name, None)) not in accepted:
                why = "only safetensors are read, by the family's names"
                raise ValueError(f"{name}={shown(value)}: {why}; expected None")
        hub = {name: kwargs.pop(name) for name in DOWNLOAD if name in kwargs}
        folder = find_folder(source, revision, **hub) / (subfolder or "")
        raw = read_config(folder)
        config_class: Any = cls.config_class
        check_name(source, config_class.family)
        if config is None:
            config = config_class.from_dict(dict(raw))
            fields = [n for n in kwargs if n not in ("dtype", "torch_dtype") and hasattr(config, n)]
            for name in fields:  # as the Auto classes do, and transformers for its own classes
                setattr(config, name, kwargs.pop(name))
        elif not isinstance(config, config_class):
            raise TypeError(
                f"config={type(config).__name__}: expected {config_class.__name__} for {source}"
            )
        if config.is_causal:
            raise ValueError(f"is_causal={config.is_causal}: it attends both ways; expected False")
        raw = {**raw, "eos_token_id": config.eos_token_id}  # a keyword may have changed it
        info = diffusion_info(
            folder, raw, config.family, config.vocab_size,
            config.mask_token_id if mask_id is None else mask_id, eos_ids,
        )  # fmt: skip
        if config._attn_implementation is None:
            kwargs.setdefault("attn_implementation", "dsb")
        parent: Any = super().from_pretrained
        model, report = read_model(cls, parent, folder, raw, config, info, **kwargs)
        return (model, report) if output_loading_info else model


class LladaConfig(DiffusionConfig, LlamaConfig):
    model_type = LLADA.model_types[0]
    family = LLADA


class LladaForCausalLM(DiffusionModel, LlamaForCausalLM):
    config_class = LladaConfig


class DreamConfig(DiffusionConfig, Qwen2Config):
    model_type = DREAM.model_types[0]
    family = DREAM


class DreamForCausalLM(DiffusionModel, Qwen2ForCausalLM):
    config_class = DreamConfig


class A2dLlamaConfig(DiffusionConfig, LlamaConfig):
    model_type = A2D_LLAMA.model_types[0]
    family = A2D_LLAMA


class A2dLlamaForCausalLM(DiffusionModel, LlamaForCausalLM):
    config_class = A2dLlamaConfig


class A2dQwen2Config(DiffusionConfig, Qwen2Config):
    model_type = A2D_QWEN2.model_types[0]
    family = A2D_QWEN2


class A2dQwen2ForCausalLM(DiffusionModel, Qwen2ForCausalLM):
    config_class = A2dQwen2Config


class A2dQwen3Config(DiffusionConfig, Qwen3Config):
    model_type = A2D_QWEN3.model_types[0]
    family = A2D_QWEN3


class A2dQwen3ForCausalLM(DiffusionModel, Qwen3ForCausalLM):
    config_class = A2dQwen3Config


class DreamTokenizer(Qwen2Tokenizer):
    """The published class of this name is Qwen2's."""


def register(
    config: type[DiffusionConfig], model: type[DiffusionModel],
    tokenizer: type[PreTrainedTokenizerBase],
) -> None:  # fmt: skip
    """Make the Auto classes load every `model_type` of the config's family."""
    for model_type in config.family.model_types:
        CONFIG_MAPPING.register(model_type, config, exist_ok=True)
    # The model cards load through AutoModel, which therefore returns the model with its LM head.
    for auto in (AutoModel, AutoModelForCausalLM):
        auto.register(config, model, exist_ok=True)
    AutoTokenizer.register(config, tokenizer_class=tokenizer, exist_ok=True)


register(LladaConfig, LladaForCausalLM, PreTrainedTokenizerFast)
register(DreamConfig, DreamForCausalLM, DreamTokenizer)
register(A2dLlamaConfig, A2dLlamaForCausalLM, PreTrainedTokenizerFast)
register(A2dQwen2Config, A2dQwen2ForCausalLM, Qwen2Tokenizer)
register(A2dQwen3Config, A2dQwen3ForCausalLM, Qwen2Tokenizer)

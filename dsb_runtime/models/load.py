"""load_model: a published checkpoint as transformers' own model, without remote code.

`models.folder` finds the files, and `models.weights` checks their headers before a model is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from dsb_runtime.engine.parallel import check_distributed
from dsb_runtime.families import (
    DiffusionInfo,
    Family,
    checked_info,
    find_family,
    supported_config,
)
from dsb_runtime.fields import listed_ids
from dsb_runtime.models.adapter import add_adapter, read_adapter
from dsb_runtime.models.folder import (
    find_folder,
    first_line,
    read_config,
    read_generation,
    read_object,
    weight_files,
)
from dsb_runtime.models.weights import check_sizes, check_weights, published_names, read_shapes


def end_ids(folder: Path, raw: dict[str, Any], family: Family, vocab_size: int) -> tuple[int, ...]:
    """The EOS ids of config and generation config, and the ids that end a turn beside them."""
    generation = folder / "generation_config.json"
    ids: list[int] = []
    for path, fields in (
        (folder / "config.json", raw),
        (generation, read_object(generation) if generation.is_file() else {}),
    ):
        name = f"{path.name} has eos_token_id"
        for eos in listed_ids(name, fields.get("eos_token_id"), vocab_size):
            ids += [eos, *(i for i in family.turn_ends.get(eos, ()) if i < vocab_size)]
    return tuple(dict.fromkeys(ids))


def pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r}: expected 'auto' or a torch device") from error
    if picked.type == "meta":
        raise ValueError(f"device={device!r}: it holds no weights; expected 'auto' or 'cpu'")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: no CUDA device here; expected 'auto' or 'cpu'")
    try:
        torch.empty(0, device=picked)
    except Exception as error:  # every kind of device raises its own
        raise ValueError(
            f"device={device!r}: no such device here; expected 'auto', 'cpu' or 'cuda'"
        ) from error
    return picked


def pick_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype to load: "auto" (the checkpoint's) or a torch dtype, which may go by its name."""
    picked = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    accepted = (torch.float32, torch.bfloat16, torch.float16)
    if picked != "auto" and picked not in accepted:
        raise ValueError(f"dtype={dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return picked


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    family: str | None = None,
    mask_id: int | None = None,
    eos_ids: tuple[int, ...] | list[int] | None = None,
    revision: str | None = None,
    distributed_config: DistributedConfig | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization_config: Any = None,
    adapter: str | Path | None = None,
) -> PreTrainedModel:
    """Load a checkpoint of a diffusion language model as a bidirectional Llama, Qwen2 or Qwen3.

    Args:
        source: a local folder or a hub id, with safetensors in one file or in shards.
        dtype: "auto" takes the checkpoint's; float32, bfloat16 and float16 are accepted too.
        device: "auto" takes the GPU where there is one.
        family: a name in `dsb_runtime.families.FAMILIES`, such as "llada" or "dream", where
            config.json's `model_type` does not say.
        mask_id, eos_ids: override what the config says (iLLaDA's config names no mask id).
        revision: branch, tag or commit of a hub repository.
        distributed_config: transformers' `DistributedConfig`. With `tp_plan="auto"` it splits the
            model over the processes that `torchrun` started, each on its own device.
        device_map: as transformers takes it, for a model that does not fit one device. Its modules
            then run where accelerate places them, which is slower (`docs/models.md`).
        quantization_config: as transformers takes it.
        adapter: a folder or a hub id with an adapter of PEFT (LoRA and others). It is put into the
            model and not merged, which is slower (`docs/models.md`).

    Returns:
        `LlamaForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM` in eval mode with the attention
        implementation "dsb"; `model.dsb` has the family, the mask id and the EOS ids.

    Raises:
        FileNotFoundError, OSError: there is no such folder, file or hub repository.
        ValueError: a config field is not supported, a weight is wrong, a file is damaged, or an
            argument is not accepted.
    """
    placing = {"distributed_config": distributed_config, "device_map": device_map}
    placements = [name for name, value in placing.items() if value is not None]
    if placements and device != "auto":
        raise ValueError(f"device={device!r}: {placements[0]} picks it; expected 'auto'")
    if len(placements) > 1:
        raise ValueError("distributed_config and device_map: expected one of the two")
    if adapter is not None and distributed_config is not None:
        raise ValueError("distributed_config and adapter: expected one of the two")
    device, dtype = pick_device(device), pick_dtype(dtype)
    folder = find_folder(source, revision)
    raw = read_config(folder)
    adapting = None if adapter is None else read_adapter(adapter)
    described = find_family(raw, family)
    if family is None:
        check_name(source, described)
    config = supported_config(raw, described)
    config.is_causal = False
    split = distributed_config is not None and check_distributed(distributed_config, config) > 1
    info = diffusion_info(folder, raw, described, config.vocab_size, mask_id, eos_ids)
    model_class = getattr(transformers, described.model_class)
    model, _ = read_model(
        model_class, model_class.from_pretrained, folder, raw, config, info, dtype=dtype,
        attn_implementation="dsb", distributed_config=distributed_config if split else None,
        device_map=device_map, quantization_config=quantization_config,
    )  # fmt: skip
    if not split and device_map is None and quantization_config is None:
        torch.nn.Module.to(model, device)
    if adapting is not None:
        add_adapter(model, adapting)
    return model.eval()


def mask_of_tokenizer(folder: Path) -> int | None:
    """The id of the tokenizer's mask token. None if it has none, or the folder has no tokenizer."""
    try:
        return load_tokenizer(folder).mask_token_id  # type: ignore[return-value]  # an int or None
    except ValueError:
        return None


def check_name(source: str | Path, family: Family) -> None:
    """Raise ValueError for an A2D checkpoint whose name, or a folder that it is in, says BD3LM.

    Nothing else says so: dllm builds the block-causal mask in its trainer, from a training argument
    (`dllm/core/trainers/bd3lm.py` at 0d632f3d). It writes the model under "checkpoint-final", with
    the config of an MDLM.
    """
    if family.mask_of_tokenizer and "bd3lm" in str(source).lower():
        raise ValueError(
            f"model={str(source)!r}: by its name a block diffusion model (BD3LM), which attends to "
            "the blocks before it only; expected an MDLM, or load_model with the family named "
            f"(family={family.name!r})"
        )


def diffusion_info(
    folder: Path,
    raw: dict[str, Any],
    family: Family,
    vocab_size: int,
    mask_id: int | None = None,
    eos_ids: tuple[int, ...] | list[int] | None = None,
) -> DiffusionInfo:
    """The checkpoint's mask and EOS ids, or those that the caller named."""
    hint = ""
    if mask_id is None and (mask_id := raw.get("mask_token_id")) is None:
        hint = " (config.json has no mask_token_id: name it)"
        if family.mask_of_tokenizer:
            mask_id = mask_of_tokenizer(folder)
            hint = " (neither config.json nor the tokenizer has a mask token: name it)"
    ends = end_ids(folder, raw, family, vocab_size) if eos_ids is None else eos_ids
    return checked_info(family, mask_id, ends, vocab_size, hint)


def prepare_inputs_for_generation(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """What transformers' own decoding calls before each token. It reads the signature, too.

    Raises:
        TypeError: always, since such a decoding is left to right, which the model is not.
    """
    raise TypeError(
        "generate(): it decodes token by token, as a causal model; expected "
        "generate(..., custom_generate=dsb_runtime.custom_generate)"
    )


def diffusion_attributes(info: DiffusionInfo) -> dict[str, Any]:
    """The attributes that make a causal model of transformers a diffusion model."""
    # The loss compares each label with the logits that predict it: those of the position before
    # for a family that shifts, as for a causal model, and otherwise those of its own position.
    loss = "ForCausalLM" if info.family.shift else "ForMaskedLM"
    prepare = prepare_inputs_for_generation
    return {"dsb": info, "loss_type": loss, "prepare_inputs_for_generation": prepare}


def read_model(
    model_class: type[PreTrainedModel],
    from_pretrained: Callable[..., tuple[PreTrainedModel, dict[str, Any]]],
    folder: Path,
    raw: dict[str, Any],
    config: PretrainedConfig,
    info: DiffusionInfo,
    **arguments: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with every weight checked, `model.dsb` attached, and transformers' loading report.
    `from_pretrained` is transformers' own; `arguments` are passed on to it. `raw` is the content of
    config.json."""
    shapes = read_shapes(weight_files(folder))
    patterns = info.family.key_mapping
    published = any(re.search(p, name) for p in patterns for name in shapes)
    mapping = dict(patterns) if published else {}
    try:
        present = published_names(shapes, mapping)
        check_sizes(shapes, present, config)
        with torch.device("meta"):
            skeleton = model_class(config)
        check_weights(shapes, present, skeleton)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if arguments.get("generation_config") is None:
        generation = arguments["generation_config"] = read_generation(folder, raw)
        ends = generation.eos_token_id
        if any(end not in info.eos_ids for end in (ends if isinstance(ends, list) else [ends])):
            # `custom_generate` follows these ids, and the caller's come before the checkpoint's.
            generation.eos_token_id = [*info.eos_ids] or None
    model, report = from_pretrained(
        folder, config=config, key_mapping=mapping or None, use_safetensors=True,
        local_files_only=True, output_loading_info=True, **arguments,
    )  # fmt: skip
    for kind, keys in report.items():
        if keys:
            wrong = f"{kind.replace('_', ' ')}: {sorted(keys)[0]}"
            raise ValueError(f"{folder}: not every weight was read ({wrong})")
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            f"{folder}: config.json ties the embeddings, but the checkpoint's output weights "
            "differ from them"
        )
    vars(model).update(diffusion_attributes(info))
    # A copy that is saved gets the names that the model has now, and its config names the family.
    vars(model)["_weight_conversions"] = None
    model.config.mask_token_id, model.config.dsb_family = info.mask_id, info.family.name
    return model, report


def load_tokenizer(source: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, without remote code.

    Raises:
        FileNotFoundError, OSError: no such folder or hub repository.
        ValueError: the folder has no tokenizer that loads without remote code.
    """
    folder = find_folder(source, revision)
    try:
        if (folder / "tokenizer.json").is_file():
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        if all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            # These are Dream's files; its published class is Qwen2's under another name.
            return transformers.Qwen2Tokenizer.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare Exception for a damaged file
        said = first_line(error)
        raise ValueError(f"{folder}: no tokenizer that can be read ({said})") from error

"""load_model: a published checkpoint as transformers' own model, without remote code.

The files' headers are checked against the model's weights before anything is read, so that a
weight that is missing, unexpected or of another shape is an error and never a random layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.distributed import DistributedConfig

from dsb_runtime.engine.parallel import check_distributed
from dsb_runtime.families import DiffusionInfo, Family, find_family, supported_config

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Checkpoints of some versions store these buffers, which follow from the config.
IGNORED_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def find_folder(
    source: str | Path, revision: str | None = None, *, argument: str = "model", **hub: Any
) -> Path:
    """A local folder, or the local copy of a hub repository. `argument` is what named it, and
    `hub` takes further arguments of the download (token, cache_dir, ...)."""
    kind = "a checkpoint folder" if argument == "model" else "an adapter folder of PEFT"
    accepted = f"expected {kind} or a hub id (owner/name)"
    if not isinstance(source, (str, Path)) or not str(source):
        raise TypeError(f"{argument}={source!r}: {accepted}")
    path, name = Path(source), str(source)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise FileNotFoundError(f"{argument}={name!r}: {accepted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, **hub))
    except Exception as error:  # the hub client raises many types; all mean the same to a user
        raise OSError(
            f"{argument}={name!r}: neither a folder nor a hub id that can be downloaded "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the checkpoint's config.json."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json, so this is no model folder")
    return read_object(folder / "config.json")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = read_object(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
            raise ValueError(f"{index}: no weight_map of file names, so not a safetensors index")
        names = sorted(set(shards.values()))
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: shard {name} is named by the index but absent")
        return [folder / name for name in names]
    for pickled in sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder}: weights are pickled ({pickled}), which can run code when read; "
            "expected model.safetensors"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def read_shapes(files: list[Path]) -> dict[str, list[int]]:
    """The name and shape of every tensor, for which only the files' headers are read."""
    shapes: dict[str, list[int]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                here = {k: handle.get_slice(k).get_shape() for k in handle.keys()}  # noqa: SIM118 (a handle is no dict)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        for name in sorted(set(here) & set(shapes)):
            raise ValueError(f"{path}: weight {name} is in an earlier shard as well")
        shapes.update(here)
    return shapes


def rename(name: str, mapping: dict[str, str]) -> str:
    """The weight's name in transformers' model."""
    for pattern, replacement in mapping.items():
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def check_weights(
    shapes: dict[str, list[int]], mapping: dict[str, str], model: PreTrainedModel
) -> None:
    """Raise ValueError unless the checkpoint has exactly the model's weights."""
    expected = {k: list(v.shape) for k, v in model.state_dict().items()}
    present: dict[str, str] = {}  # a weight's name in the model -> its name in the checkpoint
    for name in shapes:
        target = rename(name, mapping)
        if target in present:
            raise ValueError(f"weights {present[target]} and {name} are the same weight")
        if not IGNORED_WEIGHTS.search(name):
            present[target] = name
    optional = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(present) - optional)
    unexpected = sorted(present[k] for k in set(present) - set(expected))
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ValueError(f"{what} weight {names[0]} ({len(names)} {what} in all)")
    for target, name in present.items():
        if shapes[name] != expected[target]:
            raise ValueError(f"weight {name} has shape {shapes[name]}, expected {expected[target]}")


def end_ids(folder: Path, raw: dict[str, Any], family: Family, vocab_size: int) -> tuple[int, ...]:
    """The EOS ids of config and generation config, and the ids that end a turn beside them."""
    ids: list[Any] = []
    generation = folder / "generation_config.json"
    for source in (raw, read_object(generation) if generation.is_file() else {}):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [value] if value is not None else []
    for eos in list(ids):
        special_id("eos_token_id", eos, vocab_size, " (or a list of them)")
        ids += [i for i in family.turn_ends.get(eos, ()) if i < vocab_size]
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


def special_id(name: str, value: Any, vocab_size: int, hint: str = "") -> int:
    """`value` where it is a token id; ValueError names the argument or field otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r}: expected a token id, 0 to {vocab_size - 1}{hint}")
    if not 0 <= value < vocab_size:
        raise ValueError(f"{name}={value}: outside the vocabulary, expected 0 to {vocab_size - 1}")
    return value


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
    """Load a LLaDA- or Dream-format checkpoint as a bidirectional Llama or Qwen2.

    Args:
        source: a local folder or a hub id, with safetensors in one file or in shards.
        dtype: "auto" takes the checkpoint's; float32, bfloat16 and float16 are accepted too.
        device: "auto" takes the GPU where there is one.
        family: "llada" or "dream", where config.json's `model_type` does not say.
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
        `LlamaForCausalLM` or `Qwen2ForCausalLM` in eval mode with the attention implementation
        "dsb"; `model.dsb` has the family, the mask id and the EOS ids.

    Raises:
        FileNotFoundError, OSError: there is no such folder, file or hub repository.
        ValueError: a config field is not supported, a weight is wrong, a file is damaged, or an
            argument is not accepted.
    """
    placing = {"distributed_config": distributed_config, "device_map": device_map}
    placed = [name for name, value in placing.items() if value is not None]
    if placed and device != "auto":
        raise ValueError(f"device={device!r}: {placed[0]} picks it; expected 'auto'")
    if len(placed) > 1:
        raise ValueError("distributed_config and device_map: expected one of the two")
    if adapter is not None and distributed_config is not None:
        raise ValueError("distributed_config and adapter: expected one of the two")
    device, dtype = pick_device(device), pick_dtype(dtype)
    folder = find_folder(source, revision)
    raw = read_config(folder)
    if adapter is not None:
        from dsb_runtime.models.adapter import add_adapter, read_adapter  # it imports this module

        adapting = read_adapter(adapter)
    described = find_family(raw, family)
    config = supported_config(raw, described)
    config.is_causal = False
    split = distributed_config is not None and check_distributed(distributed_config, config) > 1
    info = diffusion_info(folder, raw, described, config.vocab_size, mask_id, eos_ids)
    model_class = getattr(transformers, described.model_class)
    model, _ = read_model(
        model_class, model_class.from_pretrained, folder, config, info, dtype=dtype,
        attn_implementation="dsb", distributed_config=distributed_config if split else None,
        device_map=device_map, quantization_config=quantization_config,
    )  # fmt: skip
    if not split and device_map is None and quantization_config is None:
        torch.nn.Module.to(model, device)
    if adapter is not None:
        add_adapter(model, adapting)
    return model.eval()


def diffusion_info(
    folder: Path,
    raw: dict[str, Any],
    family: Family,
    vocab_size: int,
    mask_id: int | None = None,
    eos_ids: tuple[int, ...] | list[int] | None = None,
) -> DiffusionInfo:
    """The checkpoint's mask and EOS ids, or those that the caller named."""
    mask = special_id(
        "mask_id", raw.get("mask_token_id") if mask_id is None else mask_id, vocab_size,
        "" if mask_id is not None else " (config.json has no mask_token_id: name it)",
    )  # fmt: skip
    if eos_ids is None:
        ends = end_ids(folder, raw, family, vocab_size)
    elif isinstance(eos_ids, (tuple, list)):
        ends = tuple(special_id("eos_ids", end, vocab_size, " each") for end in eos_ids)
    else:
        raise TypeError(f"eos_ids={eos_ids!r}: expected a tuple of token ids")
    if mask in ends:
        raise ValueError(f"mask_id={mask}: it is also an EOS id; expected different ids")
    return DiffusionInfo(family, mask, ends)


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
    config: PretrainedConfig,
    info: DiffusionInfo,
    **arguments: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model with every weight checked, `model.dsb` attached, and transformers' loading report.
    `from_pretrained` is transformers' own; `arguments` are passed on to it."""
    shapes = read_shapes(weight_files(folder))
    patterns = info.family.key_mapping
    published = any(re.search(p, name) for p in patterns for name in shapes)
    mapping = dict(patterns) if published else {}
    with torch.device("meta"):
        skeleton = model_class(config)
    try:
        check_weights(shapes, mapping, skeleton)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
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

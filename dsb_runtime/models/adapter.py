"""load_model(adapter=...): an adapter of PEFT, put into the model and not merged.

The adapted layers then compute what they compute in PEFT's own model. Merged weights would be
rounded to the model's dtype, which can decide a near tie differently. An adapter that was trained
on LLaDA's published classes names their modules; it is renamed as the checkpoint's weights are.
PEFT only warns of a weight that finds no place, so every name and shape is checked here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dsb_runtime.families import adapter_refusal, check_model
from dsb_runtime.models.folder import find_folder, first_line, read_object
from dsb_runtime.models.weights import read_shapes, rename

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every weight that PEFT saves
BOOKKEEPING = ("peft_version", "auto_mapping")  # what PEFT writes beside a config's own fields


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, PEFT's config of it, and the words for it in errors."""

    name: str
    folder: Path
    config: Any


def read_adapter(source: str | Path) -> Adapter:
    """Check all of an adapter that can be checked before a model is there.

    Raises:
        ImportError: PEFT is not installed.
        TypeError, ValueError, OSError: `source` has no adapter that can be put into a model.
    """
    folder, name = find_folder(source, argument="adapter"), f"adapter={str(source)!r}"
    expected = "expected an adapter folder of PEFT"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{name}: no {CONFIG}; {expected}")
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        pickled = f"weights are pickled ({PICKLED}), which can run code when read"
        raise ValueError(f"{name}: {pickled}; expected {WEIGHTS}")
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{name}: no {WEIGHTS}; {expected}")
    if importlib.util.find_spec("peft") is None:
        raise ImportError(f"{name}: needs PEFT; expected pip install 'dsb-kernels[peft]'")
    try:
        config = read_config(folder)
        read_shapes([folder / WEIGHTS])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Adapter(name, folder, config)


def read_config(folder: Path) -> Any:
    """PEFT's config of an adapter.

    Raises:
        ValueError: PEFT does not know it, or it acts through PEFT's own model, and not through the
            layers that it adapts alone.
    """
    import peft

    raw = read_object(folder / CONFIG)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in peft.PeftType.__members__:
        raise ValueError(f"peft_type={kind!r} in {CONFIG}; expected a type of PEFT, as 'LORA'")
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind]].__dataclass_fields__
    for field in sorted(set(raw) - {*known, *BOOKKEEPING}):
        if raw[field]:  # PEFT would leave it out with a warning
            raise ValueError(
                f"{field}={raw[field]!r} in {CONFIG}; expected a field of {kind} that PEFT "
                f"{peft.__version__} knows"
            )
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # every type of adapter checks its own fields
        raise ValueError(f"{CONFIG}: {first_line(error)}") from error
    if (why := adapter_refusal(config)) is not None:
        raise ValueError(f"{CONFIG}: {why}")
    config.inference_mode = True
    return config


def published_modules(model: PreTrainedModel) -> dict[str, str]:
    """The published name of each module with a weight, and its name in the model."""
    names: dict[str, str] = {}
    for pattern, ours in check_model(model).family.key_mapping.items():
        theirs = pattern.removeprefix("^").replace(r"\.", ".")
        for layer in range(model.config.num_hidden_layers if r"(\d+)" in theirs else 1):
            name = theirs.replace(r"(\d+)", str(layer)).removesuffix(".")
            names[name] = ours.replace(r"\1", str(layer)).removesuffix(".")
    return names


def rename_targets(config: Any, names: Mapping[str, str]) -> None:
    """Let a config of LoRA that names published modules name the model's, each in full."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    targets = {
        theirs: ours for theirs, ours in names.items() if check_target_module_exists(config, theirs)
    }
    for field in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, field)
        keys = {ours: get_pattern_key(values, theirs) for theirs, ours in targets.items()}
        setattr(config, field, {ours: values[k] for ours, k in keys.items() if k in values})
    saved = tuple(config.modules_to_save or ())
    config.modules_to_save = [o for theirs, o in names.items() if theirs.endswith(saved)] or None
    config.target_modules = set(targets.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put an adapter into the model, in place.

    Raises:
        ValueError: the adapter does not fit the model, as where a weight is missing, unexpected, or
            of another shape.
    """
    # transformers' own load_adapter only warns of what does not fit, and refuses PEFT before 0.22.
    from peft import functional

    offloaded = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if offloaded is not None:
        raise ValueError(
            f"{adapter.name}: device_map keeps {offloaded} away from its device, where it cannot "
            "be adapted; expected a device_map without offload"
        )
    config, mapping = adapter.config, dict(check_model(model).family.key_mapping)
    weights = {k.removeprefix(PREFIX): v for k, v in load_file(adapter.folder / WEIGHTS).items()}
    renamed = {rename(name, mapping): weight for name, weight in weights.items()}
    try:
        if renamed.keys() != weights.keys():
            if config.peft_type != "LORA":
                kind = f"peft_type={config.peft_type.value!r} with published names of modules"
                raise ValueError(f"{kind}; expected 'LORA'")
            rename_targets(config, published_modules(model))
        functional.inject_adapter_in_model(config, model)
        functional.cast_adapter_dtype(model, "default")  # as PEFT's own model does
        expected = functional.get_peft_model_state_dict(model, save_embedding_layers=False)
        check_complete(expected, renamed)
        report: Any = functional.set_peft_model_state_dict(model, renamed)
        unexpected = report.unexpected_keys
        if unexpected:
            raise ValueError(f"unexpected weight {min(unexpected)} ({len(unexpected)} in all)")
    except Exception as error:  # PEFT raises many types, and each means that the two do not fit
        said = first_line(error)
        raise ValueError(f"{adapter.name}: it does not fit the model ({said})") from error


def check_complete(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the adapter's file has every weight of the adapted modules."""
    for name, weight in expected.items():
        if name not in weights:
            raise ValueError(f"missing weight {name}")
        if weight.shape != weights[name].shape:
            shape = list(weights[name].shape)
            raise ValueError(f"weight {name} has shape {shape}, expected {list(weight.shape)}")

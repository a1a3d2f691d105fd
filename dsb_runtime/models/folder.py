"""A checkpoint folder: where it is, its JSON files, and which files hold its weights.

Nothing in a folder is trusted. Only JSON and safetensors are read, and nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from dsb_runtime.fields import shown
from dsb_runtime.files import read_json

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
    if (folder / "config.json").is_file():
        return read_object(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder}: an adapter of PEFT and no config.json; expected the model that it adapts, "
            f"{shown(base)}"
        )
    raise FileNotFoundError(f"{folder}: no config.json, so this is no model folder")


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    raw = read_json(path, "")
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def read_generation(folder: Path, raw: dict[str, Any]) -> GenerationConfig:
    """The checkpoint's generation config, or one with the special ids of its config.json, `raw`."""
    path = folder / "generation_config.json"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields = read_object(path) if path.is_file() else {name: raw.get(name) for name in ids}
    try:
        generation = GenerationConfig.from_dict(fields)
        generation.to_dict()  # copies all fields, and so fails at a field that has too many levels
    except Exception as error:  # transformers raises many types for a wrong field
        said = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise ValueError(f"{path}: no generation config of transformers ({said})") from error
    return generation


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or the shards that its index names.

    Raises:
        FileNotFoundError, ValueError: no such files, or others beside them. transformers would put
            an adapter into the model if PEFT is installed, and otherwise pass over it.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder}: an adapter of PEFT (adapter_config.json) in the model's folder; expected "
            "the adapter in a folder of its own"
        )
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return shards_of(folder, index)
    for pickled in sorted(path.name for pattern in PICKLED for path in folder.glob(pattern)):
        raise ValueError(
            f"{folder}: weights are pickled ({pickled}), which can run code when read; "
            "expected model.safetensors"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def shards_of(folder: Path, index: Path) -> list[Path]:
    """The files that an index names, each a safetensors file of the same folder."""
    content = read_object(index)
    shards, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        raise ValueError(f"{index}: no weight_map of file names, so not a safetensors index")
    if not isinstance(metadata, dict):  # transformers writes into it
        raise ValueError(
            f"{index}: metadata={shown(metadata)}: expected a JSON object, such as {{}}"
        )
    names = sorted(set(shards.values()))
    for name in names:
        if not name.endswith(".safetensors") or Path(name).name != name:
            raise ValueError(
                f"{index}: shard {shown(name)}: expected a .safetensors file of this folder; files "
                "of other formats can run code when read"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: shard {name} is named by the index but absent")
    return [folder / name for name in names]

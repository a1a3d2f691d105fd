"""convert: a checkpoint as the Llama, Qwen2 or Qwen3 that it is, for plain transformers.

The copy loads without this package and attends both ways (`is_causal` is false in its config);
`dsb_family` and `mask_token_id` in the same config let `load_model` recognise it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from dsb_runtime.families import check_model
from dsb_runtime.models.folder import find_folder, read_object
from dsb_runtime.models.load import load_model, load_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
GENERATION = ("bos_token_id", "pad_token_id", "max_new_tokens")
SHARD_SIZE = re.compile(r"[0-9]{1,9}[KMGT]B", re.IGNORECASE)


def copy_tokenizer(folder: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files without references to remote code, and return their names."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not names:
        return []
    tokenizer = load_tokenizer(folder)
    for name in names:
        shutil.copyfile(folder / name, target / name)
    if "tokenizer_config.json" in names:
        settings = read_object(folder / "tokenizer_config.json")
        settings.pop("auto_map", None)
        if not hasattr(transformers, str(settings.get("tokenizer_class"))):
            fast = "PreTrainedTokenizerFast" if "tokenizer.json" in names else None
            settings["tokenizer_class"] = fast or type(tokenizer).__name__
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    return names


def set_end_ids(model: PreTrainedModel) -> None:
    """Write the ids that end a response into the config and the generation config of the copy."""
    own = {name: getattr(model.generation_config, name, None) for name in GENERATION}
    model.config.eos_token_id = list(check_model(model).eos_ids) or None
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id, **own)


def move_up(folder: Path) -> None:
    """Move all files of a folder into the one that it stands in, the config last, and remove it.
    If that is interrupted, what was moved is removed."""
    moved: list[Path] = []
    try:
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
            moved.append(folder.parent / file.name)
            file.rename(moved[-1])
        folder.rmdir()
    except BaseException:
        for file in moved:
            file.unlink(missing_ok=True)
        raise


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    family: str | None = None,
    mask_id: int | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    say: Callable[[str], object] = print,
) -> Path:
    """Write `source` to `target` in Llama's, Qwen2's or Qwen3's format, tokenizer included.

    Args:
        source, dtype, family, mask_id, revision: as `load_model` takes them.
        target: a new or an empty folder. A new one appears once it is whole, and the files of an
            empty one (which may be a mount point) once all are written.
        max_shard_size: the largest size of a safetensors file, such as "5GB".
        say: called with each line of progress.

    Raises:
        FileExistsError: `target` holds something.
        FileNotFoundError, OSError, ValueError: as `load_model` raises them; also where `target`
            cannot be written, or `max_shard_size` is no size.
    """
    target = Path(target).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: it exists; expected a new or an empty folder")
    if not SHARD_SIZE.fullmatch(max_shard_size):
        raise ValueError(f"max_shard_size={max_shard_size!r}: expected a size such as '5GB'")
    folder = find_folder(source, revision)
    # The target and the tokenizer come first, so that their errors do not wait for the weights.
    place = target if target.is_dir() else target.parent
    partial = place / f".{target.name}.{os.getpid()}"
    new_folders = [parent for parent in partial.parents if not parent.exists()]
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OSError(
                f"{target}: {error.strerror}; expected a folder that can be written"
            ) from error
        names = copy_tokenizer(folder, partial)
        say(f"reading {source}")
        model = load_model(folder, dtype=dtype, device="cpu", family=family, mask_id=mask_id)
        set_end_ids(model)
        say(f"writing {target} ({', '.join(names) if names else 'no tokenizer in the source'})")
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if place == target:
            move_up(partial)
        else:
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # a folder in which somebody else has put files stays
            for parent in new_folders:
                parent.rmdir()
        raise
    size = sum(weight.nbytes for weight in model.parameters())
    kind, name = type(model).__name__, check_model(model).family.name
    say(f"{kind} ({name}), {size / 1e9:.2f} GB: AutoModelForCausalLM.from_pretrained loads it")
    return target

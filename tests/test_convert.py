"""dsb convert: the copy gives the golden logits in a process that knows nothing of this package."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from dsb_runtime.models.convert import convert
from tests import golden
from tests.checkpoints import (
    CHAT_TEMPLATE,
    published,
    write_changed,
    write_chat_model,
    write_dream_tokenizer,
)
from tests.commands import python, refused

# Prints the largest difference from the golden logits, as the named class and as the Auto class.
PLAIN = """
import sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, reference, name, text = sys.argv[1:]
saved = load_file(reference)
for kind in (getattr(transformers, name), AutoModelForCausalLM):
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        logits = model(saved["input_ids"][None]).logits[0]
    print(float((logits - saved["logits"]).abs().max()))
print(*AutoTokenizer.from_pretrained(folder)(text).input_ids)
assert not {"dsb_runtime", "dsb_kernels"} & {module.split(".")[0] for module in sys.modules}
"""


@pytest.mark.parametrize(
    ("family", "name", "text", "tokens"),
    [("llada", "LlamaForCausalLM", "w5 w6", "5 6"), ("dream", "Qwen2ForCausalLM", "abb", "3 2")],
)
def test_plain_transformers_loads_the_copy(tmp_path, family, name, text, tokens):
    source, target = tmp_path / "source", tmp_path / "target"
    if family == "llada":
        write_chat_model(source)
    else:
        published(source, family)
        write_dream_tokenizer(source)
    convert(source, target, max_shard_size="100KB", say=lambda line: None)
    assert (target / "model.safetensors.index.json").is_file()
    config = json.loads((target / "config.json").read_text())
    assert config["is_causal"] is False and "auto_map" not in config
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["tokenizer_class"] != "DreamTokenizer"

    reference = golden.DATA / family / "forward.safetensors"
    done = python("-c", PLAIN, target, reference, name, text, cwd=tmp_path, env={"PYTHONPATH": ""})
    named, auto, ids = done.stdout.splitlines()
    assert float(named) < 1e-4 and float(auto) < 1e-4
    assert ids == tokens

    model = dsb.load_model(target, device="cpu")
    assert model.dsb == golden.model(family).dsb
    golden.check_trajectory(functools.partial(dsb.generate, model), family, 0)
    assert dsb.load_tokenizer(target).chat_template == CHAT_TEMPLATE


def test_the_command_takes_what_the_config_does_not_say(tmp_path, capsys):
    source = write_changed(tmp_path / "source", "dream", mask_token_id=..., model_type="qwen2")
    arguments = ["convert", str(source), str(tmp_path / "copy")]
    refused(capsys, *arguments, said="model_type='qwen2'", quiet=False)
    refused(capsys, *arguments, "--family", "dream", said="mask_token_id", quiet=False)
    more = ["--family", "dream", "--mask-id", "511", "--dtype", "bfloat16"]
    assert main(arguments + more) == 0
    model = dsb.load_model(tmp_path / "copy", device="cpu")
    assert model.dtype == torch.bfloat16 and model.dsb.family.name == "dream"


def test_nothing_is_overwritten(tmp_path, capsys):
    """An empty folder is taken, and a source that has no tokenizer."""
    source, target = str(golden.DATA / "llada"), tmp_path / "copy"
    target.mkdir()
    own_file = target / "mine.txt"
    own_file.write_text("mine")
    for taken in (target, own_file):
        refused(capsys, "convert", source, taken, said="expected a new or an empty folder")
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    own_file.unlink()
    assert main(["convert", source, str(target)]) == 0
    assert "no tokenizer in the source" in capsys.readouterr().out


@pytest.mark.parametrize("name", [".", "link"])
def test_an_empty_folder_that_stays_where_it_is(tmp_path, monkeypatch, name):
    """As a mount point does."""
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    monkeypatch.chdir(empty if name == "." else tmp_path)
    assert main(["convert", str(golden.DATA / "llada"), name]) == 0
    names = {file.name for file in empty.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    dsb.load_model(empty, device="cpu")


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("new/copy", ("--max-shard-size", "huge"), "max_shard_size='huge': expected a size such"),
        ("new/copy", ("--max-shard-size", "5"), "max_shard_size='5'"),
        ("new/copy", ("--max-shard-size", "9" * 5000 + "GB"), "expected a size such as '5GB'"),
        ("new/copy", ("--family", "dream"), "config.json has no hidden_size"),
        ("file/copy", (), "expected a folder that can be written"),
        ("copy", ("broken tokenizer",), "no tokenizer that can be read"),
    ],
)
def test_what_can_fail_early_fails_first(tmp_path, capsys, place, options, said):
    """Before the weights are read, with nothing left behind."""
    (tmp_path / "file").write_text("mine")
    source = published(tmp_path / "source", "llada")
    (source / "model.safetensors").write_bytes(b"never read")
    if options == ("broken tokenizer",):
        (source / "tokenizer.json").write_text("{")
        options = ()
    refused(capsys, "convert", source, tmp_path / place, *options, said=said, quiet=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]

"""A setting is one field, a rule one object: both reach every door, and every door has the same
defaults."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from dsb_runtime.config import settings, settings_table
from dsb_runtime.defaults import defaults_for
from dsb_runtime.engine.engine import Engine
from tests import golden
from tests.commands import ROOT, python

IDS = torch.tensor([[2, 10, 20, 30, 3]])  # "w10 w20 w30" in the chat template
PROMPT = "w10 w20 w30"


# --- the table --------------------------------------------------------------------------------


def test_every_field_is_in_the_table():
    names = list(dsb.DecodingConfig.__dataclass_fields__)
    assert [row[0] for row in settings_table()] == list(settings()) == names
    kinds = ("int", "float", "bool", "str", "tuple")
    for name, kind, default, accepted, text in settings_table():
        assert kind in kinds and default and accepted and text, name


# --- defaults ---------------------------------------------------------------------------------


def test_defaults_depend_on_the_length_and_the_model():
    blocks = {1: 1, 3: 1, 16: 4, 60: 15, 127: 31, 128: 32, 129: 32, 1024: 32}
    for length, block in blocks.items():
        assert defaults_for(golden.model("llada"), length).block_length == block
    model = dsb.load_model(golden.DATA / "llada", device="cpu", eos_ids=())
    assert defaults_for(golden.model("llada")) == dsb.DecodingConfig(stop_at_eos=True)
    assert defaults_for(model) == dsb.DecodingConfig()
    assert defaults_for(model, 16, block_length=8).block_length == 8
    model.generation_config.max_new_tokens = 24
    assert defaults_for(model) == dsb.DecodingConfig(gen_length=24, block_length=6)
    with pytest.raises(TypeError, match="blok_length=8: expected one of gen_length, block_length"):
        defaults_for(model, blok_length=8)


@pytest.mark.parametrize("lengths", [{}, {"gen_length": 20}])
def test_five_doors_decode_the_same(chat, capsys, monkeypatch, lengths):
    """The same tokens, forwards and stop at the EOS, whoever calls."""
    pytest.importorskip("lm_eval", reason="needs the extra: pip install .[eval]")
    from lm_eval.api.instance import Instance

    from dsb_runtime.doors.lm_eval import DSBLM

    def seen(out: Any) -> tuple[Any, ...]:
        return out.sequences[0, IDS.shape[1] :].tolist(), out.nfe, out.row_tokens

    model = dsb.load_model(chat, device="cpu")
    free = seen(dsb.generate(model, IDS, **lengths))[0]
    # A token that the model does produce, and not at once, ends the answer.
    eos = next(token for i, token in enumerate(free) if i > 2 and token not in free[:i])
    model = dsb.load_model(chat, device="cpu", eos_ids=(eos,))
    expected = seen(dsb.generate(model, IDS, **lengths))
    assert 3 < expected[2][0] < len(expected[0]) == lengths.get("gen_length", 256)
    assert set(expected[0][expected[2][0] :]) == {eos}, "the row must stop at its EOS"

    assert seen(Engine(model).generate(IDS, **lengths)) == expected
    length = {"max_new_tokens": 20} if lengths else {}
    out = model.generate(
        IDS, custom_generate=dsb.custom_generate, return_dict_in_generate=True, **length
    )
    assert seen(out) == expected
    patched = dsb.patch(dsb.load_model(chat, device="cpu"), eos_ids=(eos,))
    assert seen(patched.dsb_generate(IDS, **lengths)) == expected

    for door in ("cli.main", "doors.lm_eval"):
        monkeypatch.setattr(f"dsb_runtime.{door}.load_model", lambda *a, **how: model)
    options = ["--gen-length", "20"] if lengths else []
    assert main(["generate", PROMPT, "--model", str(chat), "--json", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["response_ids"], printed["forwards"], [printed["tokens"]]) == expected

    lm = DSBLM(str(chat), **lengths)
    text = lm.apply_chat_template([{"role": "user", "content": PROMPT}])
    request = Instance("generate_until", {}, (text, {}), 0, metadata=("task", 0, 1))
    (answer,) = lm.generate_until([request], disable_tqdm=True)
    assert answer.split() == printed["answer"].split()[:-1], "the harness leaves the EOS out"
    assert (lm.totals["forwards"], [lm.totals["tokens"]]) == expected[1:]


# --- a rule and a field of somebody else -------------------------------------------------------


def insert(path: Path, before: str, text: str) -> None:
    """Put `text` before the one line that starts with `before`."""
    source = path.read_text()
    assert len(re.findall(rf"^{re.escape(before)}", source, re.M)) == 1, before
    path.write_text(re.sub(rf"^(?={re.escape(before)})", lambda _: text, source, flags=re.M))


FIELD = '    shade: str = setting("light", "of nothing", kind=str, choices=("light", "dark"))\n\n'
EVERY_DOOR = """
import json, sys
import torch
from lm_eval.api.instance import Instance
import dsb_runtime as dsb
from dsb_runtime.cli.main import main
from dsb_runtime.doors.lm_eval import DSBLM
from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.lane import Lane

folder, ids = sys.argv[1], torch.tensor([[2, 10, 20, 30, 3]])
model, seen, decode = dsb.load_model(folder, device="cpu"), [], Engine.decode

def record(self, call, config, *rest):
    out = decode(self, call, config, *rest)
    seen.append((config.rule, config.rule_value, config.shade, out.tokens_per_forward))
    return out

Engine.decode = record
answer = Lane.output

def record_request(self, row, request):
    out, config = answer(self, row, request), request.config
    seen.append((config.rule, config.rule_value, config.shade, out.tokens_per_forward))
    return out

Lane.output = record_request
named = {"gen_length": 8, "two": 2.0, "shade": "dark"}
dsb.generate(model, ids, **named)
Engine(model).generate(ids, dsb.DecodingConfig(block_length=2, stop_at_eos=True, **named))
model.generate(ids, custom_generate=dsb.custom_generate, max_new_tokens=8, two=2.0, shade="dark")
options = ["--gen-length", "8", "--two", "2", "--shade", "dark"]
assert main(["generate", "w10 w20 w30", "--model", folder, *options]) == 0
lm = DSBLM(folder, device="cpu", gen_length=8, threshold=0.5, shade="dark")
asked = ("w2 w10 w20 w30 w3", {"two": 2.0})
request = Instance("generate_until", {}, asked, 0, metadata=("task", 0, 1))
lm.generate_until([request], disable_tqdm=True)
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.measure.evaluate import build_settings
assert any(config.two == 5.0 for config in build_settings(TASKS["words"]))
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """The packages with the rule `two`, by CONTRIBUTING's recipe, and a made-up field, `shade`."""
    folder = tmp_path_factory.mktemp("changed")
    for name in ("dsb_kernels", "dsb_runtime"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    recipe = (ROOT / "CONTRIBUTING.md").read_text().split("## To add a selection rule")[1]
    count, entry, branch = re.findall(r"^```python\n# [^\n]*\n(.*?)^```", recipe, re.M | re.S)[:3]
    insert(folder / "dsb_kernels/rules.py", "RULES: dict", f"{count}\n\n")
    insert(folder / "dsb_kernels/rules.py", "    )\n}", entry)
    insert(folder / "dsb_kernels/commit_kernel.py", '    elif RULE == "factor":', branch)
    insert(folder / "dsb_runtime/config.py", "    def __post_init__(self)", FIELD)
    return folder


def test_a_made_up_rule_and_field_reach_every_door(changed, chat):
    pytest.importorskip("lm_eval", reason="needs the extra: pip install .[eval]")
    done = python("-c", EVERY_DOOR, chat, cwd=changed, env={"PYTHONPATH": str(changed)})
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(seen) == 5
    for rule, value, shade, committed in seen:
        assert (rule, value, shade) == ("two", 2.0, "dark")
        assert committed[0] <= 2 and sum(committed) == 8 and max(committed) == 2


@pytest.mark.slow
def test_the_recipe_for_a_rule(changed, chat):
    """What CONTRIBUTING says, to the letter: two tokens are committed by each step of kernels."""
    options = ["--gen-length", "4", "--block-length", "4", "--two", "2", "--json"]
    env = {"PYTHONPATH": str(changed), "DSB_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    command = ("-m", "dsb_runtime", "generate", PROMPT, "--model", chat)
    done = python(*command, *options, cwd=changed, env=env)
    assert json.loads(done.stdout)["committed_per_forward"] == [2, 2]

"""Every file of examples/ runs offline, in a process of its own, and prints what it is about."""

from __future__ import annotations

import ast
import re

import pytest

from tests.commands import ROOT, python

EXAMPLES = ROOT / "examples"

# What the output says, as regular expressions.
EXPECTED = {
    "generate.py": [r"Monday 12 \+ 7 = 19\. Tuesday 19 - 5 = 14\. Answer 14\.",
                    r"[2-9] forwards for \d+ tokens"],
    "stream.py": [r"forward  0 \(refresh\): .*__", r"\(window\): .*Answer 45 \.", r"\d+ forwards"],
    "rollout.py": [r"round 0: [1-7] of 8 right, ratio within 0\.00\d\d of 1",
                   r"round 1: [1-7] of 8 right, ratio within 0\.00\d\d of 1"],
    "infill.py": [r"Monday 39 - 1 = 38\. Tuesday 38 / 2 = 19\. Answer 19\.",
                  r"\d forwards for 13 masks"],
    "batch.py": [r"Answer 23\. \(\d+ tokens, \d+ forwards\)",
                 r"Answer 20\. \(\d+ tokens, \d+ forwards\)"],
    "many_prompts.py": [r"\d: .*Answer \d+\. \(\d+ forwards\)", r"Answer \d+.*\| \d+ tokens"],
    "openai_client.py": [r"Monday 20 \+ 3 = 23\. Answer 23\.", r"\d+ tokens, \d+ forwards",
                         r"Monday.*\|.*23\."],
    "transformers_generate.py": [r"Monday 8 \* 2 = 16\. Answer 16\.", r"\d+ forwards"],
    "attention_implementation.py": [r"transformers' own attention: (0\.0e\+00|\d\.\de-0[6-9])"],
    "window_attention.py": [r"difference from SDPA: (0\.0e\+00|\d\.\de-0[6-9])"],
}  # fmt: skip


@pytest.mark.parametrize("name", [path.name for path in EXAMPLES.glob("*.py")])
def test_example(name):
    """It prints what it is about, is short, and says how to run it."""
    output = python(EXAMPLES / name).stdout
    for pattern in EXPECTED[name]:
        assert re.search(pattern, output), output
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45
    assert f"python examples/{name}" in ast.get_docstring(ast.parse(text))


def test_readme_code_runs_with_the_embedded_model(tmp_path):
    """The README's Python, with the embedded model in the place of the hub's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert code.count('"GSAI-ML/LLaDA-8B-Instruct"') == 1
    code = code.replace(
        '"GSAI-ML/LLaDA-8B-Instruct"', "str(__import__('dsb_runtime.demo').demo.MODEL_DIR)"
    )
    script = tmp_path / "readme.py"
    script.write_text(code, encoding="utf-8")
    assert re.search(r"\d+ forwards for \d+ tokens", python(script).stdout)

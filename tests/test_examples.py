"""Every file of examples/ runs offline and prints what it is about."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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


# One process for all, since importing torch and transformers takes longer than any of them.
RUN = """
import runpy, sys
for path in sys.argv[1:]:
    print("--- " + path)
    runpy.run_path(path, run_name="__main__")
"""


def test_every_example_and_the_readmes_code(tmp_path):
    """An example prints what it is about. The README's Python runs with the embedded model in the
    place of the hub's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert code.count('"GSAI-ML/LLaDA-8B-Instruct"') == 1
    script = tmp_path / "readme.py"
    model_dir = "str(__import__('dsb_runtime.demo').demo.MODEL_DIR)"
    script.write_text(code.replace('"GSAI-ML/LLaDA-8B-Instruct"', model_dir), encoding="utf-8")
    examples = sorted(path for path in EXAMPLES.glob("*.py"))
    assert [path.name for path in examples] == sorted(EXPECTED)
    expected = {**EXPECTED, "readme.py": [r"\d+ forwards for \d+ tokens"]}
    output = python("-c", RUN, *examples, script).stdout
    parts = re.split("^--- (.*)$", output, flags=re.MULTILINE)
    printed = {Path(path).name: text for path, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert printed.keys() == expected.keys()
    for name, patterns in expected.items():
        for pattern in patterns:
            assert re.search(pattern, printed[name]), (name, printed[name])


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 45
    assert f"python examples/{name}" in ast.get_docstring(ast.parse(text))

"""The documents say what is there: links, names, messages, generated parts, the strict build."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsb_runtime import DecodingConfig
from tools.docs import hooks

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    missing = [
        link for link in LINK.findall(page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]  # fmt: skip
    assert missing == []


def test_the_first_pages_are_short_and_the_first_link_is_the_method():
    for name, longest in (("README.md", 150), ("CONTRIBUTING.md", 160)):
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= longest
    assert LINK.findall((ROOT / "README.md").read_text("utf-8"))[0] == "dsb_kernels/method.py"


def test_settings_table_has_every_field():
    rows = re.findall(r"^\| `(\w+)` \|", hooks.settings(), re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in dataclasses.fields(DecodingConfig))


def test_every_op_has_an_api_entry_with_a_docstring():
    names = hooks.op_names()
    assert {name.rpartition(".")[2] for name in names} >= {
        "linear_add_norm", "lm_head_confidence", "place_rows", "rope_write_kv", "token_confidence",
        "unmask_and_slide", "window_attention", "window_linear",
    }  # fmt: skip
    for name in names:
        module, _, op = name.rpartition(".")
        definition = getattr(importlib.import_module(module), op).definition
        assert definition.__name__ == f"{op}_reference"
        assert "Returns:" in definition.__doc__ or "Raises:" in definition.__doc__, name


def test_every_module_says_what_it_is():
    folders = re.findall(r"<!-- modules: (\S+) -->", (ROOT / "docs/design.md").read_text("utf-8"))
    empty = {
        folder: re.findall(r"^\| `(\S+)` \|  \|$", hooks.modules(folder), re.MULTILINE)
        for folder in folders
    }
    assert not any(empty.values()), empty


def messages() -> list[str]:
    """Every string of the packages' code, what is filled in written as '...'."""
    texts = []
    for path in [*ROOT.glob("dsb_kernels/**/*.py"), *ROOT.glob("dsb_runtime/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "..." for p in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def test_troubleshooting_names_messages_that_exist():
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(rows) >= 8
    texts = messages()
    for row in rows:
        pattern = ".*".join(re.escape(part) for part in row.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), row


def test_commands_that_the_papers_name_exist():
    """`python -m X` of every page is a module, `make X` a target, and `dsb X` a command."""
    text = "\n".join(
        page.read_text(encoding="utf-8") for page in PAGES if "CHANGE" not in page.name
    )
    modules = set(re.findall(r"python -m ((?:dsb|benchmarks|tools)[\w.]*)", text))
    assert modules
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"`?make ([a-z][\w-]+)\b(?=[`\s]|$)(?= +#|`)", text)) <= set(targets)
    commands = set(re.findall(r"(?:^|`)dsb (\w+)", text, re.MULTILINE))
    assert commands <= {"generate", "bench", "profile", "eval", "convert"}


def test_files_that_the_papers_name_exist():
    folders = "tests|tools|benchmarks|dsb_kernels|dsb_runtime|examples|docs"
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        if "CHANGE" not in page.name
        for name in re.findall(rf"`((?:{folders})/[\w./]+)`", page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra: docs")
def test_site_builds_strictly(tmp_path):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    method = (tmp_path / "method.html").read_text(encoding="utf-8")
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert "first_masked" in method
    for name in hooks.op_names():
        assert f'id="{name}"' in api
    assert "silu(gate)" in api  # the definition's docstring under the op's name
    pages = "".join(page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html"))
    # Nothing that a browser would load from another host.
    assert not re.findall(
        r'<(?:script|img|link)[^>]*(?:src|href)="https?://[^"]*\.(?:js|css|png)', pages
    )

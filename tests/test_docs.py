"""The documents say what is there: links, names, messages, generated parts, the strict build."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import re

import pytest

from dsb_runtime.cli import main as cli
from tests.commands import ROOT, python
from tools.docs import hooks

PAGES = [page for folder in (".", "docs", "benchmarks") for page in (ROOT / folder).glob("*.md")]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
# What is said today: a changelog names what was.
TODAY = "\n".join(text for page, text in TEXTS.items() if page.name != "CHANGELOG.md")
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    links = LINK.findall(TEXTS[page])
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_first_pages_lead_to_every_page():
    """The README leaves out what stands on the pages that it names."""
    nav = set(re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    start, readme = (TEXTS[ROOT / page] for page in ("docs/index.md", "README.md"))
    assert nav - {"index.md"} == {link for link in LINK.findall(start) if link in nav}
    named = {name.removeprefix("docs/").lower() for name in LINK.findall(readme)}
    assert nav - named == {"index.md", "settings.md", "api.md", "scores.md", "measurements.md"}


def test_the_first_pages_are_short_and_the_first_link_is_the_method():
    for name, longest in (("README.md", 150), ("CONTRIBUTING.md", 160)):
        assert len(TEXTS[ROOT / name].splitlines()) <= longest
    assert LINK.findall(TEXTS[ROOT / "README.md"])[0] == "dsb_kernels/method.py"


def test_every_op_has_an_api_entry_with_a_docstring():
    names = hooks.op_names()
    assert len(names) >= 8
    for name in names:
        module, _, op = name.rpartition(".")
        definition = getattr(importlib.import_module(module), op).definition
        assert definition.__name__ == f"{op}_reference"
        assert "Returns:" in definition.__doc__ or "Raises:" in definition.__doc__, name


def test_every_module_says_what_it_is():
    for folder in re.findall(r"<!-- modules: (\S+) -->", TEXTS[ROOT / "docs/design.md"]):
        assert not re.findall(r"^\| `(\S+)` \|  \|$", hooks.modules(folder), re.MULTILINE)


def test_the_times_of_a_step_are_those_of_the_kept_file():
    runs = json.loads((ROOT / "benchmarks/decode_60m.json").read_text())["runs"]
    kinds = runs[0]["seconds"]
    ms = {kind: [f"{1000 * run['seconds'][kind]:.0f}" for run in runs] for kind in kinds}
    others = [kind for kind in kinds if kind != "ours"]
    ratio = {kind: [f"{run[f'ours_over_{kind}']:.2f}" for run in runs] for kind in others}
    readme, results = (TEXTS[ROOT / page] for page in ("README.md", "docs/results.md"))
    for name, values in (
        ("this package", ms["ours"]), ("plain eager loop (`benchmarks/eager.py`)", ms["eager"]),
        ("ratio, median of five rounds", ratio["eager"]),
    ):  # fmt: skip
        assert f"| {name} | {' | '.join(values)} |" in readme
    for kind in ratio:
        cells = itertools.chain.from_iterable(zip(ms[kind], ratio[kind], strict=True))
        assert f" | {' | '.join(cells)} |\n" in results


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
    page = TEXTS[ROOT / "docs/troubleshooting.md"]
    rows = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(rows) >= 8
    texts = messages()
    for row in rows:
        pattern = ".*".join(re.escape(part) for part in row.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), row


def test_commands_and_files_that_the_papers_name_exist():
    """`python -m X` is a module, `make X` a target, `dsb X` a command, and `tests/X` a file."""
    modules = set(re.findall(r"python -m ((?:dsb|benchmarks|tools)[\w.]*)", TODAY))
    assert modules
    assert [name for name in sorted(modules) if importlib.util.find_spec(name) is None] == []
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(re.findall(r"`?make ([a-z][\w-]+)\b(?=[`\s]|$)(?= +#|`)", TODAY)) <= set(targets)
    commands = set(re.findall(r"(?:^|`)dsb (\w+)", TODAY, re.MULTILINE))
    assert commands <= {"generate", "batch", "serve", "bench", "profile", "eval", "convert"}
    folders = "tests|tools|benchmarks|dsb_kernels|dsb_runtime|examples|docs"
    files = set(re.findall(rf"`((?:{folders})/[\w./]+)`", TODAY))
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_tables_are_what_their_commands_print(capsys, monkeypatch):
    """Above a table of figures stands the command that prints it."""
    monkeypatch.chdir(ROOT)
    text = "\n".join(TEXTS[ROOT / "docs" / name] for name in ("results.md", "method.md"))
    tables = re.findall(r"^<!-- table: (.+) -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(tables) == text.count("<!-- table:") > 8
    for command, table in tables:
        name, *words = command.removeprefix("python -m ").split()
        main = cli.main if name == "dsb" else importlib.import_module(name).main
        assert not main(words)
        assert capsys.readouterr().out == table, command


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="needs the extra: docs")
def test_site_builds_strictly(tmp_path):
    python(
        "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path,
        env={"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    pages = {page.name: page.read_text(encoding="utf-8") for page in tmp_path.glob("*.html")}
    assert "first_masked" in pages["method.html"]
    for name in hooks.op_names():
        assert f'id="{name}"' in pages["api.html"]
    assert pages["scores.html"].count("<td>threshold 0.9</td>") > 20  # lines of both tasks
    assert "silu(gate)" in pages["api.html"]  # the definition's docstring under the op's name
    loaded = r'<(?:script|img|link)[^>]*(?:src|href)="https?://[^"]*\.(?:js|css|png)'
    assert not re.findall(loaded, "".join(pages.values())), "a browser would ask another host"

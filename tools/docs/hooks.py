"""Hooks of `mkdocs build` that make parts of the docs from the code, so that none goes stale.

A page names such a part by a comment on a line of its own:
    <!-- settings -->       the table of every field of `DecodingConfig`
    <!-- ops -->            an API entry for every op of `dsb_kernels`
    <!-- modules: FOLDER -->   a table of the folder's modules and the first sentence of each
    <!-- file: NAME -->     a Markdown file of the repository's root, without its title
    <!-- scores: NAME -->   the table of a file that `dsb eval --json` wrote
"""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKER = re.compile(
    r"^<!-- (?P<part>settings|ops|modules|file|scores)(: (?P<name>\S+))? -->$", re.MULTILINE
)


def settings() -> str:
    """The settings as a Markdown table with a line for each field."""
    from dsb_runtime.config import settings_table
    from dsb_runtime.measure.command import markdown_table

    columns = ("setting", "type", "default", "accepted", "what it does")
    lines = ([f"`{name}`", *map(str, cells)] for name, *cells in settings_table())
    return markdown_table(dict.fromkeys(columns, "left"), lines)


def op_names() -> list[str]:
    """The dotted names of all ops of `dsb_kernels`, in the order of their names."""
    import dsb_kernels

    names = {}
    for info in pkgutil.iter_modules(dsb_kernels.__path__, "dsb_kernels."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            definition = getattr(value, "definition", None)
            if callable(definition) and definition.__module__ == module.__name__:
                names[name] = f"{module.__name__}.{name}"
    return [names[name] for name in sorted(names)]


def ops() -> str:
    return "\n\n".join(f"::: {name}" for name in op_names())


def first_sentence(docstring: str) -> str:
    """The first sentence of a module's docstring, on one line."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[A-Z`])", paragraph)[0].rstrip(":")


def modules(folder: str) -> str:
    """A Markdown table of a folder's modules and of what each says about itself."""
    from dsb_runtime.measure.command import markdown_table

    lines = []
    for path in sorted((ROOT / folder).glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path.name not in ("__init__.py", "__main__.py"):
            lines.append([f"`{path.name}`", first_sentence(docstring)])
    return markdown_table({"file": "left", "what it is": "left"}, lines)


def root_file(name: str) -> str:
    """A file of the root, in which links into docs/ become links between pages."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\A# .*\n", "", text)
    text = text.replace("](docs/", "](")
    return text.replace("](CHANGELOG.md)", "](changelog.md)")


def scores(name: str) -> str:
    """The scores of a file of the repository, the schedules side by side."""
    from dsb_runtime.measure.scores import Record

    return Record.of(json.loads((ROOT / name).read_text(encoding="utf-8"))).markdown()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' event: fill in the marked parts of a page."""

    def part(match: re.Match[str]) -> str:
        kind, name = match["part"], match["name"]
        if kind == "settings":
            return settings()
        if kind == "ops":
            return ops()
        return {"modules": modules, "file": root_file, "scores": scores}[kind](name)

    return MARKER.sub(part, markdown)

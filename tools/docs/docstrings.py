"""A Griffe extension that shows the API reference docstrings which stand elsewhere in the code.

For Griffe `window_linear = op(window_linear_reference, ...)` is an assignment without parameters or
docstring. The definition has both, so that the definition is shown under the op's name.

"Returns:" of a docstring says what is returned, and the annotation says its type. Griffe would take
the text before a colon for the type, so that the annotation is written there.

A dataclass explains a field by the comment behind it, which is shown as the field's docstring.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        for name, member in list(mod.members.items()):
            definition = mod.members.get(f"{name}_reference")
            if isinstance(member, griffe.Attribute) and isinstance(definition, griffe.Function):
                shown = copy.copy(definition)
                shown.name = name
                mod.members[name] = shown

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring and func.returns is not None:
            func.docstring.value = re.sub(
                r"^ *Returns:\n +(?=\S)", lambda m: m[0] + f"{func.returns}: ",
                func.docstring.value, count=1, flags=re.MULTILINE,
            )  # fmt: skip

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        for member in cls.members.values():
            if isinstance(member, griffe.Attribute) and member.docstring is None:
                _, mark, comment = member.source.splitlines()[-1].partition("  # ")
                if mark and not comment.startswith(("type:", "noqa", "fmt:")):
                    member.docstring = griffe.Docstring(comment, parent=member)

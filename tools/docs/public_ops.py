"""A Griffe extension: an op's API entry is the entry of its definition.

`window_linear = op(window_linear_reference, ...)` is an assignment to Griffe, without parameters or
docstring. Both stand on the definition, so the extension shows that function under the op's name.
"""

from __future__ import annotations

import copy
from typing import Any

import griffe


class PublicOps(griffe.Extension):
    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        for name, member in list(mod.members.items()):
            definition = mod.members.get(f"{name}_reference")
            if isinstance(member, griffe.Attribute) and isinstance(definition, griffe.Function):
                shown = copy.copy(definition)
                shown.name = name
                mod.members[name] = shown

"""Tells lm-evaluation-harness 0.4.13 of the model `dsb`.

Later releases find it by the entry point `lm_eval.models`. 0.4.13 knows its own models only, and
imports nothing that a user could name; but it imports torch before it looks a model up, and torch
ends its import with the entry points `torch.backends`. Hence this file, on its own at the top:
torch's import then reads it and nothing else of this package.
"""

import sys


def register() -> None:
    """Put `dsb` on the harness's list, by name. In a process without that release: nothing."""
    harness = sys.modules.get("lm_eval")
    if getattr(harness, "__version__", None) != "0.4.13":
        return
    import lm_eval.models  # noqa: F401 - its own list, which it fills only while that is empty
    from lm_eval.api.registry import model_registry

    if "dsb" not in model_registry:
        model_registry.register("dsb", target="dsb_runtime.doors.lm_eval:DSBLM")

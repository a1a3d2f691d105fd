"""What a CUDA graph does, on a CPU: record the operators of a step once, replay them on the same
memory.

A recording runs the step for real and then puts back everything that it wrote, so that, as with a
graph, capturing computes nothing. A replay calls the same operators on the same tensors and puts
each result where the recorded one was. Whatever the host decided while recording stays decided: a
step that looked at a value would replay the wrong thing, or fail on `host_reads`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsb_kernels.rope_kv import rope_write_kv

Call = tuple[Any, tuple, dict, Any]  # an operator, its arguments and its result
HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")


def is_view(func: Any) -> bool:
    """Whether an operator only says how memory is seen."""
    return func.is_view or func is torch.ops.aten._unsafe_view.default


def written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call of an operator writes in place."""
    tensors = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return tensors


class Recording(TorchDispatchMode):
    """Every operator called inside, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.backups: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> (what was written, before)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.backups:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self.backups[storage.data_ptr()] = (whole, whole.clone())
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for whole, before in self.backups.values():
            whole.copy_(before)

    @property
    def names(self) -> list[str]:
        return [func._schema.name.replace("::", ".") for func, *_ in self.calls]

    def host_reads(self) -> list[str]:
        return [n for n in self.names if n.split(".")[-1] in HOST_READS]

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if not isinstance(old, Tensor) or old is new:
                    continue
                assert old.shape == new.shape, "shapes must not depend on data"
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)  # a view or an in-place result is in its place already


class Recorder:
    """A capture (`dsb_runtime.engine.graphs.Capture`) that keeps its recordings for inspection."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # This definition reads windows on the host, so it is recorded as one operator.
        whole = torch.ops.dsb.rope_write_kv_definition
        with mock.patch.object(rope_write_kv, "definition", whole), Recording() as recording:
            run()
        recording.undo()
        assert not recording.host_reads()
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                recording.replay()

        return replay

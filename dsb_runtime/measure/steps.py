"""The work of each step of a decoding, its time, and the least time that it can take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from dsb_runtime.engine.engine import Engine
from dsb_runtime.engine.output import StepEvent
from dsb_runtime.families import check_model
from dsb_runtime.measure.timing import Marks


class TimedEngine(Engine):
    """An engine that times every step that it launches. On a GPU it records events before and after
    the step's kernels; on a CPU it reads the clock."""

    def __init__(self, model: PreTrainedModel, **settings: Any) -> None:
        super().__init__(model, observer=self.time_launch, **settings)
        self.marks = Marks(model.device)
        self.launches: list[tuple[str, Any, Any]] = []
        self.spins = False

    @contextlib.contextmanager
    def without_host_time(self) -> Iterator[None]:
        """Inside, a GPU spins before each step while the host submits it. Where the GPU waits for
        the step, the first event would otherwise pass before the host has launched anything: 30 to
        50 us of a step of 5 ms (an estimate). The spinning makes a whole decoding slower."""
        self.spins = True
        try:
            yield
        finally:
            self.spins = False

    @contextlib.contextmanager
    def time_launch(self, kind: str) -> Iterator[None]:
        if self.spins:
            self.marks.spin()
        start = self.marks.now()
        yield
        self.launches.append((kind, start, self.marks.now()))

    def take(self) -> list[tuple[str, float]]:
        """The kind and the seconds of each step that was launched since the last call of this."""
        launches, self.launches = self.launches, []
        seconds = self.marks.seconds([(start, end) for _, start, end in launches])
        return [(kind, took) for (kind, _, _), took in zip(launches, seconds, strict=True)]


@dataclass(frozen=True)
class StepWork:
    """What one forward has to compute for all batch rows together."""

    kind: str  # "window", "response" (the prompt's K/V stay) or "refresh" (every position)
    batch: int  # batch rows that took part
    num_tokens: int  # positions that go through the layers
    scored: int  # positions that go through the LM head
    widest: int  # positions of the batch row that has the most


class StepRecorder:
    """An `on_step` callback that notes the work of every forward. An accepted draft is work of the
    forward that it ran in; a draft that was dropped is not seen."""

    def __init__(self, model: PreTrainedModel, prompt_length: int, gen_length: int) -> None:
        # Where a token is predicted from the position before it, a forward of the response needs
        # the prompt's last position.
        shift = int(check_model(model).family.shift)
        self.whole = {"refresh": prompt_length + gen_length, "response": gen_length + shift}
        self.steps: list[StepWork] = []

    def __call__(self, event: StepEvent) -> None:
        widths = [
            self.whole.get(event.kind, end - start + prefix) for start, end, prefix in event.before
        ]
        scored = int((event.position[event.rows] >= 0).sum())
        step = StepWork(event.kind, len(widths), sum(widths), scored, max(widths))
        if event.draft:
            first = self.steps.pop()
            step = replace(
                first, num_tokens=first.num_tokens + step.num_tokens, scored=first.scored + scored,
                widest=max(first.widest, step.widest),
            )  # fmt: skip
        self.steps.append(step)

    @property
    def kinds(self) -> list[str]:
        return [step.kind for step in self.steps]


class LinearLayers:
    """The linear layers of steps of at most `most_tokens`, with nothing between them, which are a
    step's limit. What follows the last layer's keys and values is needed at the scored positions
    alone, so that those weights are multiplied with the scored positions alone."""

    def __init__(self, model: PreTrainedModel, most_tokens: int) -> None:
        self.full: list[Tensor] = []  # weights that are multiplied with all positions of a step
        self.late: list[Tensor] = [model.lm_head.weight]  # with the scored positions alone
        last = len(model.model.layers) - 1
        for index, layer in enumerate(model.model.layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    late = index == last and not {"k_proj", "v_proj"} & set(name.split("."))
                    (self.late if late else self.full).append(module.weight)
        weights = self.full + self.late
        self.bytes = sum(w.numel() * w.element_size() for w in weights)
        self.inputs = {  # an adapter's layers may have a dtype of their own
            (width, dtype): torch.randn(most_tokens, width, device=model.device).to(dtype)
            for width, dtype in {(w.shape[1], w.dtype) for w in weights}
        }

    @torch.no_grad()
    def run(self, num_tokens: int, scored: int) -> None:
        """Compute the products of one step."""
        for weights, count in ((self.full, num_tokens), (self.late, scored)):
            for weight in weights:
                linear(self.inputs[weight.shape[1], weight.dtype][:count], weight)

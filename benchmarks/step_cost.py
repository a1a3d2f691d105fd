"""Bytes and FLOPs that a decoding step needs, phase by phase, from the shapes alone.

The counts are for the cheapest step that computes the same. It reads every weight once, and a phase
reads its inputs and writes its outputs once. Q, K and V are one product. Gate and up are one
product too, which ends with SiLU · mul. A residual is added where the next norm reads it. The last
layer computes what follows K and V for the scored positions alone (`engine/forward.py`). FLOPs are
those of the matrix products, two for each multiplication.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from dsb_runtime.families import DREAM
from dsb_runtime.measure.models import Preset

LAYER_PHASES = ("norm", "qkv", "rope+write", "attention", "out", "mlp")
PHASES = ("place", "embed", *LAYER_PHASES, "final norm", "score", "unmask")
OUTSIDE = "outside"  # what a step launches outside of its phases, in measurements
FLOAT32, INT32, INT64 = 4, 4, 8


@dataclass(frozen=True)
class StepSize:
    """One step of `batch` rows. `num_tokens` positions go through the layers and `scored` are
    scored, in all batch rows together; each attends to `length` positions, the last `gen` of which
    are the response."""

    batch: int
    num_tokens: int
    scored: int
    length: int
    gen: int
    itemsize: int  # bytes of a weight or an activation


@dataclass(frozen=True)
class Cost:
    """Bytes by kind, and FLOPs."""

    weights: int = 0
    cache: int = 0  # K/V as attention reads them
    activations: int = 0  # what phases pass on, tokens and tables
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.weights + self.cache + self.activations

    def seconds(self, bandwidth: float, flops_per_second: float) -> float:
        """The floor: the slower of moving the bytes and multiplying."""
        return max(self.bytes / bandwidth, self.flops / flops_per_second)


def total(costs: Iterable[Cost]) -> Cost:
    return Cost(*map(sum, zip(*map(astuple, costs), strict=True)))


def layer_cost(preset: Preset, size: StepSize, layer: int) -> dict[str, Cost]:
    """Each phase of one layer, by its name in LAYER_PHASES."""
    E, D, F, b = preset.hidden, preset.head_dim, preset.mlp, size.itemsize
    q, kv = preset.heads * D, 2 * preset.kv_heads * D  # a token's queries; its keys and values
    N = size.num_tokens
    M = size.scored if layer == preset.layers - 1 else N  # tokens of all that follows K and V
    bias = q + kv if preset.family is DREAM else 0
    # The first norm reads the residual and what the layer before added to it, and writes both
    # their sum and its norm; the first layer has nothing to add.
    first_norm = (2 if layer == 0 else 4) * N * E
    positions = size.batch * size.length
    return {
        "norm": Cost(2 * E * b, 0, (first_norm + 4 * M * E) * b),
        "qkv": Cost(
            ((q + kv) * E + bias) * b, 0, (N * E + M * q + N * kv) * b, 2 * E * (M * q + N * kv)
        ),
        "rope+write": Cost(0, 0, 2 * (M * q + N * kv) * b + N * D * FLOAT32),
        "attention": Cost(0, positions * kv * b, 2 * M * q * b, 4 * M * q * size.length),
        "out": Cost(q * E * b, 0, M * (q + E) * b, 2 * M * q * E),
        "mlp": Cost(3 * E * F * b, 0, 2 * M * (E + F) * b, 6 * M * E * F),
    }


def step_cost(preset: Preset, size: StepSize) -> dict[str, list[Cost]]:
    """Each phase of a step, by its name in PHASES: one cost, or one for each layer."""
    E, V, b, K = preset.hidden, preset.vocab, size.itemsize, size.scored
    layers = [layer_cost(preset, size, layer) for layer in range(preset.layers)]
    return {
        # Tokens of the windows; candidates come as positions, go as indices, flags and noise ids.
        "place": [Cost(0, 0, size.num_tokens * 2 * INT64 + K * (INT32 + 2 * INT64 + 1))],
        "embed": [Cost(0, 0, size.num_tokens * (INT64 + 2 * E * b))],
        **{name: [layer[name] for layer in layers] for name in LAYER_PHASES},
        "final norm": [Cost(E * b, 0, 3 * K * E * b)],
        "score": [Cost(V * E * b, 0, K * (E * b + INT64 + FLOAT32), 2 * K * E * V)],
        # The response is searched for masks; candidates come and go as positions, come as tokens
        # and confidences, and are written into the canvas.
        "unmask": [
            Cost(0, 0, size.batch * size.gen * INT64 + K * (2 * INT64 + FLOAT32 + 2 * INT32))
        ],
    }


def total_cost(preset: Preset, size: StepSize) -> Cost:
    """What a whole step costs: the sum over its phases."""
    return total(cost for phase in step_cost(preset, size).values() for cost in phase)


def weight_bytes(preset: Preset, itemsize: int) -> int:
    """Bytes of all weights: those that a step streams, and the embedding, of which a step reads few
    vectors. Where embedding and LM head are one tensor, it counts once."""
    size = StepSize(1, 1, 1, 1, 1, itemsize)
    streamed = total_cost(preset, size).weights
    return streamed + (0 if preset.tied else preset.vocab * preset.hidden * itemsize)

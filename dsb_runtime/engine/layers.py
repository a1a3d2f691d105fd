"""A decoder layer as the engine runs it: what comes before attention and what follows it.

`PackedLayer` computes q, k, v as one op and gate, up with their SiLU as another; the op that
projects back to the hidden size adds the residual and computes the next norm. It serves plain
linear layers. A model whose layers are anything else (DTensors of tensor parallelism, quantised or
adapted linear layers, hooks) runs module by module in `ModuleLayer`. In both, `finish` and `mlp`
return the residual and its next norm, or None where that norm is still to be computed.

Shapes: N tokens of all rows, E hidden size, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from dsb_kernels.linear import linear_add_norm, window_linear
from dsb_runtime.engine.packing import packed_linear

# Norms that F.rms_norm computes from `weight` and `variance_epsilon`.
RMS_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

Module = Any  # a module of transformers, of whose attributes nn.Module says nothing
Norm = Callable[[Tensor], Tensor]
Normed = tuple[Tensor, Tensor | None]  # the residual, and its norm where it is computed


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm as one call, with its weight and epsilon."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_of(module: Module) -> Norm:
    """A norm as one call where it is RMSNorm, the module itself otherwise."""
    if type(module).__name__ not in RMS_NORMS or not is_plain(module):
        return module
    return RmsNorm(module.weight.data, module.variance_epsilon)


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module does no more than its class's forward on ordinary tensors, laid out
    as ours are read."""
    replaced = "forward" in vars(module)
    return not (module._forward_hooks or module._forward_pre_hooks or replaced) and all(
        type(p) is nn.Parameter and p.is_floating_point() and p.is_contiguous()
        for p in module.parameters()
    )


def can_pack(layer: Module) -> bool:
    """Whether `PackedLayer` computes what the layer's modules would."""
    attn, mlp = layer.self_attn, layer.mlp
    linears: list[Module] = [getattr(attn, name, None) for name in PROJECTIONS]
    linears += [getattr(mlp, name, None) for name in MLP]
    if any(type(linear) is not nn.Linear for linear in linears):
        return False
    o_proj, gate, up, down = linears[3:]
    biases = {linear.bias is None for linear in linears[:3]}
    return (
        all(is_plain(m) for m in (layer, attn, mlp, *linears))
        and len({(p.weight.dtype, p.weight.device) for p in linears}) == 1
        and len(biases) == 1
        and all(linear.bias is None for linear in (o_proj, gate, up, down))
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


def add_linear(hidden: Tensor, x: Tensor, weight: Tensor, norm: Norm) -> Normed:
    """hidden (N, E) += x (N, F) @ weight.T in place, and its norm where that is RMSNorm."""
    if isinstance(norm, RmsNorm) and norm.weight.dtype == hidden.dtype:
        return hidden, linear_add_norm(x, weight, hidden, norm.weight, norm.eps)
    return hidden.addmm_(x, weight.t()), None


class PackedLayer:
    """A layer of plain linear modules."""

    def __init__(self, layer: Module) -> None:
        attn, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scaling, self.attn = attn.head_dim, attn.scaling, attn
        self.input_norm = norm_of(layer.input_layernorm)
        self.post_norm = norm_of(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = (
            norm_of(norm) if (norm := getattr(attn, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        )
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        self.sizes = [p.out_features // self.head_dim for p in projections]
        self.qkv_weight, self.qkv_bias = packed_linear(projections)
        self.gate_up, _ = packed_linear([mlp.gate_proj, mlp.up_proj])
        self.out, self.down = attn.o_proj.weight.data, mlp.down_proj.weight.data

    def qkv(self, x: Tensor, width: int) -> list[Tensor]:
        """x (N, E), `width` tokens of each row: q (b, H, W, D), k and v (b, H_kv, W, D)."""
        packed = window_linear(x, self.qkv_weight, self.qkv_bias)
        heads, D = sum(self.sizes), self.head_dim
        # (b, W, H, D) seen as (b, H, W, D).
        shape, strides = (len(x) // width, heads, width, D), (width * heads * D, D, heads * D, 1)
        q, k, v = packed.as_strided(shape, strides).split(self.sizes, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]

    def finish(self, hidden: Tensor, out: Tensor) -> Normed:
        """Output projection and residual: hidden (N, E), which is overwritten, out (N, H * D)."""
        return add_linear(hidden, out, self.out, self.post_norm)

    def mlp(self, hidden: Tensor, x: Tensor | None, norm: Norm) -> Normed:
        """MLP and residual: hidden (N, E), which is overwritten, and x, its norm; `norm` is what
        comes after the layer."""
        x = self.post_norm(hidden) if x is None else x
        act = window_linear(x, self.gate_up, gated=True)
        return add_linear(hidden, act, self.down, norm)


class ModuleLayer:
    """The same through the layer's own modules, whatever they are."""

    def __init__(self, layer: Module) -> None:
        self.layer, self.attn = layer, layer.self_attn
        self.head_dim, self.scaling = self.attn.head_dim, self.attn.scaling
        self.input_norm = layer.input_layernorm

    def qkv(self, x: Tensor, width: int) -> list[Tensor]:
        projected = []
        for name in "qkv":
            heads = getattr(self.attn, f"{name}_proj")(x)
            heads = heads.view(-1, width, heads.shape[-1] // self.head_dim, self.head_dim)
            norm = getattr(self.attn, f"{name}_norm", None)
            projected.append((heads if norm is None else norm(heads)).transpose(1, 2))
        return projected

    def finish(self, hidden: Tensor, out: Tensor) -> Normed:
        return hidden + self.attn.o_proj(out), None

    def mlp(self, hidden: Tensor, x: Tensor | None, norm: Norm) -> Normed:
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden)), None


def layers_of(model: Module) -> list[PackedLayer | ModuleLayer]:
    """The layers of a decoder (`LlamaModel` or alike), packed where every one of them can be."""
    if all(can_pack(layer) for layer in model.layers):
        return [PackedLayer(layer) for layer in model.layers]
    return [ModuleLayer(layer) for layer in model.layers]


def fingerprint(model: Module) -> list[int]:
    """What a backbone and captured steps rely on: equal while each of the model's weights is where
    it was and its layers are what they were."""
    weights = [getattr(p, "_local_tensor", p).data_ptr() for p in model.parameters()]
    return [*weights, id(model.lm_head), *(can_pack(layer) for layer in model.model.layers)]

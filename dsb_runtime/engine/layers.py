"""A decoder layer as the engine runs it: what comes before attention and what follows it.

`PackedLayer` serves plain linear layers. One op computes q, k and v, another gate and up with their
SiLU, and the op that projects back to the hidden size also adds the residual and computes the next
norm. A model whose linear layers are others (DTensors of tensor parallelism, quantised or adapted
ones) runs module by module in `ModuleLayer`. In both classes, `finish` and `mlp` return the
residual and its next norm, or None if that norm has yet to be computed.

Shapes: b rows of W tokens each, N = b * W, E hidden size, H query heads, H_kv KV heads, D head
dimension. In the last layer `finish` and `mlp` get fewer tokens (`engine.forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from torch.nn.modules import module as all_modules

from dsb_kernels import linear as linear_ops
from dsb_kernels._op import unchecked
from dsb_runtime.engine.packing import packed_linear

window_linear = unchecked(linear_ops.window_linear)
linear_add_norm = unchecked(linear_ops.linear_add_norm)
# F.rms_norm computes what these modules do, from their `weight` and `variance_epsilon`.
RMS_NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
KNOWN = ("torch.nn.", "transformers.", "dsb_runtime.")  # where a plain module's forward is written

Module = Any  # a module of transformers, of whose attributes nn.Module says nothing
Norm = Callable[[Tensor], Tensor]
Normed = tuple[Tensor, Tensor | None]  # the residual, and its norm or None


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm as one call of torch."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


def norm_of(module: Module) -> Norm:
    """Return an `RmsNorm` if the module is a plain RMSNorm, otherwise the module itself."""
    if type(module).__name__ not in RMS_NORMS or not is_plain(module):
        return module
    return RmsNorm(module.weight.data, module.variance_epsilon)


def wrapping(module: nn.Module, known: tuple[str, ...] = KNOWN) -> str | None:
    """What is wrapped around a module, in words. None means that calling the module does only what
    the forward of a class in the packages `known` does."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a forward hook"
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        return "runs under a hook of all modules"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if not module.__class__.forward.__module__.startswith(known):
        return f"is a {module.__class__.__name__}"
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether nothing is wrapped around a module, and its parameters are ordinary contiguous
    tensors of floating point."""
    return wrapping(module) is None and all(
        type(p) is nn.Parameter and p.is_floating_point() and p.is_contiguous()
        for p in module.parameters()
    )


def is_plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and is_plain(module)


def can_pack(layer: Module) -> bool:
    """Whether `PackedLayer` computes what the layer's modules would."""
    attn, mlp = layer.self_attn, layer.mlp
    linears: list[Module] = [getattr(attn, name, None) for name in PROJECTIONS]
    linears += [getattr(mlp, name, None) for name in MLP]
    if not all(isinstance(m, nn.Module) and is_plain_linear(m) for m in linears):
        return False
    o_proj, gate, up, down = linears[3:]
    biases = {linear.bias is None for linear in linears[:3]}
    return (
        wrapping(mlp) is wrapping(mlp.act_fn) is None
        and len({(p.weight.dtype, p.weight.device) for p in linears}) == 1
        and len(biases) == 1
        and all(linear.bias is None for linear in (o_proj, gate, up, down))
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
    )


def add_linear(hidden: Tensor, x: Tensor, weight: Tensor, norm: Norm) -> Normed:
    """Add x (N, F) @ weight.T to hidden (N, E) in place. Returns hidden, and its norm if that is an
    RMSNorm of hidden's dtype."""
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
        """Project x (N, E), `width` tokens of each row, to q (b, H, W, D), and to k and v
        (b, H_kv, W, D)."""
        packed = window_linear(x, self.qkv_weight, self.qkv_bias)
        heads, D = sum(self.sizes), self.head_dim
        # This is a (b, H, W, D) view of the matmul's (b, W, H, D), with all heads of q, k and v.
        shape, strides = (len(x) // width, heads, width, D), (width * heads * D, D, heads * D, 1)
        q, k, v = packed.as_strided(shape, strides).split(self.sizes, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return [q, k, v]

    def finish(self, hidden: Tensor, out: Tensor) -> Normed:
        """Project `out` (N, H * D), and add it to `hidden` (N, E), which is overwritten."""
        return add_linear(hidden, out, self.out, self.post_norm)

    def mlp(self, hidden: Tensor, x: Tensor | None, norm: Norm) -> Normed:
        """Add the MLP of `x`, the norm of `hidden` (N, E), to `hidden`, which is overwritten.
        `norm` is the norm that follows the layer."""
        x = self.post_norm(hidden) if x is None else x
        act = window_linear(x, self.gate_up, gated=True)
        return add_linear(hidden, act, self.down, norm)


class ModuleLayer:
    """Any layer. The methods do what those of `PackedLayer` do by calling the layer's modules."""

    def __init__(self, layer: Module) -> None:
        self.layer, self.attn = layer, layer.self_attn
        self.head_dim, self.scaling = self.attn.head_dim, self.attn.scaling
        self.input_norm = layer.input_layernorm
        self.out: Tensor | None = None  # no op of ours reads the weight that follows attention

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
    """The layers of a decoder (`LlamaModel` or the like), as `PackedLayer` if all of them can be
    packed."""
    if all(can_pack(layer) for layer in model.layers):
        return [PackedLayer(layer) for layer in model.layers]
    return [ModuleLayer(layer) for layer in model.layers]


def check_dtypes(model: Module) -> None:
    """Raise TypeError unless plain modules have weights of one dtype that the ops know.

    A norm of a narrower dtype than the model's is fine: torch computes it in the wider one.
    """
    dtype = model.dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the model is {dtype}: expected float32, float16 or bfloat16")
    for path, module in model.named_modules():
        norm = type(module).__name__ in RMS_NORMS
        linear = path.rsplit(".", 1)[-1] in (*PROJECTIONS, *MLP, "lm_head")
        if not is_plain(module) or not (norm or (linear and type(module) is nn.Linear)):
            continue
        for name, weight in module.named_parameters():
            wide = torch.promote_types(weight.dtype, dtype) if norm else weight.dtype
            if wide != dtype:
                raise TypeError(
                    f"{path}.{name} is {weight.dtype} in a model of {dtype}: "
                    f"expected one dtype, as model.to({dtype}) gives"
                )


def fingerprint(model: Module) -> list[Any]:
    """A list that stays equal while the model has the same modules, wrapped in the same way, and
    its weights and buffers stay at their addresses. A buffer must not be written to either, since
    rotary frequencies are read once. A backbone and captured steps rely on that."""
    modules = [(id(m), m.__class__, wrapping(m)) for m in model.modules()]
    weights = [getattr(p, "_local_tensor", p).data_ptr() for p in model.parameters()]
    buffers = [(b.data_ptr(), 0 if b.is_inference() else b._version) for b in model.buffers()]
    return [*modules, *weights, *buffers]

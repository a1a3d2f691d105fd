"""The calls of attention that `ops.py` and `sweep.py` time and `correct.py` checks, as those of
`op_cases.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.op_case import Case, allowed_error, compiled, device, on_gpu, randn, relative_error
from dsb_kernels.attention import window_attention
from dsb_kernels.linear import linear_add_norm

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

EPS = 1e-5
HEAD_DIM = 128
MODELS = {"LLaDA-8B": (32, 32), "iLLaDA-8B": (32, 8), "Dream-7B": (28, 4)}  # heads, KV heads
# FlexAttention is compiled for each shape, which takes longer than everything else of that shape.
FLEX = {
    ("LLaDA-8B", 64, 4096), ("iLLaDA-8B", 64, 4096), ("Dream-7B", 128, 16384),
    ("LLaDA-8B", 8, 96),  # on a CPU
}  # fmt: skip


def each(batch: int, value: int) -> Tensor:
    return torch.full((batch,), value, dtype=torch.int32, device=device())


def window_attention_case(
    model: str, batch: int, width: int, positions: int, splits: int | None = None,
    precision: str | None = None, way: str = "plain", head_dim: int = HEAD_DIM,
) -> Case:  # fmt: skip
    """The window's keys and values are in the cache already, every stored position is visible and
    the cache is full, so that every contender computes the same thing from the same tensors.

    `way` names what else is checked: "fresh" (the window's keys and values beside the cache, a
    window that is not full, padding and free positions), "rows" (`cache_batch_idx`), "blocks" and
    "blocks of heads" (lists of KV blocks), "visible" (`kv_visible`) or "lse".
    """
    H, H_kv = MODELS[model]
    rows = batch + 1 if way == "rows" else batch
    q = randn(batch, H, width, head_dim, precision=precision)
    k, v = (randn(rows, H_kv, positions, head_dim, precision=precision) for _ in range(2))
    window: tuple[Tensor | None, Tensor | None] = (None, None)
    seqlens = each(batch, positions)
    options: dict[str, Any] = {
        "window_start": each(batch, (positions - width) // 2),
        "window_length": each(batch, width), "cache_seqlens": seqlens, "num_splits": splits,
    }  # fmt: skip
    if way == "fresh":
        new = [randn(batch, H_kv, width, head_dim, precision=precision) for _ in range(2)]
        window = (new[0], new[1])
        options |= {
            "window_length": each(batch, max(1, width - 3)),
            "cache_seqlens": each(batch, positions - 5), "cache_leftpad": each(batch, 7),
        }  # fmt: skip
    elif way == "rows":
        options["cache_batch_idx"] = torch.arange(batch, 0, -1, device=device()).int()
    elif way.startswith("blocks"):
        lists = (batch, H_kv) if way == "blocks of heads" else (batch,)
        indices = torch.rand(*lists, -(-positions // 64), device=device()).argsort(-1).int()
        count = torch.full(lists, indices.shape[-1] // 2, dtype=torch.int32, device=device())
        options |= {"kv_num_blocks": count, "kv_indices": indices}
    elif way == "visible":
        options["kv_visible"] = torch.rand(batch, positions, device=device()) < 0.5
    elif way == "lse":
        options["return_lse"] = True

    def flash() -> Tensor:
        by_position = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_with_kvcache(*by_position, cache_seqlens=seqlens).transpose(1, 2)

    others = {"sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)}
    if batch == 1 and (model, width, positions) in FLEX:
        flex = compiled(flex_attention, q.shape, k.shape)
        others["flex"] = lambda: flex(q, k, v, enable_gqa=True)
    if flash_attn_with_kvcache is not None and on_gpu():
        others["flash"] = flash
    return Case(
        window_attention, (q, *window, k, v), options, others,
        bytes=2 * batch * (H * width + H_kv * positions) * head_dim * q.element_size(),
        flops=4 * batch * H * width * positions * head_dim,
    )  # fmt: skip


def refresh_attention_case(
    model: str, positions: int, length: int, precision: str | None = None
) -> Case:
    """A captured refresh of `positions` positions, of which a row has `length` after its padding.
    The other kernels are called with the row alone, which no captured step could do, except for
    "varlen", whose lengths are on the device as well."""
    H, H_kv = MODELS[model]
    q = randn(1, H, positions, HEAD_DIM, precision=precision)
    k, v = (randn(1, H_kv, positions, HEAD_DIM, precision=precision) for _ in range(2))
    padding = positions - length
    options = {"window_length": each(1, length)}
    options |= dict.fromkeys(("window_start", "cache_leftpad"), each(1, padding))
    row = (q[:, :, :length], k[:, :, padding:], v[:, :, padding:])
    grouped = {"enable_gqa": True} if H_kv != H else {}

    def sdpa(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, **grouped)

    def cudnn() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(*row)

    ends = torch.tensor([0, length], dtype=torch.int32, device=device())

    def varlen() -> Tensor:
        by_position = (x[0].transpose(0, 1) for x in (q, k[:, :, padding:], v[:, :, padding:]))
        out = varlen_attn(*by_position, ends, ends, positions, positions, **grouped)
        return out.transpose(0, 1)[None]

    def error(result: Tensor | tuple[Tensor, Tensor]) -> float:
        out = result[0] if isinstance(result, tuple) else result  # the definition has the lse too
        exact, plain = sdpa(*(x.double() for x in row)), sdpa(*row)
        return relative_error(out[:, :, :length], exact) / allowed_error(plain, exact)

    others = {"sdpa": lambda: sdpa(*row)}
    if on_gpu():
        others |= {"cudnn": cudnn} | ({"varlen": varlen} if varlen_attn is not None else {})
    return Case(
        window_attention, (q, None, None, k, v), options, others, error=error,
        bytes=2 * (H + H_kv) * length * HEAD_DIM * q.element_size(),
        flops=4 * H * length * length * HEAD_DIM,
    )  # fmt: skip


def attention_out_case(
    model: str, width: int, positions: int, told: bool, precision: str | None = None
) -> Case:
    """window_attention and the linear_add_norm that follows it, whose weight attention may be
    `told` of."""
    H, H_kv = MODELS[model]
    E = H * HEAD_DIM
    q = randn(1, H, width, HEAD_DIM, precision=precision)
    k, v = (randn(1, H_kv, positions, HEAD_DIM, precision=precision) for _ in range(2))
    weight = randn(E, E, precision=precision) / E**0.5
    residual, gain = randn(width, E, precision=precision), randn(E, precision=precision)

    def run(attention: Any, add_norm: Any, args: tuple[Tensor, ...]) -> Tensor:
        q, k, v, start, length, weight, residual, gain = args
        out = attention(
            q, None, None, k, v, window_start=start, window_length=length,
            next_weight=weight if told else None,
        )  # fmt: skip
        out = out[0] if isinstance(out, tuple) else out
        return add_norm(out.transpose(1, 2).flatten(2)[0], weight, residual, gain, EPS)

    def both(*args: Tensor) -> Tensor:
        return run(window_attention, linear_add_norm, args)

    def definition(*args: Tensor) -> Tensor:
        return run(window_attention.definition, linear_add_norm.definition, args)

    where = (each(1, (positions - width) // 2), each(1, width))
    moved = E * E + 2 * (H_kv * positions + H * width) * HEAD_DIM + 3 * width * E
    return Case(
        both, (q, k, v, *where, weight, residual, gain), written=(residual,),
        bytes=moved * q.element_size(), definition=definition,
    )  # fmt: skip

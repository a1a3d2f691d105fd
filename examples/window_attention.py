"""Call one op by itself: a window's queries over a K/V cache.

    python examples/window_attention.py

On CUDA tensors this is a Triton kernel, on CPU tensors the op's definition in plain PyTorch.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from dsb_kernels.attention import window_attention

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
batch, heads, kv_heads, window, capacity, head_dim = 2, 8, 2, 16, 96, 64
q = torch.randn(batch, heads, window, head_dim, device=device)
k, v = torch.randn(2, batch, kv_heads, capacity, head_dim, device=device)


def each_row(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# The window stands at 40 in one row and at 64 in the other; both see positions 0 to seqlens - 1.
out = window_attention(
    q, None, None, k, v,  # None: the keys and values of the window are in the cache already
    window_start=each_row(40, 64), window_length=each_row(16, 16), cache_seqlens=each_row(90, 96),
)  # fmt: skip

visible = (torch.arange(capacity, device=device) < each_row(90, 96)[:, None])[:, None, None]
expected = scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
print(f"largest difference from SDPA: {(out - expected).abs().max().item():.1e}")

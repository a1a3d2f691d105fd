"""Counter-based noise for sampling: Philox4x32-10 (Salmon et al., SC 2011).

The noise of a token depends only on the seed, on its candidate's noise id and on the token id. So a
sample stays the same for every batch, for every split of the vocabulary, and over several processes
with a shard each. The definitions use the functions in plain PyTorch; kernels compute the same
words with `tl.philox`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsb_kernels._op import jit, tl

# --- definition -------------------------------------------------------------------------------


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the ten rounds. Every word is an int64 tensor with values in [0, 2^32)."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c2 = ((product1 >> 32) & low) ^ c1 ^ k0, ((product0 >> 32) & low) ^ c3 ^ k1
        c1, c3 = product1 & low, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def gumbel_noise(
    seed: Tensor, noise_ids: Tensor, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Standard Gumbel noise of tokens [first, last) for each noise id: (..., last - first). `seed`
    is () for all of them, or (...) for each its own.

    It is -log(-log(1 - w)) with w = (word + 1/2) / 2^32, whose steps are fine where it is large.
    """
    low = 0xFFFFFFFF
    # One Philox call yields the words of four consecutive tokens.
    block = torch.arange(first // 4, -(-last // 4), device=noise_ids.device)
    ids = noise_ids[..., None]
    counter = torch.broadcast_tensors(block, ids & low, (ids >> 32) & low, torch.zeros_like(ids))
    key = seed[..., None]
    words = torch.stack(philox4x32(counter, (key & low, (key >> 32) & low)), -1).flatten(-2)
    words = words[..., first % 4 : first % 4 + last - first]
    w = (words.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w)).to(dtype)


def sampling_scores(
    x: Tensor,
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    first: int = 0,
) -> Tensor:
    """Scores whose argmax is a sample from softmax(x / temperature). At temperature 0 they are `x`.

    `x` (..., V) are the logits of tokens `first`, `first + 1` and so on.
    """
    if temperature == 0:
        return x
    assert seed is not None and noise_ids is not None
    noise = gumbel_noise(seed, noise_ids, first, first + x.shape[-1], x.dtype)
    return x / temperature + noise


def uniform(seed: Tensor, noise_ids: Tensor, stream: int = 1) -> Tensor:
    """One float64 in [0, 1) for each noise id (N,), independent of its Gumbel noise and of the
    numbers of other streams (from 1). `seed` is () or (N,)."""
    low = 0xFFFFFFFF
    zero, last = torch.zeros_like(noise_ids), torch.full_like(noise_ids, stream)
    counter = (zero, noise_ids & low, (noise_ids >> 32) & low, last)
    high, more, _, _ = philox4x32(counter, (seed & low, (seed >> 32) & low))
    return ((high << 21) | (more >> 11)).double() * 2.0**-53


# --- kernel -----------------------------------------------------------------------------------


@jit
def philox_words(key, counter, id_low, id_high):
    """Four random words for each of N consecutive counters, in token order: (4 N,) uint32."""
    counter = counter.to(tl.uint32)
    zero = tl.zeros_like(counter)
    w0, w1, w2, w3 = tl.philox(key, counter, zero + id_low, zero + id_high, zero)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@jit
def gumbel(word):
    """Standard Gumbel noise of a Philox word, the same as `gumbel_noise`."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - w), by its series where 1 - w would round away the fine steps of w.
    series = 1.0 / 4 + w * (1.0 / 5 + w * (1.0 / 6 + w * (1.0 / 7)))
    series = w * (1.0 + w * (1.0 / 2 + w * (1.0 / 3 + w * series)))
    return -tl.log(tl.where(w < 0.0625, series, -tl.log(1.0 - w)))

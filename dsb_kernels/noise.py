"""Counter-based noise for sampling: Philox4x32-10 (Salmon et al., SC 2011) in plain PyTorch.

The noise of a token depends on the seed, its row's noise id and the token id alone, so a sample
does not change with the batch, with how the vocabulary is split, or with a vocabulary shard.
"""

from __future__ import annotations

import torch
from torch import Tensor


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds; every word is an int64 tensor with values in [0, 2^32)."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64
        c0, c2 = ((product1 >> 32) & low) ^ c1 ^ k0, ((product0 >> 32) & low) ^ c3 ^ k1
        c1, c3 = product1 & low, product0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def gumbel_noise(seed: Tensor, noise_ids: Tensor, first: int, last: int, dtype: torch.dtype):
    """Standard Gumbel noise of tokens [first, last) for each noise id: (..., last - first).

    -log(-log(1 - w)) with w = (word + 1/2) / 2^32: fine steps where the noise is large.
    """
    low = 0xFFFFFFFF
    # One Philox call yields the words of four consecutive tokens.
    block = torch.arange(first // 4, -(-last // 4), device=noise_ids.device)
    ids = noise_ids[..., None]
    counter = torch.broadcast_tensors(block, ids & low, (ids >> 32) & low, torch.zeros_like(ids))
    words = torch.stack(philox4x32(counter, (seed & low, (seed >> 32) & low)), -1).flatten(-2)
    words = words[..., first % 4 : first % 4 + last - first]
    w = (words.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-w)).to(dtype)


def uniform(seed: Tensor, noise_ids: Tensor) -> Tensor:
    """One float64 in [0, 1) for each noise id (N,), independent of its Gumbel noise."""
    low = 0xFFFFFFFF
    zero, one = torch.zeros_like(noise_ids), torch.ones_like(noise_ids)
    counter = (zero, noise_ids & low, (noise_ids >> 32) & low, one)
    high, more, _, _ = philox4x32(counter, (seed & low, (seed >> 32) & low))
    return ((high << 21) | (more >> 11)).double() * 2.0**-53

"""bfloat16 under the interpreter (see `interpreter.py`), or on the GPU: products and rounding."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dsb_kernels._op import jit, tl
from tests.mutations import DEVICE

INF, NAN = float("inf"), float("nan")


@jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    out = tl.dot(a, tl.trans(b), tl.full((M, N), 0.5, tl.float32), input_precision="ieee")
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)


@jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(x, dtype=dtype, device=DEVICE)
    _cast_kernel[(1,)](x.to(DEVICE), out, len(x))
    return out.cpu()


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    equal = (x == y) & (x.signbit() == y.signbit())
    return bool((equal | (x.isnan() & y.isnan())).all())


def test_bfloat16_dot_is_the_float32_product_of_its_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).bfloat16() for n in (16, 32))
    out = torch.empty(16, 32, device=DEVICE)
    _dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), out, 16, 32, 64)
    torch.testing.assert_close(out.cpu(), a.float() @ b.float().T + 0.5, rtol=1e-5, atol=1e-5)


TIES = (torch.arange(1 << 16) << 16) + 0x8000  # in the middle of two bfloat16, one of them even
ANY_BITS = torch.randint(1 << 32, (1 << 16,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "bits", [ANY_BITS, TIES, TIES - 1, TIES + 1], ids=["any", "ties", "below_ties", "above_ties"]
)
def test_float32_rounds_to_the_nearest_bfloat16(bits: torch.Tensor) -> None:
    x = bits.to(torch.int32).view(torch.float32)
    assert same(cast(x, torch.bfloat16), x.bfloat16())


def test_limits_of_bfloat16() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([INF, -INF, NAN, 3.4e38, -3.4e38, largest, 1e-40, -0.0])
    assert same(cast(x, torch.bfloat16), x.bfloat16())
    payload = torch.tensor([0x7F800001, -0x7FFFFF]).to(torch.int32).view(torch.float32)
    assert cast(payload, torch.bfloat16).isnan().all()  # whose upper half is that of an infinity


def test_every_bfloat16_widens_exactly() -> None:
    x = (torch.arange(1 << 16) - (1 << 15)).to(torch.int16).view(torch.bfloat16)
    assert same(cast(x, torch.float32), x.float())

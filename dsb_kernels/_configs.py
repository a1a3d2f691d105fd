"""Launch configurations per (op, shape class, architecture).

Nothing is tuned at run time: a configuration is looked up from static shapes, so results never
depend on a timing, on the cache's capacity or on what a batch contains.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# What `tools.compile_report` compiles; other architectures take the configurations of one of these.
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Config:
    """One launch configuration; `blocks` are constexpr arguments by their name in the kernel."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1


def head_blocks(
    block_v: int, block_n: int, columns: int, *, programs: int, block_k: int = 64
) -> dict[str, int]:
    blocks = {"BLOCK_V": block_v, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "COLUMNS": columns, "PROGRAMS": programs}


def linear_blocks(
    block_v: int, block_n: int, *, programs: int, block_k: int = 64
) -> dict[str, int]:
    blocks = {"BLOCK_V": block_v, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return {**blocks, "PROGRAMS": programs}


# Two accumulators of 128 x 128 do not fit the registers that mma.sync leaves.
GATED_BY_MMA_SYNC = {
    16: Config(linear_blocks(64, 16, programs=64), num_warps=4, num_stages=4),
    32: Config(linear_blocks(64, 32, programs=64), num_warps=4, num_stages=3),
    64: Config(linear_blocks(64, 64, programs=64), num_warps=4, num_stages=3),
    1 << 62: Config(linear_blocks(64, 128, programs=64), num_warps=8, num_stages=3),
}

# (op, architecture) -> {largest size of the class: configuration}. "any" serves architectures
# without an entry of their own. What "size" counts is said beside each op.
CONFIGS: dict[tuple[str, str], dict[int, Config]] = {
    # size = rows. One program scores SPLIT_BLOCKS blocks of BLOCK_V logits of one row; few rows
    # are cut finely enough to fill 132 SMs, many rows coarsely enough to amortise the combine.
    ("token_confidence", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, num_warps=4),
        512: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, num_warps=4, num_stages=3),
        1 << 62: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 8}, num_warps=4, num_stages=3),
    },
    # Philox keeps four times the registers busy.
    ("token_confidence sampled", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, num_warps=8),
        1 << 62: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, num_warps=8),
    },
    # size = rows. PROGRAMS share the vocabulary evenly (one or two to each of 132 SMs); each scores
    # its share in tiles of BLOCK_V weight rows (M of the tensor cores) by BLOCK_N hidden rows,
    # COLUMNS of them at a time. A wide tile for many rows: it reads the hidden rows less often.
    ("lm_head_confidence", "any"): {
        16: Config(head_blocks(128, 16, 16, programs=264), num_warps=8, num_stages=4),
        32: Config(head_blocks(128, 32, 32, programs=264), num_warps=8, num_stages=4),
        64: Config(head_blocks(128, 64, 32, programs=264), num_warps=8, num_stages=4),
        1 << 62: Config(head_blocks(256, 128, 32, programs=132), num_warps=16, num_stages=4),
    },
    # 163 KiB of shared memory a block, and no accumulators of 64 rows a warp.
    ("lm_head_confidence", "sm_80"): {
        16: Config(head_blocks(128, 16, 16, programs=216), num_warps=8, num_stages=3),
        32: Config(head_blocks(128, 32, 32, programs=216), num_warps=8, num_stages=3),
        64: Config(head_blocks(128, 64, 32, programs=216), num_warps=8, num_stages=3),
        1 << 62: Config(head_blocks(128, 128, 32, programs=108), num_warps=8, num_stages=4),
    },
    # 99 KiB; 128 SMs on the largest.
    ("lm_head_confidence", "sm_89"): {
        16: Config(head_blocks(128, 16, 16, programs=256), num_warps=8, num_stages=3),
        32: Config(head_blocks(128, 32, 32, programs=256), num_warps=8, num_stages=3),
        64: Config(head_blocks(128, 64, 32, programs=256), num_warps=8, num_stages=3),
        1 << 62: Config(head_blocks(128, 128, 32, programs=128), num_warps=8, num_stages=3),
    },
    # 148 SMs; its tensor cores do not take 16 warps.
    ("lm_head_confidence", "sm_100"): {
        16: Config(head_blocks(128, 16, 16, programs=296), num_warps=8, num_stages=4),
        32: Config(head_blocks(128, 32, 16, programs=296), num_warps=8, num_stages=4),
        64: Config(head_blocks(128, 64, 16, programs=296), num_warps=8, num_stages=4),
        1 << 62: Config(head_blocks(128, 128, 16, programs=148), num_warps=8, num_stages=4),
    },
    # A Philox call for every logit leaves fewer registers for the tile.
    ("lm_head_confidence sampled", "any"): {
        16: Config(head_blocks(128, 16, 16, programs=264), num_warps=8, num_stages=4),
        32: Config(head_blocks(128, 32, 16, programs=264), num_warps=8, num_stages=4),
        64: Config(head_blocks(128, 64, 16, programs=132), num_warps=8, num_stages=4),
        1 << 62: Config(head_blocks(128, 128, 16, programs=132), num_warps=8, num_stages=4),
    },
    ("lm_head_confidence sampled", "sm_89"): {
        16: Config(head_blocks(128, 16, 16, programs=256), num_warps=8, num_stages=4),
        32: Config(head_blocks(128, 32, 16, programs=256), num_warps=8, num_stages=4),
        64: Config(head_blocks(128, 64, 16, programs=128), num_warps=8, num_stages=4),
        1 << 62: Config(head_blocks(128, 128, 16, programs=128), num_warps=8, num_stages=3),
    },
    # Elements of twice the size and no tensor cores: for tests, and for small models.
    ("lm_head_confidence float32", "any"): {
        32: Config(head_blocks(64, 32, 16, programs=264), num_warps=4, num_stages=2),
        1 << 62: Config(head_blocks(64, 64, 16, programs=264), num_warps=8, num_stages=2),
    },
    ("lm_head_confidence sampled float32", "any"): {
        1 << 62: Config(head_blocks(64, 32, 16, programs=264), num_warps=8, num_stages=2),
    },
    # size = rows. A program reads BLOCK_V weight rows (M of the tensor cores; as many again where
    # gated) in stages of 64 columns, 128 bytes of each: a stage of 64 weight rows is 8 KiB, of R
    # rows of x R / 8 KiB, and all stages but one are in flight. 132 SMs at 3.35 TB/s (H100) need
    # about 4 MB of loads on their way at a latency of 1.2 us, whichever SM they belong to; programs
    # have equal work and run all at once, so that none waits for a second wave. Weights in flight:
    #   qkv      LLaDA 192 programs, iLLaDA 96, Dream 72 (at 128 rows 96, 96, 72), two to an SM (84
    #            KiB of shared memory at 32 rows), at 128 rows of LLaDA one: 48 KiB each up to 32
    #            rows, 40 at 64, 80 at 128: 9.4, 4.7, 3.5 MB at 32.
    #   gate/up  LLaDA 192 programs, Dream 296, three to an SM (60 KiB at 32 rows): 48 KiB each at
    #            16 rows, 32 at 32 and 64: 6.3 and 9.7 MB at 32. 128 rows: 96 (96 KiB each) and 148;
    #            at one to an SM 16 of Dream's start late.
    # At 128 rows a tile of 64 weights would read twice as many bytes of x, from the L2 cache, as of
    # weights; a tile of 128 (256 where gated) reads as many (half). It is halved where fewer than
    # PROGRAMS programs would be left.
    ("window_linear", "any"): {
        16: Config(linear_blocks(64, 16, programs=64), num_warps=4, num_stages=7),
        32: Config(linear_blocks(64, 32, programs=64), num_warps=4, num_stages=7),
        64: Config(linear_blocks(64, 64, programs=64), num_warps=4, num_stages=6),
        1 << 62: Config(linear_blocks(128, 128, programs=64), num_warps=8, num_stages=6),
    },
    ("window_linear gated", "any"): {
        16: Config(linear_blocks(64, 16, programs=64), num_warps=4, num_stages=4),
        32: Config(linear_blocks(64, 32, programs=64), num_warps=4, num_stages=3),
        64: Config(linear_blocks(64, 64, programs=64), num_warps=4, num_stages=3),
        1 << 62: Config(linear_blocks(128, 128, programs=64), num_warps=8, num_stages=4),
    },
    ("window_linear gated", "sm_80"): GATED_BY_MMA_SYNC,
    ("window_linear", "sm_89"): {
        16: Config(linear_blocks(64, 16, programs=64), num_warps=4, num_stages=7),
        32: Config(linear_blocks(64, 32, programs=64), num_warps=4, num_stages=6),
        64: Config(linear_blocks(64, 64, programs=64), num_warps=4, num_stages=5),
        1 << 62: Config(linear_blocks(64, 128, programs=64), num_warps=4, num_stages=4),
    },
    ("window_linear gated", "sm_89"): GATED_BY_MMA_SYNC,
    # size = rows. Tiles as above, over PROGRAMS programs by splitting the input features: out and
    # down of 4096 features are 64 tiles x 2 splits = 128 programs, of Dream's 3584 56 x 2 = 112, at
    # 128 rows 32 x 4 and 28 x 4: one to each of 132 SMs, with 48 KiB of weights in flight up to 32
    # rows (6.3 MB), 40 at 64 (5.2 MB), 80 at 128 (10.5 MB). Partial sums, written once and read
    # once, are 2 x splits x rows x E x 4 bytes: beside all that must move (weights, x, residual,
    # result) of LLaDA's out and down 6% and 2% at 32 rows, 12% and 4% at 64, 44% and 16% at 128,
    # and at most 8.4 MB at a time, which the L2 cache holds until they are added.
    ("linear_add_norm", "any"): {
        16: Config(linear_blocks(64, 16, programs=100), num_warps=4, num_stages=7),
        32: Config(linear_blocks(64, 32, programs=100), num_warps=4, num_stages=7),
        64: Config(linear_blocks(64, 64, programs=100), num_warps=4, num_stages=6),
        1 << 62: Config(linear_blocks(128, 128, programs=100), num_warps=8, num_stages=6),
    },
    ("linear_add_norm", "sm_89"): {
        16: Config(linear_blocks(64, 16, programs=100), num_warps=4, num_stages=7),
        32: Config(linear_blocks(64, 32, programs=100), num_warps=4, num_stages=6),
        64: Config(linear_blocks(64, 64, programs=100), num_warps=4, num_stages=5),
        1 << 62: Config(linear_blocks(64, 128, programs=100), num_warps=4, num_stages=4),
    },
    ("window_linear float32", "any"): {
        32: Config(linear_blocks(64, 32, programs=64), num_warps=4, num_stages=2),
        1 << 62: Config(linear_blocks(64, 64, programs=64), num_warps=8, num_stages=2),
    },
    ("window_linear gated float32", "any"): {
        32: Config(linear_blocks(64, 32, programs=64), num_warps=8, num_stages=2),
        1 << 62: Config(linear_blocks(64, 64, programs=64), num_warps=8, num_stages=2),
    },
    ("linear_add_norm float32", "any"): {
        32: Config(linear_blocks(64, 32, programs=100), num_warps=4, num_stages=2),
        1 << 62: Config(linear_blocks(64, 64, programs=100), num_warps=8, num_stages=2),
    },
    # size = query rows of a KV head (group x window), head dim up to 128, then up to 256. 64 rows
    # and up run on wgmma; K/V tiles of 64 positions, two ahead in flight, saturate memory with one
    # program per SM.
    ("window_attention 128", "any"): {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        32: Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=4),  # 3 spill
        64: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        1 << 62: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    },
    ("window_attention 256", "any"): {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=3),
        64: Config({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=4, num_stages=4),  # 32 spill
        1 << 62: Config({"BLOCK_M": 128, "BLOCK_N": 16}, num_warps=8, num_stages=4),
    },
    ("window_attention 128", "sm_89"): {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=4, num_stages=3),
        32: Config({"BLOCK_M": 32, "BLOCK_N": 64}, num_warps=4, num_stages=2),
        64: Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
        1 << 62: Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    },
    ("window_attention 256", "sm_89"): {
        16: Config({"BLOCK_M": 16, "BLOCK_N": 32}, num_warps=4, num_stages=3),
        1 << 62: Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2),
    },
    # Tests only: float32 has no tensor cores.
    ("window_attention float32", "any"): {
        1 << 62: Config({"BLOCK_M": 16, "BLOCK_N": 16}, num_warps=8),
    },
    # size = window rows. 16 rows of a head of 128: every thread loads 16 bytes of each half.
    ("rope_write_kv", "any"): {1 << 62: Config({"BLOCK_W": 16}, num_warps=4)},
    # size = batch rows. A program each and for every BLOCK_W positions.
    ("place_rows", "any"): {1 << 62: Config({"BLOCK_W": 1024}, num_warps=4)},
    # size = candidates of a row, which one program holds: each against BLOCK_J others at a time. It
    # searches the response BLOCK_L positions at a time; more of either spill.
    ("unmask_and_slide", "any"): {
        64: Config({"BLOCK_J": 32, "BLOCK_L": 512}, num_warps=4),
        256: Config({"BLOCK_J": 16, "BLOCK_L": 1024}, num_warps=8),
        1 << 62: Config({"BLOCK_J": 4, "BLOCK_L": 1024}, num_warps=16),
    },
}


def of_dtype(op: str, dtype: torch.dtype) -> str:
    """The op's name in the table."""
    return f"{op} float32" if dtype == torch.float32 else op


def configuration(op: str, size: int, architecture: str) -> Config:
    """The configuration of `op` for the smallest shape class that holds `size`.

    Raises:
        ValueError: the op has no class this large.
    """
    table = CONFIGS.get((op, architecture)) or CONFIGS[op, "any"]
    for limit, config in sorted(table.items()):
        if size <= limit:
            return config
    raise ValueError(f"{op}: size {size}: accepted is at most {max(table)}")


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The one of `ARCHITECTURES` whose configurations a device takes; the interpreter runs what
    sm_90 would."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10, 11):
        return "sm_90" if major == 9 else "sm_100"
    # 8.6, 8.9, 12.0 and the like have 99 KiB of shared memory a block.
    return "sm_80" if (major, minor) == (8, 0) else "sm_89"

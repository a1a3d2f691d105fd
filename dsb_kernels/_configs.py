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


INFINITY = 1 << 62  # no size is larger
Classes = dict[int, Config]


def scoring(tile: tuple[int, int], columns: int, programs: int, warps: int, stages: int) -> Config:
    """A tile of `lm_head_confidence`: tokens x candidates, `columns` of them scored at a time."""
    blocks = {"BLOCK_V": tile[0], "BLOCK_N": tile[1], "BLOCK_K": 64}
    return Config({**blocks, "COLUMNS": columns, "PROGRAMS": programs}, warps, stages)


def linear(tile: tuple[int, int], programs: int, warps: int, stages: int) -> Config:
    """A tile of a linear op: features x tokens, halved where it leaves fewer than `programs`."""
    blocks = {"BLOCK_V": tile[0], "BLOCK_N": tile[1], "BLOCK_K": 64}
    return Config({**blocks, "PROGRAMS": programs}, warps, stages)


def attention(tile: tuple[int, int], warps: int, stages: int = 1) -> Config:
    """A tile of `window_attention`: queries x keys."""
    return Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, warps, stages)


def small_linear(programs: int) -> Classes:
    """The tiles of window_linear and linear_add_norm for 99 KiB of shared memory."""
    return {
        16: linear((64, 16), programs, 4, 7),
        32: linear((64, 32), programs, 4, 6),
        64: linear((64, 64), programs, 4, 5),
        INFINITY: linear((64, 128), programs, 4, 4),
    }


# Two accumulators of 128 x 128 do not fit the registers that mma.sync leaves.
GATED_BY_MMA_SYNC = {
    16: linear((64, 16), 64, 4, 4),
    32: linear((64, 32), 64, 4, 3),
    64: linear((64, 64), 64, 4, 3),
    INFINITY: linear((64, 128), 64, 8, 3),
}

# (op, architecture) -> {largest size of the class: configuration}. "any" serves architectures
# without an entry of their own. Why each is what it is: see docs/tuning.md.
CONFIGS: dict[tuple[str, str], Classes] = {
    # size = candidates; sampling keeps four times the registers busy
    ("token_confidence", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, 4),
        512: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, 4, 3),
        INFINITY: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 8}, 4, 3),
    },
    ("token_confidence sampled", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, 8),
        INFINITY: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, 8),
    },
    # size = candidates; PROGRAMS is one or two for each SM
    ("lm_head_confidence", "any"): {
        16: scoring((128, 16), 16, 264, 8, 4),
        32: scoring((128, 32), 32, 264, 8, 4),
        64: scoring((128, 64), 32, 264, 8, 4),
        INFINITY: scoring((256, 128), 32, 132, 16, 4),
    },
    ("lm_head_confidence", "sm_80"): {
        16: scoring((128, 16), 16, 216, 8, 3),
        32: scoring((128, 32), 32, 216, 8, 3),
        64: scoring((128, 64), 32, 216, 8, 3),
        INFINITY: scoring((128, 128), 32, 108, 8, 4),
    },
    ("lm_head_confidence", "sm_89"): {
        16: scoring((128, 16), 16, 256, 8, 3),
        32: scoring((128, 32), 32, 256, 8, 3),
        64: scoring((128, 64), 32, 256, 8, 3),
        INFINITY: scoring((128, 128), 32, 128, 8, 3),
    },
    ("lm_head_confidence", "sm_100"): {
        16: scoring((128, 16), 16, 296, 8, 4),
        32: scoring((128, 32), 16, 296, 8, 4),
        64: scoring((128, 64), 16, 296, 8, 4),
        INFINITY: scoring((128, 128), 16, 148, 8, 4),
    },
    ("lm_head_confidence sampled", "any"): {
        16: scoring((128, 16), 16, 264, 8, 4),
        32: scoring((128, 32), 16, 264, 8, 4),
        64: scoring((128, 64), 16, 132, 8, 4),
        INFINITY: scoring((128, 128), 16, 132, 8, 4),
    },
    ("lm_head_confidence sampled", "sm_89"): {
        16: scoring((128, 16), 16, 256, 8, 4),
        32: scoring((128, 32), 16, 256, 8, 4),
        64: scoring((128, 64), 16, 128, 8, 4),
        INFINITY: scoring((128, 128), 16, 128, 8, 3),
    },
    # size = tokens; every stage but one is a load in flight
    ("window_linear", "any"): {
        16: linear((64, 16), 64, 4, 7),
        32: linear((64, 32), 64, 4, 7),
        64: linear((64, 64), 64, 4, 6),
        INFINITY: linear((128, 128), 64, 8, 6),
    },
    ("window_linear", "sm_89"): small_linear(64),
    ("window_linear gated", "any"): {
        16: linear((64, 16), 64, 4, 4),
        32: linear((64, 32), 64, 4, 3),
        64: linear((64, 64), 64, 4, 3),
        INFINITY: linear((128, 128), 64, 8, 4),
    },
    ("window_linear gated", "sm_80"): GATED_BY_MMA_SYNC,
    ("window_linear gated", "sm_89"): GATED_BY_MMA_SYNC,
    ("linear_add_norm", "any"): {
        16: linear((64, 16), 100, 4, 7),
        32: linear((64, 32), 100, 4, 7),
        64: linear((64, 64), 100, 4, 6),
        INFINITY: linear((128, 128), 100, 8, 6),
    },
    ("linear_add_norm", "sm_89"): small_linear(100),
    # size = queries of a KV head (group x window), for head dims up to 128, then up to 256
    ("window_attention 128", "any"): {
        16: attention((16, 64), 4, 3),
        32: attention((32, 64), 4, 4),  # with 3 stages, registers are spilled
        64: attention((64, 64), 4, 3),
        INFINITY: attention((128, 64), 8, 3),
    },
    ("window_attention 128", "sm_89"): {
        16: attention((16, 64), 4, 3),
        32: attention((32, 64), 4, 2),
        64: attention((64, 64), 4, 2),
        INFINITY: attention((128, 64), 8, 2),
    },
    ("window_attention 256", "any"): {
        16: attention((16, 32), 4, 3),
        64: attention((64, 16), 4, 4),  # with 32 keys, registers are spilled
        INFINITY: attention((128, 16), 8, 4),
    },
    ("window_attention 256", "sm_89"): {
        16: attention((16, 32), 4, 3),
        INFINITY: attention((64, 32), 4, 2),
    },
    # float32 has elements of twice the size and no tensor cores: for tests and small models
    ("lm_head_confidence float32", "any"): {
        32: scoring((64, 32), 16, 264, 4, 2), INFINITY: scoring((64, 64), 16, 264, 8, 2),
    },
    ("lm_head_confidence sampled float32", "any"): {INFINITY: scoring((64, 32), 16, 264, 8, 2)},
    ("window_linear float32", "any"): {
        32: linear((64, 32), 64, 4, 2), INFINITY: linear((64, 64), 64, 8, 2),
    },
    ("window_linear gated float32", "any"): {
        32: linear((64, 32), 64, 8, 2), INFINITY: linear((64, 64), 64, 8, 2),
    },
    ("linear_add_norm float32", "any"): {
        32: linear((64, 32), 100, 4, 2), INFINITY: linear((64, 64), 100, 8, 2),
    },
    ("window_attention float32", "any"): {INFINITY: attention((16, 16), 8)},
    # size = positions of a window
    ("rope_write_kv", "any"): {INFINITY: Config({"BLOCK_W": 16}, 4)},
    # size = batch rows
    ("place_rows", "any"): {INFINITY: Config({"BLOCK_W": 1024}, 4)},
    # size = candidates of a batch row
    ("unmask_and_slide", "any"): {
        64: Config({"BLOCK_J": 32, "BLOCK_L": 512}, 4),
        256: Config({"BLOCK_J": 16, "BLOCK_L": 1024}, 8),
        INFINITY: Config({"BLOCK_J": 4, "BLOCK_L": 1024}, 16),
    },
}  # fmt: skip


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

"""Launch configurations for each op, shape class and architecture.

Nothing is tuned at run time: static shapes choose a configuration, so that results never depend on
a timing, on the cache's capacity or on what a batch contains.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsb_kernels._launch import launch_options

# `tools.compile_report` compiles for these. Any other architecture takes the configurations of one
# of them (`architecture_of`).
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")


@dataclass(frozen=True)
class Config:
    """One launch configuration; `blocks` are constexpr arguments by their name in the kernel."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 1

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of a launch: the blocks, the warps and the stages."""
        return {**self.blocks, **launch_options(self.num_warps, self.num_stages)}


@dataclass(frozen=True, kw_only=True)
class Launch(Config):
    """The configuration and geometry of one launch. Both follow from static shapes alone."""

    grid: tuple[int, ...]
    share: int = 0  # how many vocabulary entries or input features a program takes
    parts: int = 0  # how many partial states all programs together write


INFINITY = 1 << 62  # no size is larger
LIMITS = (16, 32, 64, INFINITY)  # the largest size of each of the four classes of a matmul
Classes = dict[int, Config]  # the configuration of each class, by the largest size of the class
Four = tuple[int, int, int, int]  # one number for each of LIMITS


def matmul(tile: tuple[int, int], warps: int, stages: int, **more: int) -> Config:
    """A configuration whose tile is output features (or vocabulary entries) x tokens (or
    candidates). A program reads 64 input features at a time."""
    blocks = {"BLOCK_V": tile[0], "BLOCK_N": tile[1], "BLOCK_K": 64}
    return Config({**blocks, **more}, warps, stages)


def scoring(columns: Four, programs: Four, stages: Four, *, last: int = 128) -> Classes:
    """The classes of `lm_head_confidence`. A program scores at most `columns` candidates at a time.
    A tile of the last class has `last` vocabulary entries, any other 128. `programs` is one or two
    for each SM."""
    return {
        limit: matmul(
            (last if limit == INFINITY else 128, min(limit, 128)), warps, s, COLUMNS=c, PROGRAMS=p
        )
        for limit, c, p, s, warps in zip(
            LIMITS, columns, programs, stages, (8, 8, 8, last // 16), strict=True
        )
    }


def linear(
    programs: int,
    stages: Four,
    *,
    third: tuple[int, int] = (64, 4),
    last: tuple[int, int] = (128, 8),
    **more: int,
) -> Classes:
    """The classes of a linear op, which should run at least `programs` programs: `linear_launch`
    halves tiles for that, `split_launch` splits the input features. `third` and `last` give the
    features and the warps of the last two classes. A program has one load fewer in flight than it
    has stages. `more` may have ALONE_KIB, the shared memory that `linear_launch` fills with stages
    where every program has an SM to itself."""
    sizes = ((64, 4), (64, 4), third, last)
    return {
        limit: matmul((features, min(limit, 128)), warps, s, PROGRAMS=programs, **more)
        for limit, s, (features, warps) in zip(LIMITS, stages, sizes, strict=True)
    }


def attention(tile: tuple[int, int], warps: int, stages: int = 1) -> Config:
    """A configuration of `window_attention`, whose tile is queries x keys."""
    return Config({"BLOCK_M": tile[0], "BLOCK_N": tile[1]}, warps, stages)


# (op, architecture) -> {largest size of the class: configuration}. "any" serves architectures
# without an entry of their own. docs/tuning.md gives the reason for each configuration.
CONFIGS: dict[tuple[str, str], Classes] = {
    # size = candidates. A program that samples needs four times the registers.
    ("token_confidence", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, 4),
        512: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, 4, 3),
        INFINITY: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 8}, 4, 3),
    },
    ("token_confidence sampled", "any"): {
        128: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 1}, 8),
        INFINITY: Config({"BLOCK_V": 4096, "SPLIT_BLOCKS": 4}, 8),
    },
    # size = candidates
    ("lm_head_confidence", "any"): scoring(
        columns=(16, 32, 32, 32), programs=(264, 264, 264, 132), stages=(4, 4, 4, 4), last=256
    ),
    ("lm_head_confidence", "sm_80"): scoring(
        columns=(16, 32, 32, 32), programs=(216, 216, 216, 108), stages=(3, 3, 3, 4)
    ),
    ("lm_head_confidence", "sm_89"): scoring(
        columns=(16, 32, 32, 32), programs=(256, 256, 256, 128), stages=(3, 3, 3, 3)
    ),
    ("lm_head_confidence", "sm_100"): scoring(
        columns=(16, 16, 16, 16), programs=(296, 296, 296, 148), stages=(4, 4, 4, 4)
    ),
    ("lm_head_confidence sampled", "any"): scoring(
        columns=(16, 16, 16, 16), programs=(264, 264, 132, 132), stages=(4, 4, 4, 4)
    ),
    ("lm_head_confidence sampled", "sm_89"): scoring(
        columns=(16, 16, 16, 16), programs=(256, 256, 128, 128), stages=(4, 4, 4, 3)
    ),
    # size = tokens. sm_89 has 99 KiB of shared memory. Two accumulators of 128 x 128 do not fit
    # the registers that mma.sync leaves on sm_80 and sm_89.
    ("window_linear", "any"): linear(64, (7, 7, 9, 6), third=(128, 8), ALONE_KIB=216),
    ("window_linear", "sm_80"): linear(64, (7, 7, 6, 6)),
    ("window_linear", "sm_100"): linear(64, (7, 7, 6, 6)),
    ("window_linear", "sm_89"): linear(64, (7, 6, 5, 4), last=(64, 4)),
    ("window_linear gated", "any"): linear(64, (4, 3, 3, 4)),
    ("window_linear gated", "sm_80"): linear(64, (4, 3, 3, 3), last=(64, 8)),
    ("window_linear gated", "sm_89"): linear(64, (4, 3, 3, 3), last=(64, 8)),
    ("linear_add_norm", "any"): linear(100, (7, 7, 8, 6), third=(128, 8)),
    ("linear_add_norm", "sm_80"): linear(100, (7, 7, 6, 6)),
    ("linear_add_norm", "sm_100"): linear(100, (7, 7, 6, 6)),
    ("linear_add_norm", "sm_89"): linear(100, (7, 6, 5, 4), last=(64, 4)),
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
    # Elements of float32 are twice as large, and tensor cores do not multiply them. Only tests and
    # small models use these.
    ("lm_head_confidence float32", "any"): {
        32: matmul((64, 32), 4, 2, COLUMNS=16, PROGRAMS=264),
        INFINITY: matmul((64, 64), 8, 2, COLUMNS=16, PROGRAMS=264),
    },
    ("lm_head_confidence sampled float32", "any"): {
        INFINITY: matmul((64, 32), 8, 2, COLUMNS=16, PROGRAMS=264),
    },
    ("window_linear float32", "any"): {
        32: matmul((64, 32), 4, 2, PROGRAMS=64),
        INFINITY: matmul((64, 64), 8, 2, PROGRAMS=64),
    },
    ("window_linear gated float32", "any"): {
        32: matmul((64, 32), 8, 2, PROGRAMS=64),
        INFINITY: matmul((64, 64), 8, 2, PROGRAMS=64),
    },
    ("linear_add_norm float32", "any"): {
        32: matmul((64, 32), 4, 2, PROGRAMS=100),
        INFINITY: matmul((64, 64), 8, 2, PROGRAMS=100),
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
}


def of_dtype(op: str, dtype: torch.dtype) -> str:
    """The name under which the table lists an op for this dtype."""
    return f"{op} float32" if dtype == torch.float32 else op


def largest_block(op: str, block: str) -> int:
    """The largest value of a block in all the configurations of an op."""
    tables = [classes for (name, _), classes in CONFIGS.items() if name.startswith(op)]
    return max(config.blocks[block] for classes in tables for config in classes.values())


def configuration(op: str, size: int, architecture: str) -> Config:
    """The configuration of `op` for the smallest shape class that holds `size`.

    Raises:
        ValueError: the op has no class for a size as large as this.
    """
    table = CONFIGS.get((op, architecture)) or CONFIGS[op, "any"]
    for limit, config in sorted(table.items()):
        if size <= limit:
            return config
    raise ValueError(f"{op}: size {size}: accepted is at most {max(table)}")


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The member of `ARCHITECTURES` whose configurations a device takes. The interpreter takes
    those of sm_90."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10, 11):
        return "sm_90" if major == 9 else "sm_100"
    # GPUs of capability 8.6, 8.9, 12.0 and the like have 99 KiB of shared memory for a block.
    return "sm_80" if (major, minor) == (8, 0) else "sm_89"

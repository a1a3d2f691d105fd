"""Tensor parallelism by transformers' own plan: what it can split, and how a split vocabulary is
scored.

The plan divides attention heads, the MLP's hidden features and the vocabulary over the processes of
`torchrun`, and its modules communicate where they must. Every process has the whole canvas and
makes every decision itself. Their decisions are equal, since they all follow from the same numbers,
gathered in the same order.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from dsb_kernels.lm_head import lm_head_partial
from dsb_kernels.score import combine_partials


def check_distributed(plan: DistributedConfig, config: PretrainedConfig) -> int:
    """Check the plan, and return the number of processes that share the model.

    Raises:
        TypeError, ValueError: the plan does not fit the processes or the model.
        ImportError: accelerate, which places the shards, is not installed.
    """
    if not isinstance(plan, DistributedConfig):
        raise TypeError(
            f"distributed_config={type(plan).__name__}: expected a DistributedConfig, as "
            "DistributedConfig(tp_plan='auto')"
        )
    if plan.tp_plan not in ("auto", None):
        raise ValueError(f"tp_plan={plan.tp_plan!r}: expected 'auto', the model's own plan")
    for name in ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size"):
        if getattr(plan, name, None) not in (1, None):
            raise ValueError(
                f"{name}={getattr(plan, name)}: only tensor parallelism is supported; expected 1"
            )
    size, world = plan.tp_size or 1, int(os.environ.get("WORLD_SIZE", "1"))
    if size != world:
        raise ValueError(
            f"tp_size={size}: started with {world} process{'es' * (world > 1)}; expected their "
            f"number (torchrun --nproc-per-node {size})"
        )
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % size:
            raise ValueError(
                f"{name}={getattr(config, name)} cannot be split over {size} processes: "
                "expected a number of processes that divides it"
            )
    if size > 1 and importlib.util.find_spec("accelerate") is None:
        raise ImportError("distributed_config needs accelerate: pip install accelerate")
    return size


def is_sharded(lm_head: torch.nn.Module) -> bool:
    """Whether each process computes only a shard of the vocabulary. A module of FSDP gathers its
    weight when it is called."""
    weight = getattr(lm_head, "weight", None)
    return isinstance(weight, DTensor) and not isinstance(lm_head, FSDPModule)


def is_tensor_parallel(model: PreTrainedModel) -> bool:
    """Whether each process computes a share of the model, for the same canvas."""
    return is_sharded(model.lm_head) and not isinstance(model, FSDPModule)


def is_fully_sharded(model: PreTrainedModel) -> bool:
    """Whether FSDP2 keeps a shard of the weights in each process. Then a module gathers its weight
    when every process calls it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def any_process_decodes(decodes: bool, device: torch.device) -> bool:
    """Whether some process, this one included, has a forward to run. All must ask together."""
    flag = torch.tensor(int(decodes), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def local(weight: Tensor) -> Tensor:
    """This process's shard of a weight."""
    assert isinstance(weight, DTensor)
    return weight.to_local()


def group_of(lm_head: torch.nn.Module) -> dist.ProcessGroup:
    assert isinstance(lm_head.weight, DTensor)
    return lm_head.weight.device_mesh.get_group()


def score_sharded(
    hidden: Tensor,
    lm_head: torch.nn.Module,
    *,
    eligible: Tensor,
    banned: Sequence[int],
    excluded: Sequence[int],
    excluding: Tensor | None,
    ban: Tensor | None,
    temperature: float,
    seed: Tensor | None,
    noise_ids: Tensor | None,
    confidence: str,
) -> tuple[Tensor, Tensor]:
    """Token and confidence, as from `lm_head_confidence`. Each process scores its shard of the
    vocabulary, and no logits are exchanged.

    Args:
        hidden: (N, E). It and all other arguments except `lm_head` are the same in every process.
        ban: (V,), the whole vocabulary's; it is added to the logits.

    Returns:
        (N,) int64 and (N,) float32, the same in every process.
    """
    group = group_of(lm_head)
    assert isinstance(lm_head, torch.nn.Linear)
    weight = local(lm_head.weight)
    bias = None if lm_head.bias is None else local(lm_head.bias)
    start = dist.get_rank(group) * len(weight)
    if ban is not None:
        own = ban[start : start + len(weight)]
        bias = own if bias is None else bias + own
    state = lm_head_partial(
        hidden, weight, bias, vocab_start=start, banned=banned, excluded=excluded,
        excluding=excluding, temperature=temperature, seed=seed, noise_ids=noise_ids,
        confidence=confidence,
    )  # fmt: skip
    states = state.new_empty((dist.get_world_size(group), *state.shape))
    dist.all_gather(list(states.unbind()), state, group=group)  # fills `states` by rank
    return combine_partials(states, eligible=eligible, banned=banned, confidence=confidence)


def agree(lm_head: torch.nn.Module, seed: Tensor) -> None:
    """Overwrite the seed with the first process's: each process has its own random generator."""
    dist.broadcast(seed, group=group_of(lm_head), group_src=0)

"""Processes that share a model get the tokens of one. This file is also what they run."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

import dsb_runtime as dsb
from dsb_kernels.score import CONFIDENCES
from dsb_runtime.engine.parallel import check_distributed
from tests import golden
from tests.commands import python
from tests.random_models import SMALL

RESTRICTED = {"banned_tokens": (*range(100, 300), 400), "min_new_tokens": 12}
SAMPLING = {"llada": {"temperature": 0.7}, "dream": {"temperature": 0.7, "top_p": 0.9}}


def decode_case(model: Any, case: dict[str, Any]) -> list[int]:
    out = dsb.generate(model, torch.tensor([case["prompt"]]), **golden.settings(case))
    return out.sequences[0].tolist()


def decode_batch(model: Any, threshold: float | None = 0.5, **settings: Any) -> list[list[int]]:
    """Three left-padded prompts; random numbers as each process happens to have them."""
    ids, mask = golden.left_pad(golden.prompts(3))
    shape = {"gen_length": 16, "block_length": 8, "threshold": threshold}
    return dsb.generate(model, ids, attention_mask=mask, **shape, **settings).sequences.tolist()


def decode_ranked(model: Any, confidence: str) -> list[list[int]]:
    """By a quota, the rule that every confidence fits."""
    return decode_batch(model, threshold=None, steps=8, confidence=confidence)


def decode_fully_sharded() -> list[list[int]]:
    """FSDP2 shards every layer and the model. Each process decodes two prompts of its own, which
    take another number of forwards, before and after a step of training."""
    model = dsb.load_model(golden.DATA / "llada", dtype="float32")
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return decode_between_steps(model, dist.get_rank())


def decode_between_steps(model: Any, rank: int) -> list[list[int]]:
    prompt, gen_length = torch.tensor([[5 + rank, 6, 7]]), 8 * (1 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    decoded = []
    for _ in range(2):
        out = dsb.generate(model, prompt, gen_length=gen_length, block_length=8, steps=gen_length)
        decoded.append([out.nfe, *out.sequences[0].tolist()])
        model(torch.tensor([[5, 6, 511, 8]])).logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return decoded


def work(folder: Path) -> None:
    """What each process does: decode, and write down what came out."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    options = {"dtype": "float32", "distributed_config": DistributedConfig(tp_plan="auto")}
    for family in golden.FAMILIES:
        model = dsb.load_model(golden.DATA / family, **options)
        theirs = AutoModelForCausalLM.from_pretrained(golden.DATA / family, **options)
        torch.manual_seed(dist.get_rank())
        results[family] = {
            "heads": model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] // 16,
            "vocabulary": model.lm_head.weight.to_local().shape[0],
            "golden": [decode_case(model, case) for case in golden.one_of_each(family)],
            "batch": [decode_ranked(model, kind) for kind in CONFIDENCES],
            "drafts": decode_batch(model, threshold=None, steps=8, drafts=1),
            "sampled": decode_batch(model, **SAMPLING[family]),
            "guided": decode_batch(model, cfg_scale=1.5),
            "restricted": decode_batch(model, **RESTRICTED),
            "patched": decode_case(dsb.patch(theirs), golden.cases(family)[0]),
        }
    results["fully sharded"] = decode_fully_sharded()
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    # Ending the process group aborts one process in ten or so (torch 2.11, gloo, busy cores).
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes decoded."""
    folder = tmp_path_factory.mktemp("ranks")
    # No GPU: transformers would otherwise put each process on one of its own.
    python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
        "-m", "tests.test_tensor_parallel", folder, env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("family", golden.FAMILIES)
def test_two_processes_decode_what_one_does(ranks, family):
    """The golden trajectories, a batch by each confidence, and a model that transformers itself
    loaded and split. Both processes come to the same, also where they sample."""
    model, split = golden.model(family), ranks[0][family]
    assert ranks[1][family] == split
    assert split["heads"] == model.config.num_attention_heads // 2
    assert split["vocabulary"] == model.config.vocab_size // 2
    assert split["golden"] == [case["sequence"] for case in golden.one_of_each(family)]
    assert split["batch"] == [decode_ranked(model, kind) for kind in CONFIDENCES]
    assert split["guided"] == decode_batch(model, cfg_scale=1.5) != decode_batch(model)
    assert split["restricted"] == decode_batch(model, **RESTRICTED) != decode_batch(model)
    assert split["drafts"] == decode_batch(model, threshold=None, steps=8)
    assert split["patched"] == golden.cases(family)[0]["sequence"]
    assert not any(model.dsb.mask_id in row for row in split["sampled"])


@pytest.mark.slow
def test_fully_sharded_models_decode_between_training_steps(ranks):
    for rank in range(2):
        expected = decode_between_steps(copy.deepcopy(golden.model("llada")), rank)
        assert ranks[rank]["fully sharded"] == expected
        assert expected[0] != expected[1]


# --- what cannot be split ------------------------------------------------------------------------


AUTO = {"tp_plan": "auto"}


@pytest.mark.parametrize(
    ("processes", "plan", "changes", "said"),
    [
        (3, AUTO, {}, ("num_attention_heads=4 cannot be split over 3",)),
        (4, AUTO, {}, ("num_key_value_heads=2 cannot be split over 4",)),
        (2, AUTO, {"vocab_size": 511}, ("vocab_size=511 cannot be split",)),
        (2, {"tp_size": 4}, {}, ("tp_size=4: started with 2 processes; ", "torchrun")),
        (1, {"tp_size": 2}, {}, ("tp_size=2: started with 1 process; ", "per-node 2")),
        (2, {"fsdp_size": 2}, {}, ("fsdp_size=2: only tensor parallelism",)),
        (2, {"tp_plan": {"lm_head": "colwise"}}, {}, ("expected 'auto'",)),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(monkeypatch, processes, plan, changes, said):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with golden.refusal(*said):
        check_distributed(DistributedConfig(**plan), LlamaConfig(**{**SMALL, **changes}))


def test_load_model_refuses_other_plans_and_a_device_beside_one():
    with golden.refusal("distributed_config=str: ", "DistributedConfig", kind=TypeError):
        dsb.load_model(golden.DATA / "llada", distributed_config="auto")
    with golden.refusal("device='cpu': distributed_config picks it"):
        plan = DistributedConfig(**AUTO)
        dsb.load_model(golden.DATA / "llada", device="cpu", distributed_config=plan)


def test_one_process_needs_no_torchrun():
    plan = DistributedConfig(**AUTO)
    model = dsb.load_model(golden.DATA / "llada", dtype="float32", distributed_config=plan)
    expected = decode_batch(golden.model("llada"))
    assert decode_batch(model.cpu()) == expected


if __name__ == "__main__":
    work(Path(sys.argv[1]))

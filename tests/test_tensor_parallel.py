"""Two processes that share a model get the tokens of one. This file is also what they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.distributed import DistributedConfig

import dsb_runtime as dsb
from dsb_kernels.score import CONFIDENCES
from dsb_runtime.engine.parallel import check_distributed
from tests import golden

ROOT = Path(__file__).parents[1]
SAMPLING = {"llada": {"temperature": 0.7}, "dream": {"temperature": 0.7, "top_p": 0.9}}
ROWS = [[5, 6, 7, 8, 9, 10], [40, 41], [300, 3, 30, 13]]


def one_of_each(family: str) -> list[dict[str, Any]]:
    """The first golden trajectory of every method and rule."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case in golden.cases(family):
        found.setdefault((case["method"], case["rule"]), case)
    return list(found.values())


def decode_batch(model: Any, threshold: float | None = 0.5, **settings: Any) -> list[list[int]]:
    """Three left-padded prompts; random numbers as each process happens to have them."""
    width = max(map(len, ROWS))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ROWS])
    out = dsb.generate(
        model,
        ids,
        attention_mask=mask,
        gen_length=16,
        block_length=8,
        threshold=threshold,
        **settings,
    )
    return out.sequences.tolist()


def decode_ranked(model: Any, confidence: str) -> list[list[int]]:
    """By a quota, the rule that every confidence fits."""
    return decode_batch(model, threshold=None, steps=8, confidence=confidence)


def decode_patched(family: str) -> list[int]:
    """The first golden trajectory, by a model that transformers itself loaded and split."""
    model = AutoModelForCausalLM.from_pretrained(
        golden.DATA / family, dtype="float32", distributed_config=DistributedConfig(tp_plan="auto")
    )
    case = golden.cases(family)[0]
    out = dsb.patch(model).dsb_generate(torch.tensor([case["prompt"]]), **golden.settings(case))
    return out.sequences[0].tolist()


def work(folder: Path) -> None:
    """What each process does: decode, and write down what came out."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for family in golden.FAMILIES:
        model = dsb.load_model(
            golden.DATA / family, dtype="float32",
            distributed_config=DistributedConfig(tp_plan="auto"),
        )  # fmt: skip
        torch.manual_seed(dist.get_rank())
        results[family] = {
            "heads": model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] // 16,
            "vocabulary": model.lm_head.weight.to_local().shape[0],
            "golden": [
                dsb.generate(
                    model, torch.tensor([case["prompt"]]), **golden.settings(case)
                ).sequences[0].tolist()
                for case in one_of_each(family)
            ],
            "batch": [decode_ranked(model, kind) for kind in CONFIDENCES],
            "sampled": decode_batch(model, **SAMPLING[family]),
            "patched": decode_patched(family),
        }  # fmt: skip
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    # Ending the process group aborts one process in ten or so (torch 2.11, gloo, busy cores).
    os._exit(0)


def torchrun(folder: Path, processes: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes), "-m", "tests.test_tensor_parallel", str(folder),
    ]  # fmt: skip
    # No GPU: transformers would otherwise put each process on one of its own.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes decoded."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(folder, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_process_decodes_the_same(ranks):
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_the_model_is_split(ranks, family):
    config = golden.model(family).config
    for rank in ranks:
        assert rank[family]["heads"] == config.num_attention_heads // 2
        assert rank[family]["vocabulary"] == config.vocab_size // 2


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_two_processes_decode_the_golden_trajectories(ranks, family):
    expected = [case["sequence"] for case in one_of_each(family)]
    assert ranks[0][family]["golden"] == expected


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_two_processes_decode_a_batch_as_one_does(ranks, family):
    """By each confidence."""
    model = golden.model(family)
    assert ranks[0][family]["batch"] == [decode_ranked(model, kind) for kind in CONFIDENCES]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_a_patched_model_may_be_split(ranks, family):
    assert ranks[0][family]["patched"] == golden.cases(family)[0]["sequence"]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_sampling_leaves_no_mask(ranks, family):
    mask = golden.model(family).dsb.mask_id
    assert not any(mask in row for row in ranks[0][family]["sampled"])


# --- what cannot be split ------------------------------------------------------------------------


def config(**changes: int) -> LlamaConfig:
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


@pytest.mark.parametrize(
    ("processes", "plan", "changes", "error", "message"),
    [
        (3, {"tp_plan": "auto"}, {}, ValueError, "num_attention_heads=4 cannot be split over 3"),
        (4, {"tp_plan": "auto"}, {}, ValueError, "num_key_value_heads=2 cannot be split over 4"),
        (2, {"tp_plan": "auto"}, {"vocab_size": 511}, ValueError, "vocab_size=511 cannot be split"),
        (2, {"tp_size": 4}, {}, ValueError, "tp_size=4: started with 2 processes; .*torchrun"),
        (1, {"tp_size": 2}, {}, ValueError, "tp_size=2: started with 1 process; .*per-node 2"),
        (2, {"fsdp_size": 2}, {}, ValueError, "fsdp_size=2: only tensor parallelism"),
        (2, {"tp_plan": {"lm_head": "colwise"}}, {}, ValueError, "expected 'auto'"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(
    monkeypatch, processes, plan, changes, error, message
):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(error, match=message) as caught:
        check_distributed(DistributedConfig(**plan), config(**changes))
    assert "\n" not in str(caught.value)


def test_the_plan_must_be_transformers_own():
    with pytest.raises(TypeError, match=r"distributed_config=str: .*DistributedConfig"):
        dsb.load_model(golden.DATA / "llada", distributed_config="auto")


def test_the_device_is_the_plans_choice():
    with pytest.raises(ValueError, match=r"device='cpu': distributed_config picks it"):
        dsb.load_model(
            golden.DATA / "llada",
            device="cpu",
            distributed_config=DistributedConfig(tp_plan="auto"),
        )


def test_one_process_needs_no_torchrun():
    model = dsb.load_model(
        golden.DATA / "llada", dtype="float32", distributed_config=DistributedConfig(tp_plan="auto")
    )
    expected = decode_batch(golden.model("llada"))
    assert decode_batch(model.cpu()) == expected


if __name__ == "__main__":
    work(Path(sys.argv[1]))

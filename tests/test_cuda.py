"""The engine on a GPU: CUDA graphs against direct steps, and the golden trajectories by kernel."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from dsb_kernels.lm_head import lm_head_confidence
from tests import golden

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"gen_length": 24, "block_length": 8}


@pytest.fixture(scope="module")
def engines() -> dict[tuple[str, bool], dsb.Engine]:
    engines = {}
    for family in golden.FAMILIES:
        model = dsb.load_model(golden.DATA / family, dtype="float32", device="cuda")
        for graphs in (False, True):
            engines[family, graphs] = dsb.Engine(model, graphs=graphs)
    return engines


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("family", "index"), golden.CASES)
def test_trajectory(engines, family, index, graphs):
    for _ in range(2):  # captured, then replayed
        golden.check_trajectory(engines[family, graphs].generate, family, index, "cuda")


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_batches_seeds_and_policies_are_the_same_with_graphs(engines, family):
    ids, mask = (t.cuda() for t in golden.left_pad(golden.prompts(3)))
    for settings in ({}, {"temperature": 1.0}, {"refresh_policy": "response"}, {"cache": "none"}):
        runs = [
            engines[family, graphs].generate(
                ids, attention_mask=mask, generator=torch.Generator("cuda").manual_seed(1),
                **SHAPE, **settings,
            ).sequences.tolist()
            for graphs in (False, True, True)
        ]  # fmt: skip
        assert runs[0] == runs[1] == runs[2]


def test_captures_anew_where_the_cache_grows_beside_another_engine(engines):
    """Torch's matmuls leave workspace in the pool, and with the stream, of what is captured."""
    pair = [dsb.Engine(engines["llada", True].model) for _ in range(2)]
    for rows in (2, 4):
        ids, mask = (t.cuda() for t in golden.left_pad(golden.prompts(rows)))
        expected = engines["llada", False].generate(ids, attention_mask=mask, **SHAPE)
        for engine in (*pair, *pair):  # captured, then replayed
            out = engine.generate(ids, attention_mask=mask, **SHAPE)
            assert torch.equal(out.sequences, expected.sequences)


def test_bfloat16_scores_as_its_definition():
    """At production tiles, by the tensor cores."""
    torch.manual_seed(0)
    hidden = torch.randn(48, 256, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(5000, 256, dtype=torch.bfloat16, device="cuda")
    token, confidence = lm_head_confidence(hidden, weight)
    exact = (hidden.double() @ weight.double().T).softmax(-1)
    plain = torch.nn.functional.linear(hidden, weight).float().softmax(-1)
    error = (plain.amax(-1) - exact.amax(-1)).abs().max()
    assert (confidence - exact.gather(1, token[:, None])[:, 0]).abs().max() <= 2 * error

"""refresh_policy="response" against a plain loop over transformers' own forward passes."""

from __future__ import annotations

import pytest
import torch

import dsb_runtime as dsb
from dsb_kernels.method import Row
from dsb_runtime.engine.cache import WindowCache
from tests import golden
from tests.test_attention_backend import cache_argument
from tests.test_decode import left_pad, prompts

SHAPE = {"gen_length": 32, "block_length": 8}


@torch.no_grad()
def plain_loop(
    family: str, prompt: torch.Tensor, cache: str, every: int | None, threshold: float
) -> tuple[list[int], list[str]]:
    """Tokens and the kinds of forwards; every refresh is full where `every` is None."""
    model = golden.model(family)
    shift = int(model.dsb.family.shift)
    first_only = model.dsb.family.refresh_commit == "first"
    row = Row(
        prompt=len(prompt), gen=32, block=8, max_block=None, schedule="dsb", cache=cache,
        prefix_window=model.dsb.family.prefix_window, rule="threshold", value=threshold, steps=0,
        refresh_commit="first" if first_only else "select",
        min_prefix=int(shift and not first_only), stop_at_eos=False,
    )  # fmt: skip
    canvas = torch.cat([prompt, prompt.new_full((32,), model.dsb.mask_id)])
    kept = WindowCache(model.config.num_hidden_layers, 1, len(canvas))
    kinds: list[str] = []
    while not row.done:
        refreshes = len(kinds) - kinds.count("window")
        kind = "window" if not row.refresh else "refresh"
        if kind == "refresh" and every is not None and refreshes % every:
            kind = "response"
        first, last = {
            "refresh": (0, len(canvas)), "response": (len(prompt) - shift, len(canvas)),
            "window": (row.s - row.p, row.e),
        }[kind]  # fmt: skip
        width = None if kind == "refresh" else last - first
        kept.point(None, torch.tensor([first]), torch.tensor([last - first]), width)
        positions = torch.arange(first, last)
        logits = model(
            canvas[None, first:last], position_ids=positions[None], **{cache_argument(model): kept}
        ).logits[0]
        at = row.candidates()
        scores = logits[[max(i - shift, 0) - first for i in at]].double().softmax(-1)
        allowed = scores.clone()
        allowed[:, model.dsb.mask_id] = -1
        tokens = allowed.argmax(-1)
        confidences = scores.gather(1, tokens[:, None])[:, 0].tolist()
        for i in row.advance([7] * len(at), confidences):
            canvas[i] = tokens[at.index(i)]
        kinds.append(kind)
    return canvas.tolist(), kinds


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["dsb", "dual"])
@pytest.mark.parametrize("every", [None, 2, 3, 100])
def test_equals_the_plain_loop(family, cache, every):
    policy = {} if every is None else {"refresh_policy": "response", "full_refresh_every": every}
    for prompt in prompts(3):
        expected, kinds = plain_loop(family, prompt, cache, every, 0.5)
        seen: list[str] = []
        out = dsb.generate(
            golden.model(family), prompt[None], cache=cache, threshold=0.5,
            on_step=lambda e, seen=seen: seen.append(e.kind), **SHAPE, **policy,
        )  # fmt: skip
        assert out.sequences[0].tolist() == expected
        assert seen == kinds
        assert ("response" in seen) == (every is not None)


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_batch_rows_equal_single_runs(family):
    rows = prompts(3)
    ids, mask = left_pad(rows)
    policy = {"refresh_policy": "response", "threshold": 0.5, **SHAPE}
    batch = dsb.generate(golden.model(family), ids, attention_mask=mask, **policy)
    for i, row in enumerate(rows):
        alone = dsb.generate(golden.model(family), row[None], **policy)
        assert batch.sequences[i, -32:].tolist() == alone.sequences[0, -32:].tolist()
        assert batch.row_nfe[i] == alone.nfe


def test_the_default_is_a_full_refresh_in_four():
    kinds: list[str] = []
    dsb.generate(
        golden.model("llada"), prompts(1)[0][None], gen_length=40, block_length=4, steps=40,
        refresh_policy="response", on_step=lambda e: kinds.append(e.kind),
    )  # fmt: skip
    refreshes = [k for k in kinds if k != "window"]
    assert refreshes[:8] == ["refresh", *["response"] * 3] * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"refresh_policy": "none"}, "refresh_policy='none'"),
        ({"refresh_policy": "response", "cache": "none"}, "refresh_policy='response'"),
        ({"full_refresh_every": 3}, "full_refresh_every=3"),
        ({"refresh_policy": "response", "full_refresh_every": 1}, "full_refresh_every=1"),
    ],
)
def test_bad_settings(settings, named):
    with pytest.raises(ValueError, match=named):
        dsb.DecodingConfig(**settings)

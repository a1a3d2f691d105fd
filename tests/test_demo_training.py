"""The embedded model's training script: batches, resuming, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from dsb_runtime.demo.tokenizer import build_tokenizer
from tools.embedded_model import train
from tools.embedded_model.train import Settings

TINY = Settings(steps=6, batch_size=2, hidden=16, layers=2, heads=2, mlp=24, warmup_steps=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_batches_are_masked_canvases(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = Settings(steps=60, batch_size=4)
    lengths = set()
    for step in range(60):
        batch = train.make_batch(settings, tokenizer, step)
        canvas = batch.input_ids[:, -batch.targets.shape[1] :]
        masked = canvas == tokenizer.mask_token_id
        assert torch.equal(batch.weights > 0, masked)
        assert torch.equal(canvas[~masked], batch.targets[~masked])
        assert (batch.input_ids[:, : -batch.targets.shape[1]] != tokenizer.mask_token_id).all()
        assert (batch.targets[:, -1] == tokenizer.eos_token_id).all()
        lengths.add(batch.targets.shape[1])
    assert {64, train.CANVAS} <= lengths and max(lengths) == train.CANVAS
    again = train.make_batch(settings, tokenizer, 59)
    assert torch.equal(again.input_ids, batch.input_ids)


def test_attention_sees_both_ways(tokenizer: PreTrainedTokenizerFast) -> None:
    model = train.build_model(TINY, tokenizer).eval()
    ids = torch.arange(5, 25)[None]
    before = model(input_ids=ids).logits[0, 0]
    ids[0, -1] = 99
    assert not torch.equal(model(input_ids=ids).logits[0, 0], before)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, complete = train.train(TINY, tmp_path / "whole.pt", CPU)
    assert complete
    _, complete = train.train(TINY, tmp_path / "parts.pt", CPU, stop_after=3)
    assert not complete
    parts, complete = train.train(TINY, tmp_path / "parts.pt", CPU)
    assert complete
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert not list(tmp_path.glob("*.tmp"))


def test_loss_falls(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = Settings(steps=400, batch_size=8, hidden=32, layers=1, heads=2, mlp=64)
    model = train.build_model(settings, tokenizer)
    optimizer = train.build_optimizer(settings, model)
    losses = []
    for step in range(30):  # of one-step problems, the curriculum's beginning
        loss = train.batch_loss(model, train.make_batch(settings, tokenizer, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_export_is_in_the_llada_format(tmp_path: Path) -> None:
    assert run(tmp_path, "--steps", "1") == 0
    out = tmp_path / "model"
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    block = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    names = {f"blocks.{i}.{n}" for i in range(4) for n in (*block, "attn_norm", "ff_norm")}
    names |= {"wte", "ln_f", "ff_out"}
    assert set(weights) == {f"model.transformer.{name}.weight" for name in names}
    assert all(value.dtype == torch.float32 for value in weights.values())
    width, inner, vocab = (config[k] for k in ("d_model", "mlp_hidden_size", "embedding_size"))
    assert weights["model.transformer.wte.weight"].shape == (vocab, width)
    assert weights["model.transformer.blocks.0.ff_proj.weight"].shape == (inner, width)
    assert weights["model.transformer.blocks.0.ff_out.weight"].shape == (width, inner)
    assert config["model_type"] == "llada" and config["max_sequence_length"] >= 256
    assert config["mask_token_id"] == build_tokenizer().mask_token_id
    assert sum(f.stat().st_size for f in out.iterdir()) < 10e6

    # On demand, from the checkpoint alone, the same files come out.
    written = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    assert run(tmp_path, "--steps", "1", "--export-only") == 0
    assert (out / "model.safetensors").read_bytes() == written


def test_bad_arguments_are_one_line_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bad in (["--steps", "0"], ["--threads", "0"], ["--device", "tpu"], ["--export-only"]):
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, *bad)
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert ("--checkpoint" if bad == ["--export-only"] else bad[0]) in error
    (tmp_path / "model.checkpoint.pt").write_bytes(b"cut off")
    assert run(tmp_path) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train.train(TINY, tmp_path / "run.pt", CPU, stop_after=1)
    other = Settings(**{**vars(TINY), "seed": 5})
    with pytest.raises(ValueError, match=r"^seed=5: .* was made with 0"):
        train.train(other, tmp_path / "run.pt", CPU)


def run(folder: Path, *arguments: str) -> int:
    """The script's command line, writing to ``folder / "model"``; its exit status."""
    return train.main(["--out", str(folder / "model"), "--device", "cpu", *arguments])

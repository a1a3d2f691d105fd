"""The embedded model's problems, tokenizer and training script."""

from __future__ import annotations

import json
import re
from operator import add, floordiv, mul, sub
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsb_runtime.demo import MODEL_DIR, problems
from dsb_runtime.demo.problems import Problem
from dsb_runtime.demo.tokenizer import build_tokenizer, chat_text
from tools.embedded_model import train, words
from tools.embedded_model.course import Settings

APPLY = {"+": add, "-": sub, "*": mul, "/": floordiv}
VERBS = dict.fromkeys(problems.GAINS, "+") | dict.fromkeys(problems.LOSSES, "-")
PHRASES = dict.fromkeys(problems.REST_DAYS, ("+", 0))
PHRASES |= {problems.DOUBLING: ("*", 2), problems.HALVING: ("/", 2)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return [problems.problem(seed) for seed in range(2000)] + problems.heldout(500)


def chain(item: Problem) -> tuple[str, ...]:
    """The operations of a solution without days, names and things."""
    steps = re.findall(r"day (\d+) ([-+*/]) (\d+) = ", item.response)
    return (steps[0][0], *(f"{operator}{operand}" for _, operator, operand in steps))


def solve(prompt: str) -> tuple[str, int]:
    """The solution of a problem and its answer. Every number must be a natural one below 100."""
    total, words = int(re.search(r"has (\d+) ", prompt).group(1)), []
    for day, change in re.findall(r"(\w+day) s?he ([^.]+)\.", prompt):
        if change in PHRASES:
            operator, operand = PHRASES[change]
        else:
            verb, number = change.split()
            operator, operand = VERBS[verb], int(number)
        assert operator != "/" or total % operand == 0
        result = APPLY[operator](total, operand)
        assert 0 <= result <= 99
        words.append(f"{day} {total} {operator} {operand} = {result}.")
        total = result
    return " ".join([*words, f"Answer {total}."]), total


def test_a_seed_names_one_problem():
    assert problems.problem(7) == problems.problem(7) != problems.problem(8)
    problem_set = problems.heldout(20, seed=3)
    assert problem_set == problems.heldout(20, seed=3) != problems.heldout(20, seed=4)
    # Pinned: the weights were trained on these very problems.
    pinned = problems.problem(2)
    assert pinned.prompt == "Paul has 4 figs. Monday he stays home. How many figs now?"
    assert pinned.response == "Monday 4 + 0 = 4. Answer 4."


def test_the_prompt_determines_the_solution(many):
    for item in many:
        assert (item.response, item.answer) == solve(item.prompt)
        days = re.findall(r"(\w+day) ", item.response)
        assert len(days) == len(set(days)) == item.steps


def test_held_out_chains_are_never_trained_on(many):
    trained = [problems.problem(seed, "train", steps) for steps in (1, 2, 6) for seed in range(800)]
    heldout = problems.heldout(800) + problems.heldout(100, steps=1)
    assert not {chain(item) for item in trained} & {chain(item) for item in heldout}
    assert not any(problems.is_heldout(item) for item in trained)
    assert all(problems.is_heldout(item) for item in heldout)
    assert len({item.prompt for item in heldout[:800]}) == 800
    assert {item.steps for item in heldout[:800]} == set(range(1, problems.MAX_STEPS + 1))


def test_answers_are_read_before_the_first_eos():
    item = problems.problem(2)
    assert problems.extract_answer("Answer 28. <|endoftext|> Answer 3.") == 28
    assert problems.extract_answer("<|endoftext|> Answer 3.") is None
    assert problems.extract_answer("Monday 1 + 1 = 2.") is None
    assert problems.is_exact(item, item.response)
    assert not problems.is_exact(item, item.response.replace("Answer 4", "Answer 5"))


def test_bad_arguments_are_named():
    for name, bad in (("split", "test"), ("steps", 0), ("steps", 7)):
        with pytest.raises(ValueError, match=f"^{name}="):
            problems.problem(0, **{name: bad})
    with pytest.raises(ValueError, match=r"^n=0"):
        problems.heldout(0)


def test_text_survives_the_tokenizer(tokenizer, many):
    for item in many[::5]:
        for text in (item.prompt, item.response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert len(tokenizer(item.response)["input_ids"]) == 3 + 7 * item.steps
        assert len(tokenizer(chat_text(item.prompt))["input_ids"]) == 12 + 5 * item.steps
    assert tokenizer("Mia has 100 dragons")["input_ids"][-2:] == [tokenizer.unk_token_id] * 2


def test_saved_tokenizer_loads_without_remote_code(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    item = problems.problem(5)
    want = tokenizer(chat_text(item.prompt))["input_ids"]
    for loader in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = loader.from_pretrained(tmp_path)
        message = [{"role": "user", "content": item.prompt}]
        got = loaded.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        assert got["input_ids"] == want
        assert loaded.mask_token_id == tokenizer.mask_token_id
        assert loaded.eos_token_id == loaded.pad_token_id == 0
        assert loaded.decode(loaded(item.response)["input_ids"]) == item.response


# --- training ----------------------------------------------------------------------------------

TINY = Settings(
    "words", steps=6, batch_size=2, hidden=16, layers=2, heads=2, mlp=24, warmup_steps=2
)
CPU = torch.device("cpu")


def test_batches_are_masked_canvases(tokenizer):
    settings = Settings("words", steps=60, batch_size=4)
    lengths = set()
    for step in range(60):
        batch = words.make_batch(settings, tokenizer, step)
        canvas = batch.input_ids[:, -batch.targets.shape[1] :]
        masked = canvas == tokenizer.mask_token_id
        assert torch.equal(batch.weights > 0, masked)
        assert torch.equal(canvas[~masked], batch.targets[~masked])
        assert (batch.input_ids[:, : -batch.targets.shape[1]] != tokenizer.mask_token_id).all()
        assert (batch.targets[:, -1] == tokenizer.eos_token_id).all()
        lengths.add(batch.targets.shape[1])
    assert {64, words.CANVAS} <= lengths and max(lengths) == words.CANVAS
    assert torch.equal(words.make_batch(settings, tokenizer, 59).input_ids, batch.input_ids)


def test_attention_sees_both_ways(tokenizer):
    model = train.build_model(TINY, tokenizer).eval()
    first = [model(input_ids=torch.tensor([[5, 6, 7, last]])).logits[0, 0] for last in (8, 99)]
    assert not torch.equal(*first)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, complete = train.train(TINY, tmp_path / "whole.pt", CPU)
    assert complete
    _, complete = train.train(TINY, tmp_path / "parts.pt", CPU, stop_after=3)
    assert not complete
    parts, complete = train.train(TINY, tmp_path / "parts.pt", CPU)
    assert complete
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert not list(tmp_path.glob("*.tmp"))


def test_loss_falls(tokenizer):
    settings = Settings("words", steps=400, batch_size=8, hidden=32, layers=1, heads=2, mlp=64)
    model = train.build_model(settings, tokenizer)
    optimizer = train.build_optimizer(settings, model)
    losses = []
    for step in range(30):  # of one-step problems, the curriculum's beginning
        loss = train.batch_loss(model, words.make_batch(settings, tokenizer, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_export_is_in_the_llada_format(tmp_path):
    assert run(tmp_path, "--steps", "1") == 0
    out = tmp_path / "model"
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    shipped = load_file(MODEL_DIR / "model.safetensors")  # which the tests of `dsb` load
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in shipped.items()}
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert config == json.loads((MODEL_DIR / "config.json").read_text())
    assert sum(f.stat().st_size for f in out.iterdir()) < 10e6

    # On demand, from the checkpoint alone, the same files come out.
    written = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    assert run(tmp_path, "--steps", "1", "--export-only") == 0
    assert (out / "model.safetensors").read_bytes() == written


def test_bad_arguments_are_one_line_errors(tmp_path, capsys):
    for bad, said in (("--steps=0", "--steps"), ("--threads=0", "--threads"),
                      ("--device=tpu", "--device"), ("--export-only", "--checkpoint")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path, bad)
        assert said in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "model.checkpoint.pt").write_bytes(b"cut off")
    assert run(tmp_path) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train.train(TINY, tmp_path / "run.pt", CPU, stop_after=1)
    other = Settings(**{**vars(TINY), "seed": 5})
    with pytest.raises(ValueError, match=r"^seed=5: .* was made with 0"):
        train.train(other, tmp_path / "run.pt", CPU)


def run(folder: Path, *arguments: str) -> int:
    """The script's command line, writing to ``folder / "model"``; its exit status."""
    return train.main(["--out", str(folder / "model"), "--device", "cpu", *arguments])

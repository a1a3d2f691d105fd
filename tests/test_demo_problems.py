"""The embedded model's problems and tokenizer: arithmetic, split, round trips."""

from __future__ import annotations

import re
from operator import add, floordiv, mul, sub
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsb_runtime.demo import problems
from dsb_runtime.demo.problems import Problem
from dsb_runtime.demo.tokenizer import build_tokenizer, chat_text

STEP = re.compile(r"(\w+day) (\d+) ([-+*/]) (\d+) = (\d+)\.")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return [problems.problem(seed) for seed in range(2000)] + problems.heldout(500)


def chain(item: Problem) -> tuple[str, ...]:
    """The operations of a solution without days, names and things."""
    steps = STEP.findall(item.response)
    return (steps[0][1], *(f"{operator}{operand}" for _, _, operator, operand, _ in steps))


def test_a_seed_names_one_problem() -> None:
    assert problems.problem(7) == problems.problem(7)
    assert problems.problem(7) != problems.problem(8)
    assert problems.heldout(20, seed=3) == problems.heldout(20, seed=3)
    assert problems.heldout(20, seed=3) != problems.heldout(20, seed=4)
    # Pinned: the weights were trained on these very problems.
    pinned = problems.problem(2)
    assert pinned.prompt == "Paul has 4 figs. Monday he stays home. How many figs now?"
    assert pinned.response == "Monday 4 + 0 = 4. Answer 4."


def test_every_step_is_right_and_within_range(many: list[Problem]) -> None:
    for item in many:
        total = int(re.search(r"has (\d+) ", item.prompt).group(1))
        steps = STEP.findall(item.response)
        assert len(steps) == item.steps
        for _, left, operator, right, result in steps:
            assert int(left) == total
            apply = {"+": add, "-": sub, "*": mul, "/": floordiv}[operator]
            assert operator != "/" or total % int(right) == 0
            total = apply(total, int(right))
            assert total == int(result)
            assert 0 <= total <= 99
        assert item.response.endswith(f" Answer {total}.")
        assert item.answer == total


def test_the_prompt_determines_the_solution(many: list[Problem]) -> None:
    operators = dict.fromkeys(problems.GAINS, "+") | dict.fromkeys(problems.LOSSES, "-")
    phrases = dict.fromkeys(problems.REST_DAYS, ("+", "0"))
    phrases |= {problems.DOUBLING: ("*", "2"), problems.HALVING: ("/", "2")}
    for item in many:
        changes = []
        for day, words in re.findall(r"(\w+day) s?he ([^.]+)\.", item.prompt):
            if words in phrases:
                changes.append((day, *phrases[words]))
            else:
                verb, operand = words.split()
                changes.append((day, operators[verb], operand))
        assert changes == [(day, op, right) for day, _, op, right, _ in STEP.findall(item.response)]
        assert len({day for day, _, _ in changes}) == item.steps


def test_held_out_chains_are_never_trained_on(many: list[Problem]) -> None:
    trained = [problems.problem(seed, "train", steps) for steps in (1, 2, 6) for seed in range(800)]
    kept = problems.heldout(800) + problems.heldout(100, steps=1)
    assert not {chain(item) for item in trained} & {chain(item) for item in kept}
    assert not any(problems.is_heldout(item) for item in trained)
    assert all(problems.is_heldout(item) for item in kept)
    assert len({item.prompt for item in kept[:800]}) == 800
    assert {item.steps for item in kept[:800]} == set(range(1, problems.MAX_STEPS + 1))


def test_answers_are_read_before_the_first_eos() -> None:
    item = problems.problem(2)
    assert problems.extract_answer("Answer 28. <|endoftext|> Answer 3.") == 28
    assert problems.extract_answer("<|endoftext|> Answer 3.") is None
    assert problems.extract_answer("Monday 1 + 1 = 2.") is None
    assert problems.is_exact(item, item.response)
    assert not problems.is_exact(item, item.response.replace("Answer 4", "Answer 5"))


def test_bad_arguments_are_named() -> None:
    for name, bad in (("split", "test"), ("steps", 0), ("steps", 7)):
        with pytest.raises(ValueError, match=f"^{name}="):
            problems.problem(0, **{name: bad})
    with pytest.raises(ValueError, match=r"^n=0"):
        problems.heldout(0)


def test_text_survives_the_tokenizer(
    tokenizer: PreTrainedTokenizerFast, many: list[Problem]
) -> None:
    for item in many[::5]:
        for text in (item.prompt, item.response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert len(tokenizer(item.response)["input_ids"]) == 3 + 7 * item.steps
        assert len(tokenizer(chat_text(item.prompt))["input_ids"]) == 12 + 5 * item.steps
    assert tokenizer("Mia has 100 dragons")["input_ids"][-2:] == [tokenizer.unk_token_id] * 2


def test_saved_tokenizer_loads_without_remote_code(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
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

"""The model `dsb` of lm-evaluation-harness, called as the harness calls it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

import dsb_runtime as dsb
from dsb_kernels.rows import Row
from dsb_runtime.cli import main as command
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.problems import heldout
from dsb_runtime.demo.tokenizer import chat_text
from dsb_runtime.doors import likelihood
from dsb_runtime.doors.likelihood import Scored, are_greedy, log_likelihoods
from dsb_runtime.engine.lane import Lane
from dsb_runtime.engine.step import StepShape
from tests.checkpoints import write_chat_model
from tests.golden import refusal

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install .[eval]")

from lm_eval.api.instance import Instance  # noqa: E402

from dsb_runtime.config import settings  # noqa: E402
from dsb_runtime.doors.lm_eval import DSBLM  # noqa: E402
from dsb_runtime.doors.lm_eval_requests import answer_text, cut_at_stop  # noqa: E402

PROBLEMS = [p for steps in (1, 2, 3) for p in heldout(3, steps=steps)]
PROMPTS = [chat_text(problem.prompt) for problem in PROBLEMS]


def make(arguments: str = "", **more: Any) -> DSBLM:
    """As the harness makes it: from a string, and from its own options."""
    arguments = f"pretrained={MODEL_DIR}," + arguments
    return DSBLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 4, **more})


@pytest.fixture(scope="module")
def lm() -> DSBLM:
    return make("mc_num=8,gen_length=64")


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, a, 0, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


def answers(lm: DSBLM, prompts: list[str] = PROMPTS, **asked: Any) -> list[str]:
    return lm.generate_until(requests("generate_until", [(p, asked) for p in prompts]))


# --- arguments -----------------------------------------------------------------------------------

ARGUMENTS = [
    "gen_length=48,block_length=8,schedule=dsb,max_block_length=16,cache=dsb,prefix_window=6,"
    "suffix_window=2,threshold=0.8,progress=0.3,temperature=0.5,stop_at_eos=False,refresh_commit=first",
    "gen_length=48,block_length=8,factor=1.5,top_p=0.9,top_k=5,confidence=margin,"
    "context_masks=4,eos_bound=True",
    "gen_length=48,block_length=8,frechet=0.25,refresh_policy=response,full_refresh_every=3",
    "gen_length=48,block_length=8,steps=12,schedule=naive,cache=dual,confidence_temperature=0.5,"
    "cfg_scale=0.5",
    "gen_length=48,block_length=8,entropy=0.4,banned_tokens=12:300:14,min_new_tokens=5",
    "gen_length=48,block_length=8,eb=0.4",
]


@pytest.mark.parametrize("text", ARGUMENTS)
def test_settings_are_read_from_model_args(text):
    expected = {k: yaml.safe_load(v) for k, v in (pair.split("=") for pair in text.split(","))}
    expected.setdefault("stop_at_eos", True)
    if "banned_tokens" in expected:
        expected["banned_tokens"] = (12, 300, 14)
    assert make(text).decoding_config({}) == dsb.DecodingConfig(**expected)


def test_every_setting_is_covered_above():
    refused = {"drafts", "draft_threshold"}
    covered = {pair.split("=")[0] for text in ARGUMENTS for pair in text.split(",")}
    assert covered == set(settings()) - refused


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("treshold=0.9", TypeError, "treshold=0.9: no such argument"),
        ("threshold=1.5", ValueError, "threshold=1.5: expected a number in [0, 1]"),
        ("threshold=high", TypeError, "threshold='high': expected a number"),
        ("banned_tokens=5;6", TypeError, "banned_tokens='5;6': expected a tuple of token ids"),
        ("drafts=1", ValueError, "drafts=1: a draft costs as much as the row of another request"),
        ("mc_num=0", ValueError, "mc_num=0: expected an int >= 1"),
        ("seed=-1", ValueError, "seed=-1: expected an int from 0"),
        ("check_greedy=1", TypeError, "check_greedy=1: expected True or False"),
        ("max_length=100000", ValueError, "max_length=100000: expected an int from 2 to 512"),
        ("dtype=int7", ValueError, "dtype='int7': expected"),
        ("trust_remote_code=yes", TypeError, "trust_remote_code='yes': expected True or False"),
        ("peft=/nowhere", OSError, "adapter='/nowhere': expected an adapter folder of PEFT"),
        ("delta=/nowhere", TypeError, "delta='/nowhere': no such argument"),
    ],
)
def test_an_error_of_an_argument_is_one_line(text, error, message):
    with refusal(message, kind=error):
        make(text)


def test_a_list_of_ids(lm):
    for given, ids in ((5, (5,)), ("5:6", (5, 6)), ([5, 6], (5, 6))):
        assert lm.decoding_config({"banned_tokens": given}).banned_tokens == ids
    assert make("gen_length=64,banned_tokens=5").decoding_config({}).banned_tokens == (5,)


def test_an_answer_ends_at_a_stop_string(lm):
    """The answers are those of whole responses, cut; the forwards are fewer."""
    whole, forwards = answers(lm, until=[]), lm.measured["forwards"]
    began = lm.totals["forwards"]
    for until in (["="], [".", "<|user|>"], ["nowhere"]):
        assert answers(lm, until=until) == [cut_at_stop(answer, until) for answer in whole]
        spent, began = lm.totals["forwards"] - began, lm.totals["forwards"]
        assert spent < forwards or until == ["nowhere"]


@pytest.mark.parametrize(
    ("size", "most", "error", "message"),
    [
        ("many", None, ValueError, "batch_size='many': expected an int >= 1 or 'auto'"),
        ("auto:4", None, ValueError, "batch_size='auto:4': expected an int >= 1 or 'auto'"),
        ("9" * 30, None, ValueError, "expected an int from 1 to 2147483647"),
        (0, None, ValueError, "batch_size=0: expected an int >= 1"),
        (4, 8, ValueError, "max_batch_size=8: expected it with batch_size='auto'"),
        ("auto", 0, ValueError, "max_batch_size=0: expected an int >= 1"),
    ],
)
def test_a_wrong_batch_size_is_one_line(size, most, error, message):
    with refusal(message, kind=error):
        make(batch_size=size, max_batch_size=most)


def test_remote_code_is_passed_over(lm):
    assert answers(make("gen_length=64,trust_remote_code=True"), PROMPTS[:1]) == answers(
        lm, PROMPTS[:1]
    )


def test_a_batch_size_of_auto_is_halved_until_it_fits(lm, monkeypatch):
    auto = make("mc_num=8,gen_length=64", batch_size="auto", max_batch_size=8)
    pairs = [(PROMPTS[0], " " + PROBLEMS[0].response), ("", "Mia")]
    asked = requests("loglikelihood", pairs)
    expected, tried = lm.loglikelihood(asked), []

    def small(*args: Any, batch_size: int, **how: Any) -> list[float]:
        tried.append(batch_size)
        if batch_size > 3:
            raise torch.OutOfMemoryError("a forward")
        return log_likelihoods(*args, batch_size=batch_size, **how)

    monkeypatch.setattr("dsb_runtime.doors.lm_eval.log_likelihoods", small)
    for actual, (total, greedy) in zip(auto.loglikelihood(asked), expected, strict=True):
        assert actual == (pytest.approx(total, abs=1e-3), greedy)
    assert tried == [8, 4, 2]
    assert auto.batch_sizes == {0: 2} and lm.batch_sizes == {}
    # A batch that was named is not made smaller, and one of 1 cannot be.
    with pytest.raises(torch.OutOfMemoryError):
        make("mc_num=8,gen_length=64", batch_size="4").loglikelihood(asked)


def test_answers_take_as_many_rows_as_fit(lm, monkeypatch):
    expected, launch, rows = answers(lm), Lane.launch, []

    def small(lane: Lane, shape: StepShape) -> list[Row]:
        if shape.num_rows > 3:
            raise torch.OutOfMemoryError("a window step")
        rows.append(shape.num_rows)
        return launch(lane, shape)

    monkeypatch.setattr(Lane, "launch", small)
    assert answers(lm) == expected and 1 < max(rows) <= 3
    monkeypatch.setattr(Lane, "launch", lambda lane, shape: small(lane, replace(shape, num_rows=9)))
    with pytest.raises(torch.OutOfMemoryError, match="a refresh step of 1 x"):
        answers(lm)


def test_an_adapter(lm, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False, lora_alpha=64)
    adapted = peft.get_peft_model(dsb.load_model(MODEL_DIR, device="cpu"), config)
    adapted.save_pretrained(tmp_path)
    actual = make(f"gen_length=64,peft={tmp_path}")
    plain = answers(lm, PROMPTS[:2])
    assert actual.model.dsb == lm.model.dsb and answers(actual, PROMPTS[:2]) != plain
    actual.model = adapted
    assert answers(make(f"gen_length=64,peft={tmp_path}"), PROMPTS[:2]) == answers(
        actual, PROMPTS[:2]
    )


def test_what_a_request_asks_for(lm):
    """Fields of one configuration, for `generation_kwargs` beside gen_length=64."""

    for asked, expected in (
        ({}, {"gen_length": 64, "block_length": 16, "threshold": 0.9}),
        ({"max_gen_toks": 10}, {"gen_length": 10, "block_length": 2}),
        ({"max_gen_toks": 500}, {"gen_length": 64}),
        ({"max_new_tokens": 7}, {"gen_length": 7}),
        ({"threshold": 0.5}, {"threshold": 0.5}),
        ({"steps": 8}, {"threshold": None, "steps": 8}),
        ({"temperature": 0.7, "do_sample": True}, {"temperature": 0.7}),
        ({"temperature": 0.7, "do_sample": False}, {"temperature": 0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"top_p": 0.9}),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": 0}, {"top_p": None, "top_k": None}),
        ({"temperature": 0.0, "top_p": 0.9}, {"top_p": None}),
    ):
        assert vars(lm.decoding_config(asked)).items() >= expected.items()
    with pytest.raises(ValueError, match="max_gen_toks=0: expected an int >= 1"):
        lm.decoding_config({"max_gen_toks": 0})
    for name, value in (("repetition_penalty", 1.2), ("num_beams", 4), ("stop_strings", ["a"])):
        with refusal(f"generation_kwargs {name}={value!r}: model dsb cannot honour it; expected"):
            lm.decoding_config({name: value})
    # Named settings follow a short request.
    config = make("block_length=32").decoding_config({"max_gen_toks": 8})
    assert (config.gen_length, config.block_length) == (8, 8)
    fitting = make("gen_length=32,steps=16,min_new_tokens=24")
    for asked, steps in (
        ({"max_gen_toks": 16}, 8), ({"gen_length": 16}, 8), ({"max_gen_toks": 16, "steps": 9}, 9),
        ({"max_gen_toks": 40}, 16), ({"gen_length": 64}, 32),
    ):  # fmt: skip
        config = fitting.decoding_config(asked)
        assert (config.steps, config.min_new_tokens) == (steps, min(24, config.gen_length))
    with refusal("gen_length='x': expected an int", kind=TypeError):
        fitting.decoding_config({"max_gen_toks": 8, "gen_length": "x"})


def test_what_means_nothing_is_said_once(lm, caplog):
    with caplog.at_level("WARNING", logger="lm_eval"):
        lm.warned.clear()
        answers(lm, PROMPTS[:2], num_beams=1, until=[])
    assert [r.getMessage() for r in caplog.records] == [
        "generation_kwargs num_beams=1 means nothing to model dsb"
    ]


# --- generation ----------------------------------------------------------------------------------


def test_answers_are_those_of_generate_one_by_one(lm):
    expected, tokens, forwards = [], 0, 0
    for prompt in PROMPTS:
        ids = lm.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = dsb.generate(lm.model, ids, gen_length=64, block_length=16, stop_at_eos=True)
        tokens, forwards = tokens + out.row_tokens[0], forwards + out.nfe
        text = lm.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        expected.append(text)
    fresh = make("gen_length=64")
    assert answers(fresh) == expected
    assert fresh.measured["answers"] == len(PROMPTS)
    assert fresh.measured["tokens"] == tokens and fresh.measured["forwards"] == forwards
    assert fresh.measured["tokens_per_forward"] == tokens / forwards
    assert fresh.measured["tokens_per_second"] == tokens / fresh.measured["seconds"]
    exact = sum(f"Answer {p.answer}." in text for p, text in zip(PROBLEMS, expected, strict=True))
    assert exact >= 7, "the embedded model must answer, or this shows nothing"


def test_stop_strings_are_honoured(lm):
    for stops, expected in (
        ([], "a b c"), (["c", "b"], "a "), (["", "x"], "a b c"), (["a"], ""),
    ):  # fmt: skip
        assert cut_at_stop("a b c", stops) == expected
    whole = answers(lm)
    assert all("Tuesday" in text for text in whole[3:])
    assert answers(lm, until=["Answer", "Tuesday"]) == [
        text.split("Answer")[0].split("Tuesday")[0] for text in whole
    ]
    assert answers(lm, until="Answer") == [text.split("Answer")[0] for text in whole]
    # Special tokens stop too.
    ids = lm.tokenizer.encode("Monday <|user|> Tuesday", add_special_tokens=False)
    eos_ids = lm.model.dsb.eos_ids
    assert answer_text(lm.tokenizer, ids, eos_ids, []) == "Monday Tuesday"
    assert answer_text(lm.tokenizer, ids, eos_ids, ["<|user|>"]) == "Monday"
    # A stop string that is no token is not the unknown token.
    unknown = [lm.tokenizer.unk_token_id, ids[0]]
    assert answer_text(lm.tokenizer, unknown, eos_ids, ["nowhere"]) == "Monday"
    assert answer_text(lm.tokenizer, [ids[0], *eos_ids, ids[2]], eos_ids, []) == "Monday"


def test_an_answer_keeps_its_spaces(tmp_path, capsys):
    """A tokenizer may ask to remove those before punctuation. The text is that of stop strings."""
    folder = write_chat_model(tmp_path)
    for name, old, new in (
        ("tokenizer.json", '"w401":', '",":'),
        ("tokenizer_config.json", "{", '{"clean_up_tokenization_spaces": true,'),
    ):
        file = folder / name
        file.write_text(file.read_text().replace(old, new, 1))
    spaced = DSBLM(str(folder), device="cpu", gen_length=16)
    assert spaced.tokenizer.decode([51, 401]) == "w51,"
    (whole,) = answers(spaced, ["w5 w6"])
    assert " , " in whole
    assert answers(spaced, ["w5 w6"], until=[" ,"]) == [whole.split(" ,")[0]]
    command.main(
        ["generate", "w5 w6", "--raw", "--model", str(folder), "--gen-length", "16", "--json"]
    )
    assert json.loads(capsys.readouterr().out)["answer"] == whole


def test_padding_of_the_harness_costs_nothing(lm):
    """Processes with fewer documents get their last request again."""
    two = requests("generate_until", [(p, {}) for p in PROMPTS[:2]])
    before = lm.totals["answers"]
    actual = lm.generate_until([*two, two[-1], two[-1]])
    assert actual[1] == actual[2] == actual[3]
    assert lm.totals["answers"] == before + 2
    assert isinstance(answers(lm, [""])[0], str), "an empty prompt is answered"


def test_a_long_prompt_loses_its_beginning(caplog):
    short = make("gen_length=16,max_length=40")
    ids = short.tok_encode(PROMPTS[-1])
    assert len(ids) > 24
    with caplog.at_level("WARNING", logger="lm_eval"):
        assert short.cut_prompt(ids, 24) == ids[-24:]
    assert "lose their beginning" in caplog.text
    assert short.scored(ids * 2, [5, 6]) == Scored(tuple((ids * 2)[-38:]), (5, 6))
    with pytest.raises(ValueError, match="a continuation of 40 tokens: expected 1 to 39"):
        short.scored(ids, [5] * 40)
    with pytest.raises(ValueError, match="gen_length=64: no room for a prompt in 40 positions"):
        answers(make("gen_length=64,max_length=40"))


def test_the_chat_template(lm):
    talk = [{"role": "user", "content": PROBLEMS[0].prompt}]
    assert lm.apply_chat_template(talk) == PROMPTS[0]
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert "/" not in lm.tokenizer_name
    template, lm.tokenizer.chat_template = lm.tokenizer.chat_template, None
    with pytest.raises(ValueError, match="no chat template; run without --apply_chat_template"):
        lm.apply_chat_template(talk)
    lm.tokenizer.chat_template = template


def test_sampling_follows_the_seed():
    first, again, other = (
        answers(make(f"gen_length=32,temperature=20.0,seed={seed}"), PROMPTS[:3])
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_prompt_keeps_the_bos_that_it_has(monkeypatch):
    lm = make()
    lm.tokenizer.bos_token = "<|user|>"
    calls: list[bool] = []
    monkeypatch.setattr(
        lm.tokenizer, "encode", lambda text, add_special_tokens: calls.append(add_special_tokens)
    )
    lm.tok_encode("<|user|> a")
    lm.tok_encode("a")
    assert calls == [False, True]


# --- log-likelihood ------------------------------------------------------------------------------


def test_loglikelihood(lm):
    pairs = [(PROMPTS[0], " " + PROBLEMS[0].response), (PROMPTS[4], " Monday 1 + 1 = 3."),
             ("", "Mia")]  # fmt: skip
    actual = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    items = [
        Scored(
            tuple(lm.tok_encode(prompt) or [lm.prefix_token_id]),
            tuple(lm.tok_encode(text, add_special_tokens=False)),
        )
        for prompt, text in pairs
    ]
    expected = log_likelihoods(lm.model, items, samples=8)
    assert [total for total, _ in actual] == pytest.approx(expected, abs=1e-3)
    assert [greedy for _, greedy in actual] == are_greedy(lm.model, items)
    assert actual[0][1] and not actual[1][1]
    assert actual[0][0] > actual[1][0]
    quick = make("mc_num=8,check_greedy=False")
    assert not any(greedy for _, greedy in quick.loglikelihood(requests("loglikelihood", pairs)))
    with refusal("cfg_scale=0.5: loglikelihood is that of the model alone; expected 0"):
        make("cfg_scale=0.5").loglikelihood(requests("loglikelihood", pairs))


def test_loglikelihood_of_whole_texts(lm):
    short = make("mc_num=8,max_length=22")
    text = " ".join(problem.prompt for problem in PROBLEMS[:2])
    ids = tuple(short.tok_encode(text, add_special_tokens=False))
    assert 21 < len(ids) < 42
    rest = ids[21:]
    windows = [Scored((short.prefix_token_id,), ids[:21]), Scored(ids[len(rest) - 1 : 21], rest)]
    expected = sum(log_likelihoods(short.model, windows, samples=8))
    (actual,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    assert actual == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_is_done_is_kept(kind, error, monkeypatch):
    texts = [problem.prompt for problem in PROBLEMS[:4]]
    asked = requests(kind, [(t,) if kind.endswith("rolling") else (t, " Monday 7") for t in texts])
    kept: list[Any] = []
    plain, calls, failing = likelihood.masked_log_probs, [], 0

    def counted(model: Any, items: Any, masks: Any) -> list[float]:
        calls.append(len(items))
        if len(calls) == failing:
            raise error
        return plain(model, items, masks)

    monkeypatch.setattr(likelihood, "masked_log_probs", counted)
    auto = make("mc_num=2", batch_size="auto", max_batch_size=2)
    monkeypatch.setattr(auto.cache_hook, "add_partial", lambda *result: kept.append(result[2]))
    expected = getattr(auto, kind)(asked)
    failing = len(calls)
    calls.clear()
    kept.clear()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            getattr(auto, kind)(asked)
        assert len(kept) >= 2 and {*kept} < {*expected}
    else:
        actual = getattr(auto, kind)(asked)
        assert torch.allclose(torch.tensor(actual), torch.tensor(expected), atol=1e-3)
        assert len(kept) == 4 and sum(calls[failing:]) <= 4, "the rest alone is done again"

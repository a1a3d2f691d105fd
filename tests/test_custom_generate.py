"""model.generate(custom_generate=...): the tokens of dsb.generate, and an error for the rest."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TextIteratorStreamer,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxTimeCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import write_chat_model
from tests.golden import biased_to_eos, left_pad, prompts

SHAPE = {"max_new_tokens": 24, "block_length": 8}
SAME = {"gen_length": 24, "block_length": 8}
IDS = prompts(1)[0][None]


def run(model: PreTrainedModel, ids: Tensor, *config: GenerationConfig, **more: Any) -> Any:
    return model.generate(ids, *config, custom_generate=dsb.custom_generate, **{**SHAPE, **more})


def direct(model: PreTrainedModel, ids: Tensor = IDS, **settings: Any) -> dsb.GenerationOutput:
    """The same decoding by `dsb.generate`."""
    return dsb.generate(model, ids, **{"stop_at_eos": True, **SAME, **settings})


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_golden_trajectories(family):
    """Every method and rule of the goldens once, through transformers' door."""
    for case in golden.one_of_each(family):
        settings = golden.settings(case)
        settings["max_new_tokens"] = settings.pop("gen_length")
        settings["cache_policy"] = settings.pop("cache")
        ids = torch.tensor([case["prompt"]])
        assert run(golden.model(family), ids, **settings)[0].tolist() == case["sequence"]


def test_an_auto_model_and_the_length_of_the_whole():
    model = AutoModelForCausalLM.from_pretrained(golden.DATA / "llada")
    length = IDS.shape[1] + 9
    actual = model.generate(IDS, custom_generate=dsb.custom_generate, max_length=length)
    assert torch.equal(actual, direct(model, gen_length=9, block_length=2).sequences)


def test_padded_batch_and_dict():
    model = golden.model("dream")
    ids, mask = left_pad(prompts(3))
    out = run(model, ids, attention_mask=mask, return_dict_in_generate=True, frechet=0.1)
    expected = direct(model, ids, attention_mask=mask, frechet=0.1)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert (out.nfe, out.row_tokens) == (expected.nfe, expected.row_tokens)
    assert out.tokens_per_forward == expected.tokens_per_forward


def test_sampling():
    model = golden.model("dream")
    cuts = {"temperature": 0.7, "top_p": 0.9, "top_k": 50}

    def expected(**settings: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        return direct(model, generator=generator, **settings).sequences.tolist()

    def actual(*config: GenerationConfig, **more: Any) -> list[list[int]]:
        return run(model, IDS, *config, **{"do_sample": True, "seed": 3, **more}).tolist()

    generator = torch.Generator().manual_seed(3)
    assert actual(**cuts) == actual(seed=None, generator=generator, **cuts) == expected(**cuts)
    # transformers' own top_k of 50 is not the user's, unless the call names it. In a
    # GenerationConfig nothing tells the two apart. A temperature without sampling is no one's.
    hot = {"temperature": 3.0}
    assert actual(**hot) == actual(GenerationConfig(top_k=50), **hot) == expected(**hot)
    assert actual(top_k=50, **hot) == expected(top_k=50, **hot) != expected(**hot)
    assert actual(GenerationConfig(top_k=49), **hot) == expected(top_k=49, **hot) != expected(**hot)
    config = GenerationConfig(do_sample=True, top_k=7, top_p=0.8, temperature=0.5)
    assert actual(config) == expected(temperature=0.5, top_p=0.8, top_k=7)
    uncut = {"top_p": 1.0, "top_k": 0}
    assert actual(**hot, **uncut) == expected(**hot)
    free = []
    for _ in range(2):
        torch.manual_seed(3)
        free.append(actual(seed=None, temperature=2.0))
    assert free[0] == free[1]
    greedy = direct(model).sequences.tolist()
    assert actual(do_sample=False, seed=None, temperature=1.0, **uncut) == greedy


def test_transformers_stumbles_over_a_string_as_cache():
    """In words that differ by version; docs/troubleshooting.md names them."""
    with pytest.raises((AttributeError, ValueError), match=r"_is_user_defined|'cache'"):
        run(golden.model("llada"), IDS, cache="dual")


ENDING = prompts(1, seed=3)[0][None]  # whose answer ends early where EOS is likely


def test_confidences_by_their_published_names():
    model = golden.model("dream")
    for named, ours in (
        ({"alg": "topk_margin"}, {"confidence": "margin"}),
        ({"alg": "entropy", "alg_temp": 0.2, "seed": 3}, {"confidence": "entropy"}),
        ({"remasking": "random", "seed": 3}, {"confidence": "random"}),
    ):
        if "seed" in named:
            ours["generator"] = torch.Generator().manual_seed(3)
        if "alg_temp" in named:
            ours["confidence_temperature"] = 0.2
        expected = direct(model, steps=6, **ours).sequences
        assert torch.equal(run(model, IDS, steps=6, **named), expected)
    with golden.refusal("alg='origin': expected one of maskgit_plus, topk_margin, entropy"):
        run(model, IDS, alg="origin")
    with golden.refusal("remasking and confidence: expected one of the two"):
        run(model, IDS, remasking="random", confidence="random", steps=6)


def test_eos(monkeypatch):
    width, asked = ENDING.shape[1], {"threshold": 0.5, "return_dict_in_generate": True}
    with biased_to_eos("llada") as model:
        whole = direct(model, ENDING, threshold=0.5, stop_at_eos=False)
        response = whole.sequences[0, width:].tolist()
        own, end = run(model, ENDING, **asked), whole.row_tokens[0]
        assert own.row_tokens == [end]
        assert own.sequences[0, width : width + end].tolist() == response[:end]
        other = next(token for token in response if token not in model.dsb.eos_ids)
        count = response.index(other) + 1
        assert count != end
        for actual in (
            run(model, ENDING, eos_token_id=[other], **asked),
            run(model, ENDING, GenerationConfig(eos_token_id=other), **asked),
        ):
            assert actual.row_tokens == [count]
            assert actual.sequences[0, width + count :].tolist() == [other] * (24 - count)
        assert model.dsb == golden.model("llada").dsb, "the model keeps its own"
        monkeypatch.setattr(model.generation_config, "eos_token_id", other)
        for config in ([], [GenerationConfig(eos_token_id=other)]):
            assert run(model, ENDING, *config, **asked).row_tokens == [count]
        assert run(model, ENDING, min_new_tokens=24, **asked).row_tokens == [24]
    named = dsb.load_model(golden.DATA / "llada", device="cpu", eos_ids=(other,))
    assert (
        run(named, ENDING, **asked).sequences.tolist()
        == direct(named, ENDING, threshold=0.5).sequences.tolist()
    ), "the ids that load_model was given"


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert not self.ends
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ends += 1


def test_streamer_gets_the_tokens_in_order():
    streamer, steps = Recorder(), []
    out = run(
        golden.model("llada"), IDS, streamer=streamer, stop_at_eos=False,
        on_step=lambda event: steps.append(len(streamer.tokens)),
    )  # fmt: skip
    prompt, *fed = streamer.tokens
    assert prompt == IDS[0].tolist(), "transformers feeds the prompt first"
    assert fed == [[token] for token in out[0, IDS.shape[1] :].tolist()] and streamer.ends == 1
    assert len(set(steps)) > 2, "tokens come while decoding goes on"


def test_streamer_ends_with_the_eos():
    streamer = Recorder()
    with biased_to_eos("llada") as model:
        out = run(model, ENDING, threshold=0.5, streamer=streamer, return_dict_in_generate=True)
    assert out.row_tokens[0] < 24, "the answer must end early, or this shows nothing"
    assert len(streamer.tokens) - 1 == out.row_tokens[0]
    assert streamer.tokens[-1] == [model.dsb.eos_ids[0]]


def test_text_streamer(tmp_path):
    tokenizer = dsb.load_tokenizer(write_chat_model(tmp_path))
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    out = run(golden.model("llada"), ids, streamer=streamer, return_dict_in_generate=True)
    response = out.sequences[0, 3 : 3 + out.row_tokens[0]]
    assert "".join(streamer).split() == tokenizer.decode(response).split()


REFUSED: dict[str, Any] = {
    "num_beams": 2,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "begin_suppress_tokens": [5],
    "sequence_bias": {(5,): 1.0},
    "force_words_ids": [[5]],
    "constraints": [5],
    "min_p": 0.1,
    "max_time": 1.0,
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(60.0)]),
    "prefix_allowed_tokens_fn": lambda row, ids: [5],
    "assistant_model": golden.model("llada"),
    "inputs_embeds": torch.zeros(1, IDS.shape[1], 64),
}
FORWARD = inspect.signature(inspect.unwrap(type(golden.model("llada")).forward)).parameters
CACHE = "cache" if "cache" in FORWARD else "past_key_values"
ERRORS: list[tuple[dict[str, Any], str]] = [
    *(({name: value}, f"^{name}=") for name, value in REFUSED.items()),
    *(({"logits_processor": LogitsProcessorList([p])}, f"^logits_processor='{type(p).__name__}'")
      for p in (TopKLogitsWarper(5), RepetitionPenaltyLogitsProcessor(1.2))),
    ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(30, 9)])},
     r"^eos_token_id of min_length=\(9,\): custom_generate cannot"),
    ({"bad_words_ids": [[5, 6]]}, r"^bad_words_ids has \[5, 6\]: .*sequences of one id"),
    ({"suppress_tokens": [600]}, "^suppress_tokens=600: expected an int from 0 to 511"),
    ({"min_new_tokens": 25}, "^min_new_tokens=25: expected an int from 0 to 24"),
    ({"stop_strings": ["a"]}, "^tokenizer=NoneType: stop_strings needs"),
    ({"banned_tokens": 5}, "^banned_tokens=5: expected a tuple of token ids"),
    ({"min_new_tokens": "x"}, "^min_new_tokens='x': expected an int"),
    ({CACHE: DynamicCache()}, f"^{CACHE}='DynamicCache': custom_generate cannot"),
    ({"position_ids": torch.arange(IDS.shape[1])[None] + 3}, "^position_ids='Tensor'"),
    ({"temperature": 0.7}, r"^temperature=0.7: expected do_sample=True"),
    ({"do_sample": True, "top_p": 0.9}, r"^top_p=0.9: llada samples by Gumbel noise"),
    ({"cache_policy": "lru"}, r"^cache_policy='lru': expected one of dsb, dual, none"),
    ({"seed": 1, "generator": torch.Generator()}, "generator and seed"),
    ({"unheard_of": 1}, "unheard_of"),  # transformers' own check
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), ERRORS)
def test_errors_name_their_argument(arguments, said):
    more = {"do_sample": True} if "min_p" in arguments else {}
    with pytest.raises((TypeError, ValueError), match=said):
        run(golden.model("llada"), IDS, **arguments, **more)


def test_fields_and_processors_that_forbid_tokens():
    first = direct(golden.model("llada"), ENDING, threshold=0.5).sequences[0, ENDING.shape[1] :]
    (a, b, *_), length = dict.fromkeys(first.tolist()), ENDING.shape[1]
    with biased_to_eos("llada") as model:
        (eos,) = model.dsb.eos_ids

        def same(ours: dict[str, Any], **theirs: Any) -> None:
            expected = direct(model, ENDING, threshold=0.5, **ours).sequences
            assert torch.equal(run(model, ENDING, threshold=0.5, **theirs), expected), theirs

        same({"banned_tokens": (a, b)}, suppress_tokens=[a], bad_words_ids=[[b], [eos]])
        same({"banned_tokens": (a, b)}, banned_tokens=[a], suppress_tokens=[b])
        same({"min_new_tokens": 9}, min_new_tokens=9)
        same({"min_new_tokens": 9}, min_length=length + 9, min_new_tokens=5)
        same({"min_new_tokens": 9}, generation_config=GenerationConfig(min_new_tokens=9))
        given: list[LogitsProcessor] = [
            SuppressTokensLogitsProcessor([a]), NoBadWordsLogitsProcessor([[b], [eos]], eos),
            MinNewTokensLengthLogitsProcessor(length, 7, eos),
            MinLengthLogitsProcessor(length + 9, eos),
        ]  # fmt: skip
        same({"banned_tokens": (a, b), "min_new_tokens": 9},
             logits_processor=LogitsProcessorList(given))  # fmt: skip


def test_stop_strings(tmp_path):
    tokenizer = dsb.load_tokenizer(write_chat_model(tmp_path))
    model, how = golden.model("llada"), {"tokenizer": tokenizer, "return_dict_in_generate": True}
    response = direct(model).sequences[0, IDS.shape[1] :].tolist()
    stop = tokenizer.decode(response[4:6])
    expected = direct(model, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.row_tokens[0] <= 6
    out = run(model, IDS, stop_strings=[stop], **how)
    assert torch.equal(out.sequences, expected.sequences) and out.nfe == expected.nfe
    streamer = Recorder()
    out = run(model, IDS, stop_strings=stop, streamer=streamer, stop_at_eos=False, **how)
    assert out.row_tokens == expected.row_tokens
    assert len(streamer.tokens) - 1 == out.row_tokens[0] + 1, "an EOS says that it has ended"
    auto = AutoModelForCausalLM.from_pretrained(golden.DATA / "llada")
    out = auto.generate(IDS, stop_strings=stop, **SHAPE, **how)
    assert torch.equal(out.sequences, expected.sequences)


def test_samples_and_what_was_recorded_of_them():
    model, seed = golden.model("dream"), torch.Generator().manual_seed
    how = {"block_length": 8, "temperature": 0.9}
    expected = dsb.generate(
        model, IDS, gen_length=16, num_return_sequences=3, record=True, generator=seed(2), **how
    )
    out = run(
        model, IDS, max_new_tokens=16, num_return_sequences=3, do_sample=True, output_scores=True,
        return_dict_in_generate=True, generator=seed(2), **how,
    )  # fmt: skip
    for name in ("sequences", "step_map", "logprobs"):
        assert torch.equal(out[name], getattr(expected, name)), name
    with pytest.raises(ValueError, match=r"output_scores.*return_dict_in_generate"):
        run(model, IDS, output_scores=True)


def test_dreams_history_is_the_canvas_after_each_forward():
    model, dictionary = golden.model("dream"), {"return_dict_in_generate": True}
    ids, mask = left_pad(prompts(2))
    expected: list[list[list[int]]] = []
    out = direct(
        model, ids, attention_mask=mask, on_step=lambda e: expected.append(e.canvas.tolist())
    )
    kept = run(model, ids, attention_mask=mask, output_history=True, **dictionary)
    assert [canvas.tolist() for canvas in kept.history] == expected
    assert torch.equal(kept.history[-1], kept.sequences) and len(kept.history) == out.nfe
    config = GenerationConfig(output_history=True)
    assert len(run(model, ids, config, attention_mask=mask, **dictionary).history) == out.nfe
    assert run(model, IDS, **dictionary).history is None
    for ask in ([GenerationConfig(output_history=True)], []):
        with golden.refusal("output_history=True: expected return_dict_in_generate=True with it"):
            run(model, IDS, *ask, **({} if ask else {"output_history": True}))
    with golden.refusal("output_history='yes': expected True or False", kind=TypeError):
        run(model, IDS, output_history="yes", **dictionary)


def test_a_streamer_of_two_prompts_is_ended():
    streamer = Recorder()
    with pytest.raises(ValueError, match=r"^streamer: 2 prompts"):
        run(golden.model("llada"), IDS.repeat(2, 1), streamer=streamer)
    assert streamer.ends == 1, "nobody is left waiting"

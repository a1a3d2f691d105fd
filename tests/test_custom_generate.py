"""model.generate(custom_generate=...): the tokens of dsb.generate, and an error for the rest."""

from __future__ import annotations

import inspect
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    PreTrainedModel,
    TextIteratorStreamer,
    TopKLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import dsb_runtime as dsb
from tests import golden
from tests.checkpoints import write_chat_model
from tests.golden import biased_to_eos, left_pad, prompts

SHAPE = {"max_new_tokens": 24, "block_length": 8}
SAME = {"gen_length": 24, "block_length": 8}


def run(model: PreTrainedModel, ids: Tensor, **more: Any) -> Any:
    return model.generate(ids, custom_generate=dsb.custom_generate, **{**SHAPE, **more})


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_golden_trajectories(family):
    """Every method and rule of the goldens once, through transformers' door."""
    model, seen = golden.model(family), set()
    for case in golden.cases(family):
        if (case["method"], case["rule"]) in seen:
            continue
        seen.add((case["method"], case["rule"]))
        settings = golden.settings(case)
        settings["max_new_tokens"] = settings.pop("gen_length")
        settings["cache_policy"] = settings.pop("cache")
        ids = torch.tensor([case["prompt"]])
        assert run(model, ids, **settings)[0].tolist() == case["sequence"]
    assert len(seen) == {"llada": 12, "dream": 6}[family]


def test_auto_model_and_defaults():
    model = AutoModelForCausalLM.from_pretrained(golden.DATA / "llada")
    ids = prompts(1)[0][None]
    found = model.generate(ids, custom_generate=dsb.custom_generate, max_new_tokens=40)
    expected = dsb.generate(model, ids, gen_length=40, block_length=10, stop_at_eos=True)
    assert found.tolist() == expected.sequences.tolist()
    capped = model.generate(ids, custom_generate=dsb.custom_generate, max_length=ids.shape[1] + 9)
    expected = dsb.generate(model, ids, gen_length=9, block_length=2, stop_at_eos=True)
    assert capped.tolist() == expected.sequences.tolist()


def test_padded_batch_and_dict():
    model = golden.model("dream")
    ids, mask = left_pad(prompts(3))
    out = run(model, ids, attention_mask=mask, return_dict_in_generate=True, frechet=0.1)
    expected = dsb.generate(model, ids, attention_mask=mask, frechet=0.1, stop_at_eos=True, **SAME)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert (out.nfe, out.row_tokens) == (expected.nfe, expected.row_tokens)
    assert out.tokens_per_forward == expected.tokens_per_forward


def test_sampling():
    model, ids = golden.model("dream"), prompts(1)[0][None]
    cuts = {"temperature": 0.7, "top_p": 0.9, "top_k": 50}

    def expected(**settings: Any) -> list[list[int]]:
        made = torch.Generator().manual_seed(3)
        return dsb.generate(
            model, ids, generator=made, stop_at_eos=True, **SAME, **settings
        ).sequences.tolist()

    made = torch.Generator().manual_seed(3)
    assert run(model, ids, do_sample=True, seed=3, **cuts).tolist() == expected(**cuts)
    assert run(model, ids, do_sample=True, generator=made, **cuts).tolist() == expected(**cuts)
    # transformers' own top_k of 50 is not the user's; neither is a temperature without sampling.
    hot = {"temperature": 3.0}
    assert run(model, ids, do_sample=True, seed=3, **hot).tolist() == expected(**hot)
    assert expected(**hot) != expected(**hot, top_k=50)
    config = GenerationConfig(
        do_sample=True, top_k=7, top_p=0.8, temperature=0.5, max_new_tokens=24
    )
    found = model.generate(ids, config, custom_generate=dsb.custom_generate, block_length=8, seed=3)
    assert found.tolist() == expected(temperature=0.5, top_p=0.8, top_k=7)
    torch.manual_seed(3)
    free = run(model, ids, do_sample=True, temperature=2.0)
    torch.manual_seed(3)
    assert run(model, ids, do_sample=True, temperature=2.0).tolist() == free.tolist()
    greedy = dsb.generate(model, ids, stop_at_eos=True, **SAME).sequences.tolist()
    assert run(model, ids, do_sample=False, temperature=1.0).tolist() == greedy


def test_a_top_k_of_50_counts_where_the_call_names_it():
    """In a GenerationConfig it cannot be told from transformers' own default."""
    model, ids = golden.model("dream"), prompts(1)[0][None]

    def found(*config: GenerationConfig, **more: Any) -> list[list[int]]:
        more = {"do_sample": True, "temperature": 3.0, "seed": 3, **SHAPE, **more}
        return model.generate(ids, *config, custom_generate=dsb.custom_generate, **more).tolist()

    unset = found()
    assert found(GenerationConfig(top_k=50)) == unset
    assert found(GenerationConfig(top_k=49)) != unset
    assert found(top_k=50) != unset


def test_refresh_settings():
    model, ids = golden.model("llada"), prompts(1)[0][None]
    settings = {"refresh_policy": "response", "full_refresh_every": 3}
    expected = dsb.generate(model, ids, stop_at_eos=True, **SAME, **settings)
    assert run(model, ids, **settings).tolist() == expected.sequences.tolist()
    with pytest.raises(ValueError, match=r"^full_refresh_every=3: every refresh is full"):
        run(model, ids, full_refresh_every=3)


def test_the_cache_policy_has_a_name_of_its_own():
    model, ids = golden.model("llada"), prompts(1)[0][None]
    expected = dsb.generate(model, ids, cache="dual", stop_at_eos=True, **SAME)
    out = run(model, ids, cache_policy="dual", return_dict_in_generate=True)
    assert (out.sequences.tolist(), out.nfe) == (expected.sequences.tolist(), expected.nfe)
    # transformers stumbles over a string there, in words that differ by version.
    with pytest.raises((AttributeError, ValueError), match=r"_is_user_defined|'cache'"):
        run(model, ids, cache="dual")


def test_arguments_of_the_forward_are_refused():
    model, ids = golden.model("llada"), prompts(1)[0][None]
    names = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    cache = "cache" if "cache" in names else "past_key_values"
    with pytest.raises(ValueError, match=rf"^{cache}='DynamicCache': custom_generate cannot"):
        run(model, ids, **{cache: DynamicCache()})
    with pytest.raises(ValueError, match=r"^position_ids='Tensor'"):
        run(model, ids, position_ids=torch.arange(ids.shape[1])[None] + 3)
    with pytest.raises(ValueError, match=r"^inputs_embeds='Tensor'"):
        run(model, ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_eos():
    ids = prompts(1, seed=3)[0][None]
    with biased_to_eos("llada") as model:
        whole = dsb.generate(model, ids, threshold=0.5, stop_at_eos=False, **SAME)
        response = whole.sequences[0, ids.shape[1] :].tolist()
        own = run(model, ids, threshold=0.5, return_dict_in_generate=True)
        assert own.row_tokens == whole.row_tokens
        assert (
            own.sequences[0, ids.shape[1] :].tolist()[: own.row_tokens[0]]
            == (response[: own.row_tokens[0]])
        )
        other = next(token for token in response if token not in model.dsb.eos_ids)
        config = GenerationConfig(eos_token_id=other, max_new_tokens=24)
        for found in (
            run(model, ids, threshold=0.5, eos_token_id=[other], return_dict_in_generate=True),
            model.generate(
                ids, config, custom_generate=dsb.custom_generate, block_length=8, threshold=0.5,
                return_dict_in_generate=True,
            ),
        ):  # fmt: skip
            assert found.row_tokens == [response.index(other) + 1] != own.row_tokens
            end = ids.shape[1] + found.row_tokens[0]
            assert found.sequences[0, end:].tolist() == [other] * (24 - found.row_tokens[0])
        assert model.dsb == golden.model("llada").dsb, "the model keeps its own"


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
    model, ids = golden.model("llada"), prompts(1)[0][None]
    streamer, steps = Recorder(), []
    out = run(
        model, ids, streamer=streamer, stop_at_eos=False,
        on_step=lambda event: steps.append(len(streamer.tokens)),
    )  # fmt: skip
    prompt, *fed = streamer.tokens
    assert prompt == ids[0].tolist(), "transformers feeds the prompt first"
    assert [t for piece in fed for t in piece] == out[0, ids.shape[1] :].tolist()
    assert all(len(piece) == 1 for piece in fed) and streamer.ends == 1
    assert len(set(steps)) > 2, "tokens come while decoding goes on"


def test_streamer_ends_with_the_eos():
    ids = prompts(1, seed=3)[0][None]
    with biased_to_eos("llada") as model:
        streamer = Recorder()
        out = run(model, ids, threshold=0.5, streamer=streamer, return_dict_in_generate=True)
        assert out.row_tokens[0] < 24, "the answer must end early, or this shows nothing"
        assert len(streamer.tokens) - 1 == out.row_tokens[0]
        assert streamer.tokens[-1] == [model.dsb.eos_ids[0]]


def test_text_streamer(tmp_path):
    folder = write_chat_model(tmp_path)
    tokenizer, model = dsb.load_tokenizer(folder), dsb.load_model(folder, device="cpu")
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    arguments = {"streamer": streamer, "custom_generate": dsb.custom_generate, **SHAPE}
    thread = Thread(target=model.generate, kwargs={**inputs, **arguments})
    thread.start()
    text = "".join(streamer)
    thread.join()
    expected = dsb.generate(model, inputs.input_ids, stop_at_eos=True, **SAME)
    response = expected.sequences[0, 3 : 3 + expected.row_tokens[0]]
    assert text.split() == tokenizer.decode(response).split()


class Never(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 4,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "min_p": 0.1,
    "max_time": 1.0,
    "output_scores": True,
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 1)]),
    "stopping_criteria": StoppingCriteriaList([Never()]),
    "prefix_allowed_tokens_fn": lambda row, ids: [5],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_hold_names_its_field(name):
    more = {"do_sample": True} if name in ("min_p", "num_return_sequences") else {}
    with pytest.raises(ValueError, match=f"^{name}="):
        run(golden.model("llada"), prompts(1)[0][None], **{name: REFUSED[name]}, **more)


def test_other_errors_name_their_argument():
    model, ids = golden.model("llada"), prompts(1)[0][None]
    with pytest.raises(ValueError, match=r"^assistant_model="):
        run(model, ids, assistant_model=model)
    with pytest.raises(ValueError, match=r"^logits_processor="):
        run(model, ids, logits_processor=LogitsProcessorList([TopKLogitsWarper(5)]))
    with pytest.raises(ValueError, match=r"^temperature=0.7: expected do_sample=True"):
        run(model, ids, temperature=0.7)
    with pytest.raises(ValueError, match=r"^top_p=0.9: llada samples by Gumbel noise"):
        run(model, ids, do_sample=True, top_p=0.9)
    with pytest.raises(ValueError, match=r"^block_length=25: expected an int from 1 to 24"):
        run(model, ids, block_length=25)
    with pytest.raises(ValueError, match=r"^cache_policy='lru': expected one of dsb, dual, none"):
        run(model, ids, cache_policy="lru")
    with pytest.raises(ValueError, match="generator and seed"):
        run(model, ids, seed=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="unheard_of"):  # transformers' own check
        run(model, ids, unheard_of=1)
    streamer = Recorder()
    with pytest.raises(ValueError, match=r"^streamer: 2 prompts"):
        run(model, ids.repeat(2, 1), streamer=streamer)
    assert streamer.ends == 1, "nobody is left waiting"

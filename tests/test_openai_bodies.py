"""OpenAI's bodies: `dsb serve` and `dsb batch` accept the same ones, and say the same of others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsb_runtime.cli.main import main
from dsb_runtime.config import settings
from dsb_runtime.doors.openai.asked import CHAT, TEXT
from tests.commands import answers, write_lines
from tests.served import Served, serving

PROMPT = "Mia has 12 apples. Monday she finds 7. How many apples now?"
SHORT = {"max_tokens": 16}
PARTS = [{"type": "text", "text": "Mia has "}, {"type": "text", "text": "12 apples."}]


def chat(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


# (url, fields beside the prompt)
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"threshold": 0.95}),
    (CHAT, {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "top_p": 1,
        "presence_penalty": 0, "logit_bias": {}, "n": 1, "user": "x", "stop": None, "seed": 3,
        "threshold": None, "stream": False, "store": False, "top_logprobs": 0, "model": None,
        "parallel_tool_calls": True, "metadata": {"a": "b"}, "service_tier": "auto",
    }),
    (CHAT, {"messages": chat(PARTS, name="Mia", tool_calls=[])}),
    (CHAT, {"messages": [{"role": "developer", "content": "Add."}, *chat(PROMPT)]}),
    (CHAT, {"max_tokens": 24, "max_completion_tokens": 24, "gen_length": 24}),
    (CHAT, {"steps": 4, "block_length": 8, "banned_tokens": [5, 6], "schedule": "naive"}),
    (CHAT, {"n": 2, "temperature": 4, "seed": -1}),
    (CHAT, {"logprobs": True, "model": "embedded"}),
    (CHAT, {"stop": ["never", "p"], "max_tokens": 48}),
    (TEXT, {"prompt": PROMPT, "echo": False, "suffix": "", "best_of": 1, "logprobs": 0}),
    (TEXT, {"prompt": [PROMPT, "Tom has 3 apples."], "temperature": 2, "n": 2, "seed": 5}),
    (TEXT, {"prompt": [5, 6, 7]}),
    (TEXT, {"prompt": [[5, 6, 7], [8, 9]], "stop": "a"}),
]  # fmt: skip

# (url, fields, the field that is named, what is said of it)
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"treshold": 1}, "treshold", "treshold=1: no such field; expected one of model"),
    (CHAT, {"\ud800": 1}, "\\ud800", "\\ud800=1: no such field"),
    (CHAT, {"threshold": 0.5, "steps": 4}, "threshold", "expected at most one of threshold"),
    (CHAT, {"block_length": 32}, "block_length", "expected an int from 1 to 16"),
    (CHAT, {"max_tokens": 0}, "max_tokens", "max_tokens=0: expected an int >= 1"),
    (CHAT, {"max_tokens": 600}, "max_tokens", "max_tokens=600 after messages of"),
    (CHAT, {"gen_length": 9}, "gen_length", "expected the same as max_tokens=16"),
    (CHAT, {"model": "gpt"}, "model", "model=\"gpt\": not served here; expected \"embedded\""),
    (CHAT, {"model": 5}, "model", "model=5: expected \"embedded\""),
    (CHAT, {"n": 2}, "n", "n=2: all answers are the same at temperature=0"),
    (CHAT, {"n": 0, "temperature": 1}, "n", "n=0: expected an int from 1 to 128"),
    (CHAT, {"n": "1"}, "n", "n=\"1\": expected an int from 1 to 128"),
    (CHAT, {"n": True}, "n", "n=true: expected an int from 1 to 128"),
    (CHAT, {"seed": 2**63}, "seed", "expected an int of 64 bits"),
    (CHAT, {"seed": 1.5}, "seed", "seed=1.5: expected an int of 64 bits"),
    (CHAT, {"top_p": 0.9, "temperature": 1}, "top_p", "top_p=0.9: llada samples by Gumbel noise"),
    (CHAT, {"top_p": True}, "top_p", "top_p=true: expected a number in (0, 1]"),
    (CHAT, {"stop": [""]}, "stop", "stop=[\"\"]: expected a string, or up to 4"),
    (CHAT, {"stop": ["a"] * 5}, "stop", "expected a string, or up to 4"),
    (CHAT, {"stop": 5}, "stop", "stop=5: expected a string, or up to 4"),
    (CHAT, {"stop": 0}, "stop", "stop=0: expected a string"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "honoured here; expected null or []"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "be honoured here;"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty", "=0.5: it cannot be honoured here"),
    (CHAT, {"logit_bias": {"5": 1}}, "logit_bias", "cannot be honoured"),
    (CHAT, {"logprobs": 1}, "logprobs", "logprobs=1: expected true or false"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "top_logprobs=2: expected 0"),
    (CHAT, {"stream": "yes"}, "stream", "stream=\"yes\": expected true or false"),
    (CHAT, {"stream_options": {}}, "stream_options", "with \"stream\": true only"),
    (CHAT, {"stream_options": 1}, "stream_options", "=1: expected a JSON object"),
    (CHAT, {"prompt": "x"}, "prompt", "prompt=\"x\": no such field"),
    (CHAT, {"messages": []}, "messages", "messages=[]: expected a list of one message at least"),
    (CHAT, {"messages": None}, "messages", "messages=null: expected a list"),
    (CHAT, {"messages": [5]}, "messages.0", 'messages.0=5: expected {"role": "...", '),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "one of system"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "=null: expected text, or"),
    (CHAT, {"messages": chat("x", name=5)}, "messages.0.name", "name=5: expected text"),
    (CHAT, {"messages": chat("x", nam="y")}, "messages.0.nam", "no such field; expected one of"),
    (CHAT, {"messages": chat("\ud800")}, "messages", "half of a surrogate pair"),
    (CHAT, {"messages": chat("<|mdm_mask|>")}, "messages", "the mask token; expected other text"),
    (CHAT, {"messages": chat([{"type": "image_url"}])}, "messages.0.content",
     'expected {"type": "text", "text": "..."}'),
    *((TEXT, {"prompt": prompt}, "prompt", "prompt")
      for prompt in ("", [], [[]], [1, "a"], [True], {}, [10**9], None)),
    *((TEXT, {"prompt": "x", name: 3}, name, f"{name}=3: ")
      for name in ("echo", "suffix", "best_of", "logprobs")),
    *((CHAT, {name: "wrong"}, name, f'{name}="wrong": ') for name in settings()
      if name != "gen_length"),
    (CHAT, {"banned_tokens": [10**6]}, "banned_tokens", "banned_tokens has 1000000"),
    (CHAT, {"banned_tokens": [-1]}, "banned_tokens", "banned_tokens"),
    (CHAT, {"confidence_temperature": 1}, "confidence_temperature", "=1"),
    (CHAT, {"prefix_window": 4, "cache": "none"}, "prefix_window", "expected null with cache="),
    (CHAT, {"drafts": 1}, "drafts", "drafts=1: a draft costs as much"),
]  # fmt: skip

BODIES = [*((url, body) for url, body, *_ in REFUSED), *ACCEPTED]


def whole(url: str, body: dict[str, Any]) -> dict[str, Any]:
    prompt: dict[str, Any] = {"messages": chat(PROMPT)} if url == CHAT else {}
    return {**prompt, **SHORT, **body}


@pytest.fixture(scope="module")
def served():
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """What `dsb batch` answers each body, by its line."""
    folder = tmp_path_factory.mktemp("bodies")
    source = write_lines(folder / "in.jsonl", [
        {"custom_id": str(i), "method": "POST", "url": url, "body": whole(url, body)}
        for i, (url, body) in enumerate(BODIES)
    ])  # fmt: skip
    assert main(["batch", str(source), str(folder / "out.jsonl"), "--max-rows", "4"]) == 3
    return answers(folder / "out.jsonl")


def post(served: Served, url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    answer = served.http.post(url, content=json.dumps(whole(url, body)), headers=headers)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("index", range(len(REFUSED)), ids=lambda i: str(REFUSED[i][1])[:40])
def test_wrong_field_is_refused_by_name(served, lines, index):
    url, body, param, said = REFUSED[index]
    status, answer = post(served, url, body)
    error, other = answer["error"], lines[index + 1]
    assert status == (404 if error["code"] == "model_not_found" else 400), error
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert said in error["message"] and "\n" not in error["message"]
    response = other["response"]
    assert other["error"] is None and response["status_code"] == status
    assert response["body"] == answer


@pytest.mark.parametrize("index", range(len(ACCEPTED)), ids=lambda i: str(ACCEPTED[i][1])[:40])
def test_both_give_the_same_answer(served, lines, index):
    url, body = ACCEPTED[index]
    status, answer = post(served, url, body)
    line = lines[len(REFUSED) + index + 1]
    assert status == 200 and line["error"] is None, (answer, line)
    other = line["response"]["body"]
    if body.get("stop"):
        assert any(choice["finish_reason"] == "stop" for choice in answer["choices"])
    for name in ("id", "created"):
        assert type(answer.pop(name)) is type(other.pop(name))
    assert other == answer


def test_values_that_change_nothing_change_nothing(lines):
    first = len(REFUSED) + 1
    named, plain = lines[first + 1], lines[first]
    assert named["response"]["body"]["choices"] == plain["response"]["body"]["choices"]

"""`dsb serve` by its real HTTP: OpenAI's client, refusals, a full queue, clients that go away."""

from __future__ import annotations

import json
import logging
import math
import signal
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from shutil import which

import httpx
import openai
import pytest
import torch

import dsb_runtime as dsb
from dsb_runtime.demo import SUDOKU_DIR, sudoku
from dsb_runtime.demo.problems import heldout
from dsb_runtime.doors.server import gate, served_name
from dsb_runtime.engine import batcher
from tests.served import HEADERS, KEY, Served, half_a_body, serving, wait_until

PROBLEMS = [p.prompt for p in heldout(4, seed=5, steps=3)]
# Without an EOS and at one token a forward, such a row takes seconds.
LONG = {"threshold": 1.0, "max_tokens": 400, "stop_at_eos": False}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(max_rows=4, max_queue=2, most_bytes=2**14) as server:
        yield server


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def encode(served: Served, prompt: str) -> list[int]:
    text = served.tokenizer.apply_chat_template(
        chat(prompt), add_generation_prompt=True, tokenize=False
    )
    return served.tokenizer(text, add_special_tokens=False).input_ids


def alone(
    served: Served, prompt: str, seed: int | None = None, **settings: object
) -> dsb.GenerationOutput:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ids = torch.tensor([encode(served, prompt)])
    return dsb.generate(served.model, ids, generator=generator, **settings)


def text_of(served: Served, prompt: str, out: dsb.GenerationOutput) -> list[str]:
    start = len(encode(served, prompt))
    ids = [r[start : start + n] for r, n in zip(out.sequences, out.row_tokens, strict=True)]
    return [served.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@pytest.mark.parametrize("prompt", PROBLEMS[:2])
def test_openai_client_gets_the_answer_of_generate(served, prompt):
    expected = alone(served, prompt, threshold=0.95)
    answer = served.client.chat.completions.create(
        model="embedded", messages=chat(prompt), extra_body={"threshold": 0.95}
    )
    (choice,) = answer.choices
    assert [choice.message.content] == text_of(served, prompt, expected)
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == expected.row_tokens[0]
    assert answer.usage.prompt_tokens == len(encode(served, prompt))
    assert answer.usage.forwards == expected.nfe

    stream = served.client.chat.completions.create(
        model="embedded", messages=chat(prompt), stream=True, extra_body={"threshold": 0.95},
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = stream
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == answer.usage and not last.choices


def test_the_page_of_usage_has_a_puzzle_that_the_sudoku_model_solves():
    puzzle = sudoku.heldout(1)[0]
    solution = puzzle.response.replace(" ", "")
    usage = Path("docs/usage.md").read_text(encoding="utf-8")
    assert f'sudoku_model "{puzzle.prompt}"' in usage and f"`{solution}`" in usage
    with serving(folder=SUDOKU_DIR) as served:
        answer = served.client.chat.completions.create(
            model="embedded", messages=chat(puzzle.prompt)
        )
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (solution, "length")
    assert answer.usage.completion_tokens == 36 > answer.usage.forwards


def test_samples_are_those_of_the_seed(served):
    settings = {"temperature": 4.0, "gen_length": 16}
    # As generate with this generator, called twice.
    generator = torch.Generator().manual_seed(7)
    ids = torch.tensor([encode(served, PROBLEMS[0])])
    outs = [dsb.generate(served.model, ids, generator=generator, **settings) for _ in range(2)]
    answer = served.client.chat.completions.create(
        model="embedded", messages=chat(PROBLEMS[0]), temperature=4, max_tokens=16, seed=7, n=2
    )
    expected = [text_of(served, PROBLEMS[0], out)[0] for out in outs]
    assert [choice.message.content for choice in answer.choices] == expected
    assert len(set(expected)) == 2
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_completions_take_texts_and_ids(served):
    texts = [f"<|user|> {prompt} <|assistant|>" for prompt in PROBLEMS[:2]]
    ids = [served.tokenizer(text).input_ids for text in texts]
    by_text = served.client.completions.create(model="embedded", prompt=texts)
    by_ids = served.client.completions.create(model="embedded", prompt=ids)
    one = served.client.completions.create(model="embedded", prompt=ids[1], logprobs=0)
    answers = [choice.text for choice in by_text.choices]
    assert answers == [text_of(served, p, alone(served, p))[0] for p in PROBLEMS[:2]]
    assert [choice.text for choice in by_ids.choices] == answers
    assert one.choices[0].text == answers[1]


def test_logprobs_are_those_of_the_forward_that_committed(served):
    out = alone(served, PROBLEMS[0], record=True)
    answer = served.client.chat.completions.create(
        model="embedded", messages=chat(PROBLEMS[0]), logprobs=True
    )
    stream = list(
        served.client.chat.completions.create(
            model="embedded", messages=chat(PROBLEMS[0]), logprobs=True, stream=True
        )
    )
    content = answer.choices[0].logprobs.content
    assert "".join(token.token for token in content) == answer.choices[0].message.content
    assert [bytes(token.bytes).decode() for token in content] == [t.token for t in content]
    expected = out.logprobs[0, : len(content)].tolist()
    assert [token.logprob for token in content] == pytest.approx(expected, abs=1e-5)
    assert stream[-1].choices[0].logprobs.content == content


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, STREAM])
def test_text_ends_before_a_stop_string(served, more):
    out = alone(served, PROBLEMS[0])
    (text,) = text_of(served, PROBLEMS[0], out)
    stop = text[len(text) // 2 :][:3]  # which may begin and end inside of tokens
    stops = ["never", stop]
    answer = served.chat(messages=chat(PROBLEMS[0]), stop=stops, **more)
    if more.get("stream"):
        *events, last = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        shown = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
        reason, usage = events[-1]["choices"][0]["finish_reason"], last["usage"]
    else:
        (choice,), usage = answer.json()["choices"], answer.json()["usage"]
        shown, reason = choice["message"]["content"], choice["finish_reason"]
    assert shown == text[: text.index(stop)]
    assert reason == "stop"
    expected = alone(served, PROBLEMS[0], stop_strings=stops, tokenizer=served.tokenizer)
    assert usage["completion_tokens"] == expected.row_tokens[0] < out.row_tokens[0]
    assert usage["forwards"] == expected.nfe < out.nfe


def test_length_is_the_reason_where_no_eos_ends_the_answer(served):
    answer = served.chat(messages=chat(PROBLEMS[0]), max_tokens=4).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 7, "temperature": 1}, "n", "7 answers (prompts times n=7): expected at most 6, as"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "x=1: no such field; expected one of"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "expected true"),
        ({"stream_options": []}, "stream_options", "stream_options=[]: expected a JSON object"),
    ],
)
def test_wrong_field_is_refused_by_name(served, fields, param, said):
    """Those that tests/test_openai_bodies.py does not ask `dsb batch` too."""
    answer = served.chat(messages=chat("How many?"), stream=True, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"{", "application/json", "the body is no JSON (Expecting property name"),
        (b"\xff", "application/json", "the body is no JSON ("),
        (b"", "application/json", "the body is no JSON (Expecting value"),
        (b"[]", "application/json; charset=utf-8", "the body is []; expected a JSON object"),
        (b"{}", "application/json", "messages=null: expected a list"),
        (b'{"messages": []}', "text/plain", "Content-Type is 'text/plain'; expected application/j"),
        (b'{"messages": []}', "", "Content-Type is ''; expected application/json"),
        (b"[" * 10000, "application/json", "the body is no JSON ("),
        (b'{"n": ' + b"1" * 5000 + b"}", "application/json", "the body is no JSON ("),
    ],
)
def test_body_that_is_no_request(served, body, kind, said):
    answer = served.http.post("/v1/chat/completions", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("field", ["threshold", "stream_options", "n"])
def test_values_of_many_levels_are_refused(served, field):
    """Those that Python can just read are more than it can write."""
    for levels in range(940, 1000, 2):
        body = f'{{"messages": [], "stream": true, "{field}": {"[" * levels}{"]" * levels}}}'
        headers = {"Content-Type": "application/json"}
        answer = served.http.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400, levels


def test_other_routes_and_verbs(served):
    paths = ("/", "/page.js", "/health", "/metrics", "/v1/models", "/v1/models/embedded")
    for path in paths:
        answer = served.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
    model = served.http.get("/v1/models/embedded").json()
    assert [model] == served.http.get("/v1/models").json()["data"]
    for method, path, status, said in (
        ("GET", "/v1/models/gpt", 404, 'model="gpt": not served here; expected "embedded"'),
        ("GET", "/v1/nowhere", 404, "GET /v1/nowhere: Not Found; expected one of /health, "),
        ("POST", "/v1/chat/completions/", 404, "/v1/chat/completions/: Not Found; expected one"),
        ("GET", "/v1/completions", 405, "Method Not Allowed; expected POST"),
        ("DELETE", "/health", 405, "DELETE /health: Method Not Allowed; expected GET or HEAD"),
    ):
        answer = served.http.request(method, path)
        assert answer.status_code == status and said in answer.json()["error"]["message"]
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    for path in (*paths[:-1], "/v1/models/{id}", "other"):
        assert served.metric(f'dsb_requests_total{{path="{path}",') >= 1


def test_a_body_that_does_not_come(served, monkeypatch):
    """It is waited for, but not for ever; a client that goes away meanwhile is no fault."""
    port = int(served.url.rpartition(":")[2])
    gone = 'dsb_requests_total{path="/v1/chat/completions",status="499"}'
    before = served.metric(gone)
    half_a_body(port).close()
    wait_until(lambda: served.metric(gone) == before + 1)
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.1)
    with half_a_body(port) as client:
        answer = client.recv(4096)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"body_too_slow" in answer
    assert served.app.state.traffic.open == 0


def test_keys_models_and_sizes(served):
    for wrong in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {KEY}"}):
        answer = httpx.get(f"{served.url}/v1/models", headers=wrong)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert [model.id for model in served.client.models.list()] == ["embedded"]
    with pytest.raises(openai.NotFoundError, match='expected "embedded"'):
        served.client.chat.completions.create(model="gpt", messages=chat("x"))
    long = {"messages": chat("x" * 2**14)}
    body = json.dumps(long).encode()
    answers = [served.chat(**long), served.http.post("/v1/completions", content=iter([body]))]
    for answer in answers:  # with its length named, and without
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
        assert "expected at most 16384 bytes" in answer.json()["error"]["message"]


def test_full_queue_and_clients_that_go_away(served):
    """Rows and queue fill up, the next request gets 429, and a client that leaves frees its row,
    whether it streams or not."""
    body = {"messages": chat(PROBLEMS[0]), **LONG}
    streams = [
        httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json={**body, "stream": True},
            headers=HEADERS,
        )
        for _ in range(5)
    ]  # fmt: skip
    for stream in streams:
        assert stream.__enter__().status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        served.http.post("/v1/chat/completions", json=body, timeout=0.2)
    wait_until(lambda: served.metric("dsb_queue_length") == 1)  # the sixth has gone again
    assert served.metric("dsb_rows_in_use") == 4
    refused = served.chat(**{**body, "n": 2, "temperature": 1.0})
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    for stream in streams:
        stream.__exit__(None, None, None)
    wait_until(lambda: served.metric("dsb_rows_in_use") + served.metric("dsb_queue_length") == 0)
    assert served.metric('dsb_requests_total{path="/v1/chat/completions",status="499"}') >= 1


def test_memory_that_is_too_small(monkeypatch):
    monkeypatch.setattr(batcher, "free_bytes", lambda device: 100_000)
    with serving() as served:
        answer, stream = [served.chat(messages=chat(PROBLEMS[0]), stream=s) for s in (False, True)]
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["code"] == "context_length_exceeded" and "expected at most" in error["message"]
    assert json.loads(stream.text.split("\n\n")[1][6:])["error"] == error


def test_name_of_a_folder_is_as_it_is_typed(tmp_path, monkeypatch):
    (tmp_path / "snapshots" / "abc123").mkdir(parents=True)
    (tmp_path / "my-model").symlink_to(tmp_path / "snapshots" / "abc123")
    monkeypatch.chdir(tmp_path)
    assert served_name("my-model/") == "my-model"
    assert served_name("snapshots/..") == served_name(".") == tmp_path.name
    assert served_name("GSAI-ML/LLaDA-8B-Instruct") == "GSAI-ML/LLaDA-8B-Instruct"


def test_failing_row_is_an_error_of_its_request_alone(served):
    weight = served.model.lm_head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
        answer = served.chat(messages=chat(PROBLEMS[0]))
        stream = served.chat(messages=chat(PROBLEMS[0]), stream=True)
        weight.copy_(kept)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "not_a_number"
    assert json.loads(stream.text.split("\n\n")[1][6:])["error"]["code"] == "not_a_number"
    assert served.chat(messages=chat(PROBLEMS[0])).status_code == 200


def test_draining_server_refuses_what_comes():
    """It ends with its last request. Half a body does not keep it alive."""
    with serving() as served:
        traffic, path = served.app.state.traffic, "/v1/chat/completions"
        half = half_a_body(int(served.url.rpartition(":")[2]))
        body = {"messages": chat(PROBLEMS[0]), "stream": True, **LONG}
        with half, served.http.stream("POST", path, json=body):
            wait_until(lambda: traffic.open == 2)
            served.server.handle_exit(signal.SIGTERM, None)
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ")
            wait_until(lambda: traffic.open == 1)
            answers = [served.chat(messages=chat("x")), httpx.get(f"{served.url}/health")]
            assert served.metric("dsb_rows_in_use") == 1  # the metrics are there to the end
            assert not served.server.should_exit
        wait_until(lambda: served.server.should_exit)
    for answer in answers:
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert answer.json()["error"]["code"] == "shutting_down"


def test_log_has_no_prompt_no_key_and_no_query(served, caplog):
    with caplog.at_level(logging.DEBUG):
        served.http.post("/v1/chat/completions?token=abc", json={"messages": chat("secret words")})
        served.http.get("/no%0Awhere?token=abc")
        served.chat(messages=chat("secret words"), tools=[1])
    own = [r.getMessage() for r in caplog.records if r.name.startswith("dsb_runtime")]
    assert [" ".join(line.split()[1:-1]) for line in own] == [
        "POST /v1/chat/completions 200", "GET /no%0Awhere 404", "POST /v1/chat/completions 400",
    ]  # fmt: skip


def test_metrics_count_tokens_and_forwards(served):
    names = ("dsb_tokens_total", "dsb_forwards_total", "dsb_prompt_tokens_total")
    before = [served.metric(name) for name in names]
    usage = served.chat(messages=chat(PROBLEMS[1])).json()["usage"]
    after = [served.metric(name) for name in names]
    counted = [new - old for new, old in zip(after, before, strict=True)]
    assert counted == [usage["completion_tokens"], usage["forwards"], usage["prompt_tokens"]]
    assert served.metric("dsb_time_to_last_token_seconds_count") >= 1


def test_canvas_fills_as_generate_fills_it(served):
    settings = {"threshold": 0.99, "gen_length": 32}
    seen: list[list[int]] = []
    ids = torch.tensor([encode(served, PROBLEMS[0])])
    dsb.generate(
        served.model, ids, on_step=lambda e: seen.append(e.canvas[0, ids.shape[1] :].tolist()),
        **settings,
    )  # fmt: skip
    stream = served.chat(
        messages=chat(PROBLEMS[0]), stream=True, stream_options={"include_canvas": True},
        **settings,
    )  # fmt: skip
    events = [json.loads(line[6:]) for line in stream.text.split("\n\n")[:-2]]
    shown = [e["choices"][0]["canvas"] for e in events if "canvas" in e["choices"][0]]
    mask = served.model.dsb.mask_id
    words = [[None if t == mask else served.tokenizer.decode([t]) for t in ids] for ids in seen]
    assert len(words) > 3
    assert [canvas["tokens"] for canvas in shown] == words
    assert [canvas["forward"] for canvas in shown] == list(range(1, len(words) + 1))
    assert all(0 <= start <= end <= 32 for start, end in (canvas["block"] for canvas in shown))


def test_on_step_must_be_callable(served):
    with pytest.raises(TypeError, match="on_step=3: expected a callable that takes a RowEvent"):
        dsb.BatchEngine(served.model).submit([5], on_step=3)


def test_page_is_served_and_loads_nothing_from_elsewhere(served):
    for path, kind in (("/", "html"), ("/page.js", "javascript"), ("/events.js", "javascript"),
                       ("/page.css", "css")):  # fmt: skip
        answer = httpx.get(f"{served.url}{path}")
        assert answer.status_code == 200 and kind in answer.headers["content-type"]
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "//" not in answer.text.replace("// ", "")


@pytest.mark.skipif(not which("node"), reason="needs node")
def test_pages_parser_takes_events_cut_anywhere():
    script = """
        import { eventParser } from %s;
        const text = 'data: {"a": "é"}\\n\\ndata: b\\n\\n: note\\n\\ndata: [DONE]\\n\\n';
        for (let cut = 0; cut <= text.length; cut++) {
          const seen = [];
          const parse = eventParser((data) => seen.push(data));
          parse(text.slice(0, cut)); parse(text.slice(cut));
          console.log(JSON.stringify(seen));
        }"""
    page = Path(str(resources.files("dsb_runtime.doors.server") / "page"))
    module = json.dumps((page / "events.js").as_uri())
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script % module],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == {'["{\\"a\\": \\"é\\"}","b","[DONE]"]'}

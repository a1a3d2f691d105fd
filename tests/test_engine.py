"""The engine: captured steps against direct ones, buffers, faults, threads."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import dsb_runtime as dsb
from dsb_kernels.rows import Column, StepKind, read_rows
from dsb_runtime.engine import engine as engine_module
from dsb_runtime.engine import loop
from dsb_runtime.engine.step import StepShape
from tests import golden
from tests.golden import biased_to_eos, left_pad, prompts
from tests.mutations import kernels
from tests.recorded import Recorder

SHAPE = {"gen_length": 24, "block_length": 8}


def engine_of(family: str = "llada", captured: bool = False) -> dsb.Engine:
    """A new engine, whose steps are recorded and replayed where `captured`."""
    how = {"capture": Recorder()} if captured else {"graphs": False}
    return dsb.Engine(golden.model(family), **how)


def check_equal(
    engine: dsb.Engine, ids: torch.Tensor, model: PreTrainedModel | None = None
) -> dsb.GenerationOutput:
    """An engine decodes what another one decodes that is new and captures nothing."""
    fresh = dsb.Engine(model or engine.model, graphs=False)
    out, expected = (e.generate(ids, **SHAPE) for e in (engine, fresh))
    assert torch.equal(out.sequences, expected.sequences)
    assert out.tokens_per_forward == expected.tokens_per_forward
    return out


# --- two ways to drive a step -----------------------------------------------------------------


def check_captured(family: str, index: int) -> Recorder:
    engine = engine_of(family, captured=True)
    recorder = engine.loop.capture
    out = golden.check_trajectory(engine.generate, family, index)
    # Again, now from recordings alone.
    recorded = len(recorder.recordings)
    assert golden.check_trajectory(engine.generate, family, index).nfe == out.nfe
    assert recorder.replays > 0 and len(recorder.recordings) == recorded
    return recorder


@pytest.mark.parametrize(("family", "index"), golden.CASES)
def test_captured_trajectory(family, index):
    check_captured(family, index)


@pytest.mark.slow
def test_captured_tokens_by_kernel():
    engine = engine_of("dream", captured=True)
    golden.check_kernels(engine.generate, "dream", "dsb_cache_greedy", blocks=2)
    recorder = engine.loop.capture
    assert recorder.replays > 0
    names = {name for recording in recorder.recordings for name in recording.names}
    assert {"dsb.rope_write_kv", "dsb.window_attention", "dsb.unmask_and_slide"} <= names


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["none", "dual", "dsb"])
@pytest.mark.parametrize("rule", [{"threshold": 0.6}, {"steps": 12}])
def test_captured_batch_rows_equal_single_runs(family, cache, rule):
    engine, alone = engine_of(family, captured=True), engine_of(family)
    golden.check_batch(engine.generate, alone.generate, prompts(3), cache=cache, **SHAPE, **rule)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "policy"), [("llada", "full"), ("dream", "response")])
def test_a_batch_by_kernel(family, policy):
    """Rows that step apart: the kernels then serve some of the cache's rows, in any order."""
    settings = {"gen_length": 6, "block_length": 3, "threshold": 0.6, "refresh_policy": policy}
    rows = [row[:6] for row in prompts(2, seed=2)]
    ids, mask = left_pad(rows)
    expected = dsb.generate(golden.model(family), ids, attention_mask=mask, **settings)
    kinds: list[tuple[str, int]] = []
    with kernels():
        out = engine_of(family).generate(
            ids, attention_mask=mask, on_step=lambda e: kinds.append((e.kind, len(e.rows))),
            **settings,
        )  # fmt: skip
    assert torch.equal(out.sequences, expected.sequences) and out.row_nfe == expected.row_nfe
    assert any(count == 1 for _, count in kinds), "rows must step apart, or this shows little"


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_captured_steps_serve_other_prompts_and_lengths(family):
    """A prompt is padded to the next multiple, so that steps recorded for one serve another. A
    longer one makes the memory grow, and drops the steps that point into the old one."""
    engine = engine_of(family, captured=True)
    for prompt in prompts(4):
        check_equal(engine, prompt[None])
    assert len(engine.loop.sessions) == 1
    for prompt in (torch.arange(2, 102), prompts(1)[0]):
        check_equal(engine, prompt[None])


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 40}])
def test_the_same_seed_gives_the_same_tokens_captured_or_not(family, options):
    if options and family == "llada":
        options = {"threshold": 0.5}
    ids, mask = left_pad(prompts(3))
    runs = []
    for engine in (engine_of(family, captured=True), engine_of(family)):
        for seed in (1, 2):
            out = engine.generate(
                ids, attention_mask=mask, temperature=1.0,
                generator=torch.Generator().manual_seed(seed), **SHAPE, **options,
            )  # fmt: skip
            runs.append(out.sequences.tolist())
    assert runs[:2] == runs[2:] and runs[0] != runs[1]


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_rows_of_a_batch_draw_different_noise(family):
    prompt = prompts(1)[0]
    out = dsb.generate(golden.model(family), prompt.repeat(4, 1), temperature=1.5, **SHAPE)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 4


def watch_launches(engine: dsb.Engine, monkeypatch: pytest.MonkeyPatch) -> list[StepShape]:
    launched, launch = [], engine.loop.launch
    monkeypatch.setattr(engine.loop, "launch", lambda *a: launched.append(a[1]) or launch(*a))
    return launched


def test_a_step_is_launched_before_its_predecessor_is_known(monkeypatch):
    """With one token a step what comes next is certain: the host is one step behind but for
    refreshes, and no step is wasted."""
    engine, speculate, guesses = engine_of(captured=True), loop.speculate, []
    launched = watch_launches(engine, monkeypatch)
    monkeypatch.setattr(loop, "speculate", lambda *a: guesses.append(speculate(*a)) or guesses[-1])
    out = engine.generate(prompts(1)[0][None], gen_length=24, block_length=8, steps=24)
    assert out.nfe == 24 == len(launched)
    assert sum(guess is not None for guess in guesses) >= 15


def test_a_wrong_guess_changes_nothing(monkeypatch):
    """A window step is expected after every step; refreshes and ends are then missed at first."""

    def guess(session, table, shape, most_new):
        missed = table[0].next_kind != shape.kind  # the step under way is such a guess
        return None if missed or not session.captured else StepShape(StepKind.WINDOW, 1, 32, 8)

    engine = engine_of(captured=True)
    launched = watch_launches(engine, monkeypatch)
    monkeypatch.setattr(loop, "speculate", guess)
    forwards = sum(check_equal(engine, prompt[None]).nfe for prompt in prompts(3))
    assert len(launched) > forwards, "some guesses must be wrong, or this shows nothing"


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_step_can_be_wrong(data):
    """Any steps in any order, room for too few rows, positions or candidates among them, lead a
    batch to the tokens that its rows get alone."""
    family = data.draw(st.sampled_from(golden.FAMILIES))
    rows = prompts(3)
    ids, mask = left_pad(rows)
    leftpad = (mask.shape[1] - mask.sum(-1)).int()
    policy = data.draw(st.sampled_from(["full", "response"]))
    config = dsb.DecodingConfig(threshold=0.5, refresh_policy=policy, **SHAPE)
    engine = engine_of(family)
    with torch.no_grad():
        masks = ids.new_full((3, 24), engine.model.dsb.mask_id)
        session = engine.loop.session(config, torch.cat([ids, masks], 1), leftpad)
        length = session.state.canvas.shape[1]
        for _ in range(400):
            shape = loop.next_step(session, read_rows(session.state.table))
            if shape is None:
                break
            if data.draw(st.integers(0, 3)) > 0:
                kind = data.draw(st.sampled_from([k for k in StepKind if k != StepKind.NOTHING]))
                widths = {StepKind.REFRESH: st.just(length), StepKind.RESPONSE: st.just(25)}
                width = data.draw(widths.get(kind, st.integers(1, length)))
                count, candidates = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
                shape = StepShape(kind, count, width, candidates)
            session.step(shape)
    for i, row in enumerate(rows):
        alone = dsb.generate(golden.model(family), row[None], config)
        assert session.state.canvas[i, -24:].tolist() == alone.sequences[0, -24:].tolist()
        assert session.state.table[i, Column.FORWARDS] == alone.nfe


# --- buffers ----------------------------------------------------------------------------------


def test_memory_is_reused_and_grows():
    """What is reserved is rows times positions, not the largest of each."""
    engine = engine_of()
    small, large = prompts(2)[1][None], torch.arange(2, 202)[None]

    def run(ids: torch.Tensor) -> int:
        check_equal(engine, ids)
        return engine.loop.storage.data_ptr()

    assert run(small) == run(small), "the same memory serves the next call"
    size = len(engine.loop.storage)
    engine.generate(torch.full((8, 4), 7), **SHAPE)
    assert len(engine.loop.storage) > size
    grown = engine.loop.storage.data_ptr()
    assert run(large) == grown, "a long row fits where a batch did"
    assert run(small) == grown, "a smaller call leaves it as it is"
    engine.release()
    assert engine.loop.storage is None and run(small)


def test_captured_steps_are_kept_for_a_few_settings_only():
    engine = engine_of(captured=True)
    for threshold in range(loop.SESSIONS + 3):
        engine.generate(prompts(1)[0][None], threshold=threshold / 20, **SHAPE)
    assert len(engine.loop.sessions) == loop.SESSIONS


def test_changed_weights_are_noticed():
    """In place: seen by all. Replaced or moved: packed and captured anew."""
    model = copy.deepcopy(golden.model("llada"))
    engine, prompt = dsb.Engine(model, capture=Recorder()), prompts(1)[0][None]
    first = engine.generate(prompt, **SHAPE).sequences

    def matches() -> bool:
        return torch.equal(check_equal(engine, prompt, copy.deepcopy(model)).sequences, first)

    assert matches()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-3)
    assert not matches()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.div_(-3)
    model.model.layers[1].self_attn.q_proj.weight.data = torch.randn(64, 64)
    assert not matches()
    model.double()
    model.float()
    assert not matches()
    with biased_to_eos("llada") as biased:
        model.lm_head = biased.lm_head
        assert not matches()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("modes", [(False, True, False, True), (True, False, True, False)])
def test_calls_inside_and_outside_of_inference_mode(captured, modes):
    """The model and what is kept between calls come from inside of one and are used outside, or
    the other way; weights that were packed inside can still be trained."""
    with torch.inference_mode(modes[0]):
        model = copy.deepcopy(golden.model("llada"))
    engine = dsb.Engine(model, capture=Recorder() if captured else None)
    for mode in modes[1:]:
        with torch.inference_mode(mode):
            check_equal(engine, prompts(1)[0][None], golden.model("llada"))
    assert modes[0] or not any(p.is_inference() for p in model.parameters())


# --- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("where", "when"), [("forward", n) for n in (1, 3, 6)] + [("on_step", 2)])
def test_an_interrupt_leaves_the_next_call_correct(captured, where, when):
    """Ctrl-C in the middle of a forward, also while it is being recorded, or in `on_step`."""
    model, prompt = golden.model("llada"), prompts(1)[0][None]
    engine, calls = engine_of(captured=captured), []

    def interrupt(*args: object) -> None:
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt

    embed, options = model.model.embed_tokens, {}
    if where == "on_step":
        embed, options = torch.nn.Identity(), {"on_step": interrupt}
    with embed.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, **options, **SHAPE)
    for _ in range(2):
        check_equal(engine, prompt)


def test_threads_do_not_mix():
    """Four threads: two share a model's own engine, two have engines of their own."""
    model = golden.model("llada")
    rows = prompts(4)
    expected = [dsb.generate(model, row[None], **SHAPE).sequences for row in rows]
    wrong: list[int] = []

    def work(i: int) -> None:
        run = engine_of().generate if i % 2 else golden.generate_of("llada")
        for _ in range(4):
            if not torch.equal(run(rows[i][None], **SHAPE).sequences, expected[i]):
                wrong.append(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # which raises what a thread raised
    assert not wrong


def test_the_first_calls_of_two_threads_make_one_engine(monkeypatch):
    """Or they would decode at the same time, each in K/V memory of its own."""
    model, make = copy.deepcopy(golden.model("llada")), dsb.Engine.__init__
    monkeypatch.setattr(dsb.Engine, "__init__", lambda *args: time.sleep(0.1) or make(*args))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(engine_module.engine_of, [model, model])
    assert first is second


def test_a_call_inside_a_call():
    model, (outer, inner) = golden.model("llada"), (row[None] for row in prompts(2))
    expected = [dsb.generate(model, ids, **SHAPE).sequences for ids in (outer, inner)]
    inner_sequences: list[torch.Tensor] = []

    def again(event: dsb.StepEvent) -> None:
        inner_sequences.append(dsb.generate(model, inner, **SHAPE).sequences)

    out = dsb.generate(model, outer, on_step=again, **SHAPE)
    assert torch.equal(out.sequences, expected[0]) and len(inner_sequences) == out.nfe
    assert all(torch.equal(sequences, expected[1]) for sequences in inner_sequences)
    engine = dsb.Engine(model)
    with pytest.raises(RuntimeError, match="on_step"):
        engine.generate(outer, on_step=lambda e: engine.generate(inner))


def test_a_model_with_an_engine_can_be_copied_pickled_and_freed():
    model = copy.deepcopy(golden.model("llada"))
    prompt = prompts(1)[0][None]
    expected = dsb.generate(model, prompt, **SHAPE).sequences
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(dsb.generate(other, prompt, **SHAPE).sequences, expected)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None, "the engine keeps the model alive"
    finally:
        gc.enable()


def test_graphs_need_a_gpu():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="graphs=True"):
            dsb.Engine(golden.model("llada"), graphs=True)
    with pytest.raises(TypeError, match="model=int"):
        dsb.Engine(3)

"""The live canvas and the trace picture, fed by real decodings."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

import dsb_runtime as dsb
from dsb_runtime.cli.live import LEGEND, MASK_GLYPH, STYLES, LiveCanvas, canvas_text
from dsb_runtime.measure.trace import (
    BLOCK_COLOR,
    PREFIX_COLOR,
    REFRESH_COLOR,
    RESPONSE_COLOR,
    Trace,
)
from tests import golden

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
SHAPE = {"gen_length": 24, "block_length": 8}
MASK = 511


@pytest.fixture(scope="module")
def tokenizer(chat) -> PreTrainedTokenizerBase:
    return dsb.load_tokenizer(chat)


def decode(watch, ids: torch.Tensor = PROMPT, family: str = "llada", **settings):
    if settings.get("cache", "dsb") == "dsb":
        settings["prefix_window"] = 3
    return dsb.generate(golden.model(family), ids, on_step=watch, **SHAPE, **settings)


# --- trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", golden.FAMILIES)
@pytest.mark.parametrize("cache", ["dsb", "none"])
def test_a_trace_holds_every_commit_and_window(family, cache):
    trace = Trace(5, 24)
    out = decode(trace, family=family, cache=cache)
    assert len(trace.kinds) == len(trace.windows) == out.nfe
    assert [len(c) for c in trace.commits] == out.tokens_per_forward
    assert sorted(p for commit in trace.commits for p, _ in commit) == list(range(5, 29))
    for (start, end, prefix), commit in zip(trace.windows, trace.commits, strict=True):
        assert all(start <= p < end and 0 < c <= 1 for p, c in commit)
        assert 0 <= prefix <= start
    assert trace.kinds[0] == "refresh"
    assert ("window" in trace.kinds) == (cache != "none")


def test_a_trace_of_one_row_of_a_batch():
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    traces = [Trace(3, 24, row) for row in range(3)]
    out = decode(lambda event: [t(event) for t in traces], ids)
    assert [len(t.kinds) for t in traces] == out.row_nfe
    for row, trace in enumerate(traces):
        alone = Trace(3, 24)
        decode(alone, ids[row : row + 1])
        assert (trace.kinds, trace.windows) == (alone.kinds, alone.windows)


def painted(path: Path, color: str) -> np.ndarray:
    """Where a picture has a colour: (height, width) bool."""
    picture = (matplotlib.image.imread(path)[:, :, :3] * 255).round()
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.abs(picture - rgb).max(-1) <= 1


@pytest.mark.parametrize("cache", ["dsb", "none"])
def test_the_picture_shows_windows_and_commits(tmp_path, cache):
    trace = Trace(5, 24)
    decode(trace, cache=cache)
    path = tmp_path / "a.png"
    trace.save(path, title="a title")
    assert painted(path, BLOCK_COLOR).sum() > 20 and painted(path, REFRESH_COLOR).sum() > 20
    assert (painted(path, PREFIX_COLOR).sum() > 20) == (cache == "dsb")
    assert not painted(path, RESPONSE_COLOR).any()


def test_the_picture_shows_response_refreshes(tmp_path):
    """From the response's start to its end: right of the prompt, which a full refresh covers."""
    trace = Trace(5, 24)
    decode(trace, refresh_policy="response", full_refresh_every=8)
    assert trace.kinds.count("response") == 2 and trace.kinds.count("refresh") == 1
    path = tmp_path / "a.png"
    trace.save(path)
    response, full = painted(path, RESPONSE_COLOR), painted(path, REFRESH_COLOR)
    left, right = np.nonzero(full.any(0))[0][[0, -1]]
    columns = np.nonzero(response.any(0))[0]
    assert left < columns[0] and abs(right - columns[-1]) <= 2
    assert response[full.any(1)].sum() == 0


def test_places_that_take_a_picture(tmp_path: Path):
    trace = Trace(5, 24)
    with pytest.raises(ValueError, match="nothing was recorded"):
        trace.save(tmp_path / "a.png")
    decode(trace)
    for name, said in (("a.txt", "ending in"), ("no/a.png", "no such"), ("", "a folder")):
        with pytest.raises(ValueError, match=rf"path {tmp_path / name}: .*{said}"):
            trace.save(tmp_path / name)
    for right in ("a.svg", "a.pdf", "A.PNG"):
        trace.save(tmp_path / right)
        assert (tmp_path / right).stat().st_size > 1000


# --- live canvas ------------------------------------------------------------------------------


def test_every_position_has_the_style_of_its_state(tokenizer):
    seen: set[str] = set()
    done: set[int] = set()
    names = {style: name for name, style in STYLES.items()}

    def state_of(index: int, row: Any, new: set[int]) -> str:
        if index >= 5 and index not in done:
            return "active" if row.start <= index < row.end else "mask"
        if index in new:
            return "new"
        if row.start - row.prefix <= index < row.start:
            return "prefix"
        return "prompt" if index < 5 else "committed"

    def watch(event: dsb.StepEvent) -> None:
        text = canvas_text(tokenizer, event, 5, MASK)
        assert len(text.spans) == 29
        new = set(event.position[0][event.commit[0]].tolist())
        done.update(new)
        for index, span in enumerate(text.spans):
            state = state_of(index, event.table[0], new)
            seen.add(state)
            assert names[span.style] == state
            masked = state in ("active", "mask")
            word = MASK_GLYPH if masked else f"w{int(event.canvas[0, index])}"
            assert text.plain[span.start : span.end] == word

    decode(watch)
    assert seen == set(STYLES) == set(LEGEND)


def test_a_suffix_is_drawn_as_the_prompt(tokenizer):
    ids = torch.tensor([[5, 6, MASK, MASK, 7]])

    def watch(event: dsb.StepEvent) -> None:
        styles = [span.style for span in canvas_text(tokenizer, event, 2, MASK).spans]
        assert styles[4] == STYLES["prompt"] != styles[2]

    dsb.infill(golden.model("llada"), ids, on_step=watch, cache="none")


def test_left_padding_is_not_drawn(tokenizer):
    padded = torch.cat([torch.ones(1, 3, dtype=torch.int64), PROMPT], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    texts: list[Text] = []
    drawn = functools.partial(canvas_text, tokenizer, prompt_length=8, mask_id=MASK, leftpad=3)
    decode(lambda event: texts.append(drawn(event)), padded, attention_mask=mask)
    assert {len(text.spans) for text in texts} == {29}


def test_ids_that_are_no_words_of_the_response(tokenizer):
    """LLaDA's embedding has ids beyond its tokenizer; a padded prompt may hold the mask id."""

    def watch(event: dsb.StepEvent) -> None:
        event.canvas[0, 0] = 9999
        assert canvas_text(tokenizer, event, 5, 7).plain.startswith("<9999> w6 w7 ")
        event.canvas[0, 0] = 5

    decode(watch)


def test_a_terminal_gets_every_frame(tokenizer):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=60, color_system="truecolor")
    with LiveCanvas(tokenizer, 5, MASK, frame_seconds=0.001, console=console) as live:
        out = decode(live)
    shown = stream.getvalue()
    assert "\x1b[" in shown and MASK_GLYPH in shown
    assert all(f"forward {index + 1} " in shown for index in range(out.nfe))
    assert all(word.split()[0] in shown for word in LEGEND.values())
    assert live.spent >= 0.001 * out.nfe


def test_anything_else_gets_the_last_frame(tokenizer):
    stream = io.StringIO()
    trace = Trace(5, 24)
    with LiveCanvas(tokenizer, 5, MASK, frame_seconds=0, console=Console(file=stream)) as live:
        out = decode(lambda event: (trace(event), live(event)))
    shown = stream.getvalue()
    assert "\x1b" not in shown and shown.count("forward ") == 1
    assert LEGEND["new"] not in shown, "a legend explains colours"
    words = [f"w{i}" for i in out.sequences[0].tolist()]
    assert " ".join(words) in " ".join(shown.split())
    assert torch.equal(out.sequences, decode(None).sequences), "watching changes nothing"

"""`dsb generate`: answer one prompt, or fill in what stands between it and a suffix; options show
the canvas, draw it or print JSON."""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.cli.live import LiveCanvas
from dsb_runtime.config import DecodingConfig, check_int, check_real
from dsb_runtime.doors.openai.asked import prompt_ids
from dsb_runtime.engine.engine import generate, infill
from dsb_runtime.engine.output import GenerationOutput, StepEvent
from dsb_runtime.engine.stops import decoded_text
from dsb_runtime.families import check_model
from dsb_runtime.measure.plots import check_picture
from dsb_runtime.measure.trace import Trace

FRAME_SECONDS = 0.1
MOST_CHARACTERS = 2**24  # of a prompt, many times what any model has positions for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt, or - to read it from standard input")
    parser.add_argument(
        "--suffix", metavar="TEXT", help="what follows the response, which fills the gap of "
        "gen_length tokens before it; an EOS then ends it only with --stop-at-eos",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end the response with this text, up to "
        "which its tokens count then (may be repeated)",
    )  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--raw", action="store_true", help="do not apply the chat template")
    add("--live", action="store_true", help="show the canvas while it fills")
    add("--frame-seconds", type=float, metavar="S", help="with --live, the pause between frames "
        f"(default: {FRAME_SECONDS})")  # fmt: skip
    add("--trace", type=Path, metavar="FILE.png", help="draw position by forward")
    add("--json", action="store_true", help="print one JSON object")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or TypeError for a wrong argument, before a checkpoint is read."""
    if args.live and args.json:
        raise ValueError("--live and --json: expected one of the two")
    if args.frame_seconds is not None:
        check_real("--frame-seconds", args.frame_seconds, 0, 3600)
        if not args.live:
            raise ValueError(
                f"--frame-seconds={args.frame_seconds:g}: expected it with --live only"
            )
    check_picture("--trace", args.trace)
    check_text("--suffix", args.suffix or "")
    for stop in args.stop or ():
        check_text("--stop", stop)
        if not stop:
            raise ValueError("--stop='': expected some text")
    if args.stop and args.suffix is not None:
        raise ValueError("--stop and --suffix: expected one of the two")
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**63 - 1)


def check_text(name: str, text: str) -> None:
    """Raise ValueError for bytes that are no text, which are surrogates in an argument, and for
    more characters than any prompt has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: character {error.start} is no {error.encoding}; expected text"
        ) from error
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name}: expected at most {MOST_CHARACTERS} characters")


def read_prompt(prompt: str) -> str:
    """The prompt's text: `prompt` itself, or standard input for "-".

    Raises:
        ValueError: it is empty, too long, or no text.
    """
    if prompt == "-":
        if sys.stdin is None:
            raise ValueError("prompt -: standard input is closed; expected some text")
        try:
            prompt = sys.stdin.read(MOST_CHARACTERS + 1)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompt: byte {error.start} is no {error.encoding}; expected text"
            ) from error
    check_text("prompt", prompt)
    if not prompt.strip():
        raise ValueError("prompt: empty; expected some text")
    return prompt


def run(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    config: DecodingConfig,
) -> int:  # fmt: skip
    """Print the answer and its counts."""
    prompt_tokens = prompt_ids(tokenizer, args.prompt, args.raw)
    input_ids = torch.tensor([prompt_tokens], dtype=torch.int64, device=model.device)
    prompt, mask_id = input_ids.shape[1], check_model(model).mask_id
    if mask_id in prompt_tokens:
        raise ValueError(
            "prompt: it has the mask token; expected other text, or --suffix for a gap"
        )
    unknown = prompt_tokens.count(tokenizer.unk_token_id)
    if unknown:
        print(f"dsb: {unknown} tokens of the prompt are unknown to the model", file=sys.stderr)
    stops = {"stop_strings": args.stop, "tokenizer": tokenizer}
    decode: Callable[..., GenerationOutput] = functools.partial(generate, **stops)
    if args.suffix is not None:
        suffix = tokenizer(args.suffix, add_special_tokens=False).input_ids
        if not suffix:
            raise ValueError(f"--suffix={args.suffix!r}: no token; expected some text")
        if mask_id in suffix:
            raise ValueError(
                f"--suffix={args.suffix!r}: it has the mask token; expected other text"
            )
        after = input_ids.new_tensor([[mask_id] * config.gen_length + suffix])
        input_ids, decode = torch.cat([input_ids, after], dim=1), infill
        config = replace(config, stop_at_eos=bool(args.stop_at_eos))
    generator = None
    if args.seed is not None:
        generator = torch.Generator(model.device).manual_seed(args.seed)

    trace = Trace(prompt, config.gen_length) if args.trace else None
    pause = FRAME_SECONDS if args.frame_seconds is None else args.frame_seconds
    live = LiveCanvas(tokenizer, prompt, mask_id, pause) if args.live else None
    watchers = [w for w in (trace, live) if w is not None]

    def on_step(event: StepEvent) -> None:
        for watcher in watchers:
            watcher(event)

    with live or nullcontext():
        began = time.perf_counter()
        out = decode(
            model, input_ids, config, generator=generator, on_step=on_step if watchers else None
        )
        seconds = time.perf_counter() - began - (live.spent if live else 0.0)

    tokens = out.row_tokens[0]
    response = out.sequences[0, prompt : prompt + config.gen_length]
    answer = decoded_text(tokenizer, response[:tokens]).strip()
    if args.json:
        print(json.dumps({
            "answer": answer, "tokens": tokens, "forwards": out.nfe,
            "tokens_per_forward": tokens / out.nfe, "tokens_per_second": tokens / seconds,
            "seconds": seconds, "committed_per_forward": out.tokens_per_forward,
            "response_ids": response.tolist(),
        }))  # fmt: skip
    else:
        print(answer)
        if not answer:
            print("dsb: the answer has no text", file=sys.stderr)
        print(
            f"{tokens} tokens, {out.nfe} forwards, {tokens / out.nfe:.2f} tokens per forward, "
            f"{tokens / seconds:.1f} tokens/s"
        )
    if trace is not None:  # the answer comes first, since drawing may fail
        trace.save(args.trace)
    return 0

"""`dsb generate`: answer one prompt, or fill in what stands between it and a suffix; options show
the canvas, draw it or print JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsb_runtime.cli.live import LiveCanvas
from dsb_runtime.config import DecodingConfig, check_int, check_real
from dsb_runtime.engine.engine import StepEvent, generate, infill
from dsb_runtime.families import check_model
from dsb_runtime.measure.plots import check_picture
from dsb_runtime.measure.trace import Trace

MOST_CHARACTERS = 2**24  # of a prompt, many times what any model has positions for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the prompt, or - to read it from standard input")
    parser.add_argument(
        "--suffix", metavar="TEXT", help="what follows the response, which fills the gap of "
        "gen_length tokens before it; an EOS then ends it only with --stop-at-eos",
    )  # fmt: skip
    add = parser.add_argument_group("output").add_argument
    add("--raw", action="store_true", help="do not apply the chat template")
    add("--live", action="store_true", help="show the canvas while it fills")
    add("--frame-seconds", type=float, default=0.1, help="pause between frames (default: 0.1)")
    add("--trace", type=Path, metavar="FILE.png", help="draw position by forward")
    add("--json", action="store_true", help="print one JSON object")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError or TypeError for a wrong argument, before a checkpoint is read."""
    if args.live and args.json:
        raise ValueError("--live and --json: expected one of the two")
    check_real("--frame-seconds", args.frame_seconds, 0, 3600)
    check_picture("--trace", args.trace)
    check_text("--suffix", args.suffix or "")
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


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> torch.Tensor:
    """(1, P) ids of the prompt, in the checkpoint's chat format unless `raw`."""
    if not tokenizer.chat_template or raw:
        return tokenizer(prompt, return_tensors="pt").input_ids
    return encode_messages(tokenizer, [{"role": "user", "content": prompt}])


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> torch.Tensor:
    """(1, P) ids of a chat, in the checkpoint's chat format."""
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a checkpoint's template may raise anything
        raise ValueError(f"chat template: {error}; --raw leaves it out") from error
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def run(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    config: DecodingConfig,
) -> int:  # fmt: skip
    """Print the answer and its counts."""
    input_ids = encode(tokenizer, args.prompt, args.raw).to(model.device)
    prompt, mask_id, decode = input_ids.shape[1], check_model(model).mask_id, generate
    if args.suffix is not None:
        suffix = tokenizer(args.suffix, add_special_tokens=False).input_ids
        if not suffix:
            raise ValueError(f"--suffix={args.suffix!r}: no token; expected some text")
        if mask_id in suffix or (input_ids == mask_id).any():
            raise ValueError("the mask token in the prompt or in --suffix; expected other text")
        after = input_ids.new_tensor([[mask_id] * config.gen_length + suffix])
        input_ids, decode = torch.cat([input_ids, after], dim=1), infill
        config = replace(config, stop_at_eos=bool(args.stop_at_eos))
    generator = None
    if args.seed is not None:
        generator = torch.Generator(model.device).manual_seed(args.seed)

    trace = Trace(prompt, config.gen_length) if args.trace else None
    live = LiveCanvas(tokenizer, prompt, mask_id, args.frame_seconds) if args.live else None
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
    ids = response[:tokens]
    answer = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    if args.json:
        print(json.dumps({
            "answer": answer, "tokens": tokens, "forwards": out.nfe,
            "tokens_per_forward": tokens / out.nfe, "tokens_per_second": tokens / seconds,
            "seconds": seconds, "committed_per_forward": out.tokens_per_forward,
            "response_ids": response.tolist(),
        }))  # fmt: skip
    else:
        print(answer)
        print(
            f"{tokens} tokens, {out.nfe} forwards, {tokens / out.nfe:.2f} tokens per forward, "
            f"{tokens / seconds:.1f} tokens/s"
        )
    if trace is not None:  # the answer comes first, since drawing may fail
        trace.save(args.trace)
    return 0

"""The `dsb` command: `dsb generate`, `bench`, `profile`, `eval`, `convert`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dsb_runtime.cli.live import LiveCanvas
from dsb_runtime.config import SAMPLING, DecodingConfig, check_int, check_real, settings
from dsb_runtime.defaults import defaults_for
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.engine import GenerationOutput, StepEvent, generate
from dsb_runtime.families import FAMILIES
from dsb_runtime.measure import bench, evaluate, profile
from dsb_runtime.measure.plots import check_picture
from dsb_runtime.measure.trace import Trace
from dsb_runtime.models.convert import convert
from dsb_runtime.models.load import load_model, load_tokenizer

COUNTING = (
    "A row's tokens are its response positions up to and including its first EOS: never the "
    "prompt, never what follows the EOS."
)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=str(MODEL_DIR),
        metavar="DIR-OR-HUB-ID",
        help="checkpoint folder or hub id (default: the embedded model)",
    )
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    group.add_argument("--family", choices=sorted(FAMILIES), help="where config.json does not say")
    group.add_argument("--mask-id", type=int, help="where config.json names no mask token")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An option for each setting, None where it is not named."""
    groups: dict[str, Any] = {}
    for name, row in settings().items():
        if row.group not in groups:
            groups[row.group] = parser.add_argument_group(row.group)
        how: dict[str, Any] = {"type": row.kind, "metavar": "N" if row.kind is int else "X"}
        if row.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif row.choices:
            how = {"choices": row.choices}
        default = row.unset or ("" if row.optional else str(row.default))
        text = f"{row.help} (default: {default})" if default else row.help
        option = f"--{name.replace('_', '-')}"
        groups[row.group].add_argument(option, help=text.replace("%", "%%"), **how)
    groups[SAMPLING].add_argument("--seed", type=int, metavar="N", help="of the random numbers")


def named_settings(args: argparse.Namespace, model: PreTrainedModel) -> DecodingConfig:
    """The settings named on the command line, and the model's defaults for the others."""
    named = {name: getattr(args, name) for name in settings()}
    return defaults_for(model, **{k: v for k, v in named.items() if v is not None})


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="dsb", description="Decode diffusion language models with DSB and DSB Cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    gen = commands.add_parser("generate", help="answer a prompt", epilog=COUNTING)
    gen.add_argument("prompt", help="the prompt, or - to read it from standard input")
    add_model(gen)
    add_settings(gen)
    output = gen.add_argument_group("output")
    output.add_argument("--raw", action="store_true", help="do not apply the chat template")
    output.add_argument("--live", action="store_true", help="show the canvas while it fills")
    output.add_argument(
        "--frame-seconds", type=float, default=0.1, help="pause between frames (default: 0.1)"
    )
    output.add_argument("--trace", type=Path, metavar="FILE.png", help="draw position × forward")
    output.add_argument("--json", action="store_true", help="print one JSON object")
    gen.set_defaults(run=run_generate)
    timing = commands.add_parser(
        "bench", help="time per step against its limit, tokens/s by batch",
        epilog=f"{COUNTING} Random prompts have no answers that end: here no id counts as an EOS "
        "unless --stop-at-eos is named.",
    )  # fmt: skip
    add_model(timing)
    add_settings(timing)
    bench.add_arguments(timing)
    timing.set_defaults(run=run_bench, stop_at_eos=False)
    # No abbreviations: the command line is printed again without --torch.
    prof = commands.add_parser(
        "profile", help="some steps under Nsight or torch's profiler", epilog=profile.NOTE,
        allow_abbrev=False,
    )  # fmt: skip
    add_model(prof)
    add_settings(prof)
    prompts = prof.add_argument_group("prompts")
    prompts.add_argument("--batch", type=int, default=1, metavar="B", help="default: 1")
    prompts.add_argument("--prompt-length", type=int, default=128,
                         help="random tokens a prompt (default: 128)")  # fmt: skip
    profile.add_arguments(prof)
    prof.set_defaults(run=run_profile, stop_at_eos=False)
    ev = commands.add_parser(
        "eval", help="the embedded model on held-out problems, all settings", epilog=COUNTING
    )
    add_model(ev)
    evaluate.add_arguments(ev)
    ev.set_defaults(run=run_eval)
    copy = commands.add_parser("convert", help="write a checkpoint for plain transformers")
    copy.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    copy.add_argument("target", metavar="DST", help="a new or an empty folder")
    copy.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    copy.add_argument("--family", choices=sorted(FAMILIES), help="where config.json does not say")
    copy.add_argument("--mask-id", type=int, help="where config.json names no mask token")
    copy.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")
    copy.set_defaults(run=run_convert)
    return parser


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = load_model(
        args.model, dtype=args.dtype, device=args.device, family=args.family, mask_id=args.mask_id
    )
    return model, load_tokenizer(args.model)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool) -> torch.Tensor:
    """(1, P) ids of the prompt, in the checkpoint's chat format unless `raw`."""
    if tokenizer.chat_template and not raw:
        message = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template in the checkpoint raises
            raise ValueError(f"chat template: {error}; --raw leaves it out") from error
        return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids


def answer_of(
    out: GenerationOutput, row: int, prompt: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The row's text up to its first EOS."""
    ids = out.sequences[row, prompt : prompt + out.row_tokens[row]]
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def run_generate(args: argparse.Namespace) -> int:
    if args.live and args.json:
        raise ValueError("--live and --json: expected one of the two")
    check_real("--frame-seconds", args.frame_seconds, 0, 3600)
    if args.trace is not None:
        check_picture("--trace", args.trace)
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**63 - 1)
    model, tokenizer = load(args)
    config = named_settings(args, model)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise ValueError("prompt: empty; expected some text")
    input_ids = encode(tokenizer, text, args.raw).to(model.device)
    prompt = input_ids.shape[1]
    generator = None
    if args.seed is not None:
        generator = torch.Generator(model.device).manual_seed(args.seed)

    trace = Trace(prompt, config.gen_length) if args.trace else None
    live = None
    if args.live:
        live = LiveCanvas(tokenizer, prompt, model.dsb.mask_id, frame_seconds=args.frame_seconds)
    watchers = [w for w in (trace, live) if w is not None]

    def on_step(event: StepEvent) -> None:
        for watcher in watchers:
            watcher(event)

    with ExitStack() as stack:
        if live is not None:
            stack.enter_context(live)
        began = time.perf_counter()
        out = generate(
            model, input_ids, config, generator=generator, on_step=on_step if watchers else None
        )
        seconds = time.perf_counter() - began - (live.spent if live else 0.0)

    tokens = out.row_tokens[0]
    answer = answer_of(out, 0, prompt, tokenizer)
    if args.json:
        print(json.dumps({
            "answer": answer, "tokens": tokens, "forwards": out.nfe,
            "tokens_per_forward": tokens / out.nfe, "tokens_per_second": tokens / seconds,
            "seconds": seconds, "committed_per_forward": out.tokens_per_forward,
            "response_ids": out.sequences[0, prompt:].tolist(),
        }))  # fmt: skip
    else:
        print(answer)
        print(
            f"{tokens} tokens, {out.nfe} forwards, {tokens / out.nfe:.2f} tokens per forward, "
            f"{tokens / seconds:.1f} tokens/s"
        )
    if trace is not None:  # after the answer, which a picture that fails does not take along
        trace.save(args.trace)
    return 0


def run_bench(args: argparse.Namespace) -> int:
    if args.kept is not None:
        if args.json is not None:
            raise ValueError("--from and --json: expected one of the two")
        return bench.run_kept(args.kept, args.plot)
    bench.check_arguments(args)
    model, tokenizer = load(args)
    return bench.run(args, model, tokenizer, named_settings(args, model), args.command_line)


def run_profile(args: argparse.Namespace) -> int:
    check_int("--batch", args.batch, 1)
    check_int("--prompt-length", args.prompt_length, 1)
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**63 - 1)
    profile.check_arguments(args)
    model, tokenizer = load(args)
    config = named_settings(args, model)
    seed = args.seed or 0
    prompts = bench.random_prompts(model, tokenizer, args.batch, args.prompt_length, seed)
    return profile.run(args, model, prompts, config, args.process)


def run_eval(args: argparse.Namespace) -> int:
    if args.kept is not None:
        if args.json is not None:
            raise ValueError("--from and --json: expected one of the two")
        return evaluate.run_kept(args.kept, args.plot)
    evaluate.check_arguments(args)
    model, tokenizer = load(args)
    return evaluate.run(args, model, tokenizer)


def run_convert(args: argparse.Namespace) -> int:
    transformers_logging.enable_progress_bar()
    convert(
        args.source, args.target, dtype=args.dtype, family=args.family, mask_id=args.mask_id,
        max_shard_size=args.max_shard_size,
    )  # fmt: skip
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 is success, 2 an error said in one line, 130 an interrupt."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    args.command_line = shlex.join(["dsb", *given])
    # What starts the same process again, however this one was started.
    args.process = sys.orig_argv if argv is None else ["dsb", *given]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("dsb: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        print(f"dsb: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

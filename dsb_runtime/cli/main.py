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
from typing import NoReturn

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from dsb_runtime.cli.live import LiveCanvas
from dsb_runtime.config import (
    CACHES,
    DEFAULT_FULL_EVERY,
    REFRESH_COMMITS,
    REFRESH_POLICIES,
    SCHEDULES,
    DecodingConfig,
    check_int,
    check_real,
)
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.engine.engine import GenerationOutput, StepEvent, generate
from dsb_runtime.families import FAMILIES
from dsb_runtime.measure import bench, evaluate, profile
from dsb_runtime.measure.models import load_preset, random_prompts
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


def add_decoding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--gen-length",
        type=int,
        help="response positions (default: as the checkpoint says, or 256)",
    )
    group.add_argument(
        "--block-length", type=int, help="initial block (default: gen-length / 4, at most 32)"
    )
    group.add_argument("--schedule", choices=SCHEDULES, default="dsb")
    group.add_argument("--max-block-length", type=int, help="default: unbounded (greedy)")
    group.add_argument("--cache", choices=CACHES, default="dsb")
    group.add_argument("--prefix-window", type=int, help="default: the family's published value")
    rules = parser.add_argument_group("selection rule, at most one (default: --threshold 0.9)")
    rules.add_argument("--threshold", type=float, help="commit every confidence of at least this")
    rules.add_argument("--factor", type=float, help="Fast-dLLM's factor rule")
    rules.add_argument("--frechet", type=float, help="Fréchet bound")
    rules.add_argument("--steps", type=int, help="a fixed number of steps")
    sampling = parser.add_argument_group("sampling and ending")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sampling.add_argument("--top-p", type=float, help="Dream only")
    sampling.add_argument("--top-k", type=int, help="Dream only")
    sampling.add_argument("--seed", type=int, help="of the random numbers")
    sampling.add_argument("--stop-at-eos", action=argparse.BooleanOptionalAction, default=True)
    refresh = parser.add_argument_group("refreshes")
    refresh.add_argument("--refresh-commit", choices=REFRESH_COMMITS,
                         help="default: the family's way")  # fmt: skip
    refresh.add_argument("--refresh-policy", choices=REFRESH_POLICIES, default="full",
                         help="response: most of them leave the prompt's K/V")  # fmt: skip
    refresh.add_argument("--full-refresh-every", type=int, metavar="N",
                         help=f"of response: default {DEFAULT_FULL_EVERY}")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="dsb", description="Decode diffusion language models with DSB and DSB Cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    gen = commands.add_parser("generate", help="answer a prompt", epilog=COUNTING)
    gen.add_argument("prompt", help="the prompt, or - to read it from standard input")
    add_model(gen)
    add_decoding(gen)
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
    add_decoding(timing)
    bench.add_arguments(timing)
    timing.set_defaults(run=run_bench, stop_at_eos=False)
    # No abbreviations: the command line is printed again without --torch.
    prof = commands.add_parser(
        "profile", help="some steps under Nsight or torch's profiler", epilog=profile.NOTE,
        allow_abbrev=False,
    )  # fmt: skip
    add_model(prof)
    add_decoding(prof)
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


def load_measured(
    args: argparse.Namespace,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A checkpoint or, with `--preset`, a random model, which has no tokenizer."""
    return (load_preset(args), None) if args.preset else load(args)


def decoding_config(args: argparse.Namespace, model: PreTrainedModel) -> DecodingConfig:
    """The settings named on the command line over the CLI's defaults."""
    gen_length = args.gen_length
    if gen_length is None:
        gen_length = model.generation_config.max_new_tokens or 256
    block_length = args.block_length
    if block_length is None:
        block_length = max(1, min(32, gen_length // 4))
    names = set(DecodingConfig.__dataclass_fields__) - {"gen_length", "block_length"}
    settings = {name: getattr(args, name) for name in names}
    return DecodingConfig(gen_length=gen_length, block_length=block_length, **settings)


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
    config = decoding_config(args, model)
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
    model, tokenizer = load_measured(args)
    return bench.run(args, model, tokenizer, decoding_config(args, model), args.command_line)


def run_profile(args: argparse.Namespace) -> int:
    check_int("--batch", args.batch, 1)
    check_int("--prompt-length", args.prompt_length, 1)
    if args.seed is not None:
        check_int("--seed", args.seed, 0, 2**63 - 1)
    profile.check_arguments(args)
    model, tokenizer = load_measured(args)
    config = decoding_config(args, model)
    seed = args.seed or 0
    prompts = random_prompts(model, tokenizer, args.batch, args.prompt_length, seed)
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

"""The `dsb` command: `dsb generate`, `batch`, `serve`, `bench`, `profile`, `eval`, `convert`."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dsb_runtime.cli import batch, batch_ray, generate, serve
from dsb_runtime.cli.process import OneLineParser, ending, run_process
from dsb_runtime.config import SAMPLING, DecodingConfig, settings
from dsb_runtime.defaults import defaults_for
from dsb_runtime.demo import MODEL_DIR
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.families import FAMILIES
from dsb_runtime.measure import bench, evaluate, profile, requests
from dsb_runtime.measure.command import check_arguments, check_shown, read_again
from dsb_runtime.measure.models import check_room, load_preset, random_prompts
from dsb_runtime.measure.scores import Record
from dsb_runtime.models.convert import convert
from dsb_runtime.models.load import load_model, load_tokenizer

BESIDE_OTHERS = ("drafts", "draft_threshold")  # settings that prompts beside others have not
COUNTING = (
    "A row's tokens are its response positions up to and including its first EOS: never the "
    "prompt, never what follows the EOS."
)
NO_EOS = (
    "Random prompts have no answers that end: here an EOS ends no row unless --stop-at-eos is "
    "named."
)


def add_format(group: Any) -> None:
    """The options that say how a checkpoint is read."""
    group.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--family", choices=sorted(FAMILIES), help="where config.json does not say")
    group.add_argument("--mask-id", type=int, help="where config.json names no mask token")


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default=str(MODEL_DIR), metavar="DIR-OR-HUB-ID",
        help="checkpoint folder or hub id (default: the embedded model)",
    )  # fmt: skip
    group.add_argument("--adapter", metavar="DIR", help="of PEFT, folder or hub id, for the model")
    add_format(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")


def token_ids(text: str) -> tuple[int, ...]:
    """The ids that a text such as "5,6,7" lists."""
    try:
        return tuple(int(token) for token in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ids such as 5,6,7") from None


def add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add the model's options and one for each setting, which is None where it is not named."""
    add_model(parser)
    groups: dict[str, Any] = {}
    for name, entry in settings().items():
        if name in without:
            parser.set_defaults(**{name: None})
            continue
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
        how: dict[str, Any] = {"type": entry.kind, "metavar": "N" if entry.kind is int else "X"}
        if entry.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif entry.kind is tuple:
            how = {"type": token_ids, "metavar": "ID,ID"}
        elif entry.choices:
            how = {"choices": entry.choices}
        default = entry.unset or ("" if entry.default is None else str(entry.default))
        text = f"{entry.help} (default: {default})" if default else entry.help
        option = f"--{name.replace('_', '-')}"
        groups[entry.group].add_argument(option, help=text.replace("%", "%%"), **how)
    groups[SAMPLING].add_argument("--seed", type=int, metavar="N", help="of the random numbers")


def named_settings(args: argparse.Namespace, model: PreTrainedModel) -> DecodingConfig:
    """The settings named on the command line, and the model's defaults for the others."""
    return defaults_for(model, **named_alone(args))


def named_alone(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that are named on the command line."""
    named = {name: getattr(args, name) for name in settings()}
    return {name: value for name, value in named.items() if value is not None}


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder or hub id")
    parser.add_argument("target", metavar="DST", help="a new or an empty folder")
    add_format(parser)
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: 5GB")


def build_parser(defaults: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, of whose options those in `defaults` have the defaults there."""
    parser = OneLineParser(
        prog="dsb", description="Decode diffusion language models with DSB and DSB Cache."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str, run: Callable, *add: Callable, **how: Any) -> None:
        subparser = commands.add_parser(name, help=help, **how)
        for each in add:
            each(subparser)
        subparser.set_defaults(run=run, **(defaults or {}))

    command("generate", "answer a prompt", run_generate, add_settings, generate.add_arguments,
            epilog=COUNTING)  # fmt: skip
    command("batch", "answer a file of prompts, a line each", run_batch,
            functools.partial(add_settings, without=BESIDE_OTHERS), batch.add_arguments,
            epilog=f"{batch.NOTE} {COUNTING}")  # fmt: skip
    command("serve", "OpenAI's API over HTTP", run_serve, add_model, serve.add_arguments,
            epilog=COUNTING)  # fmt: skip
    command("bench", "time per step against its limit, tokens/s by batch", run_bench,
            add_settings, bench.add_arguments, epilog=f"{COUNTING} {NO_EOS}")  # fmt: skip
    # An abbreviation of --torch would stay in the command line that is printed for Nsight.
    command("profile", "some steps under Nsight or torch's profiler", run_profile, add_settings,
            profile.add_arguments, epilog=profile.NOTE, allow_abbrev=False)  # fmt: skip
    command("eval", "an embedded model on held-out problems, all settings", run_eval,
            add_model, evaluate.add_arguments, epilog=COUNTING)  # fmt: skip
    command("convert", "write a checkpoint for plain transformers", run_convert, add_convert)
    return parser


def named_options(args: argparse.Namespace) -> list[str]:
    """The attributes of the options that the command line names, be it at their defaults."""
    words, default = shlex.split(args.command_line)[1:], object()
    names = [n for n in vars(args) if n not in ("command", "run", "command_line", "process")]
    parsed = vars(build_parser(dict.fromkeys(names, default)).parse_args(words))
    return [name for name in names if parsed[name] is not default]


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """A checkpoint or, with `--preset`, a random model, which has no tokenizer."""
    if getattr(args, "preset", None):
        return load_preset(args), None
    model = load_model(
        args.model, dtype=args.dtype, device=args.device, family=args.family, mask_id=args.mask_id,
        adapter=args.adapter,
    )  # fmt: skip
    return model, load_tokenizer(args.model)


def run_generate(args: argparse.Namespace) -> int:
    generate.check_arguments(args)
    args.prompt = generate.read_prompt(args.prompt)  # before a checkpoint is read
    model, tokenizer = load(args)
    return generate.run(args, model, tokenizer, named_settings(args, model))


def run_batch(args: argparse.Namespace) -> int:
    batch.check_arguments(args)
    if args.ray:
        batch_ray.check_arguments(args)
        return batch_ray.run(args, load, named_alone(args))
    return batch.run(args, load, named_alone(args))


def run_serve(args: argparse.Namespace) -> int:
    serve.check_arguments(args)
    with serve.bind(args.host, args.port) as socket:  # before a checkpoint is read
        return serve.run(args, *load(args), socket)


def run_bench(args: argparse.Namespace) -> int:
    check_arguments(args)
    if args.source is not None:
        check_shown(named_options(args), ("plot",))
        read_again(args, lambda record: bench.show(record, args.plot))
        return 0
    requests.check_arguments(args)
    model, tokenizer = load(args)
    return bench.run(args, model, tokenizer, named_settings(args, model), args.command_line)


def run_profile(args: argparse.Namespace) -> int:
    check_arguments(args)
    model, tokenizer = load(args)
    config, seed = named_settings(args, model), args.seed or 0
    check_room(model, args.batch, args.prompt_length, config)
    prompts = random_prompts(model, tokenizer, args.batch, args.prompt_length, seed)
    return profile.run(args, model, prompts, config, args.process)


def run_eval(args: argparse.Namespace) -> int:
    check_arguments(args)
    if args.source is not None:
        check_shown(named_options(args), ("plot", "markdown", "quick", "block_length"))
        evaluate.show_part(read_again(args, Record.of), args)
        return 0
    task = TASKS[args.task]
    configs = evaluate.build_settings(task, args.gen_length, args.block_length or (), args.quick)
    args.model = args.model or str(task.folder)
    return evaluate.run(args, configs, *load(args))


def run_convert(args: argparse.Namespace) -> int:
    transformers_logging.enable_progress_bar()
    convert(
        args.source, args.target, dtype=args.dtype, family=args.family, mask_id=args.mask_id,
        max_shard_size=args.max_shard_size,
    )  # fmt: skip
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status (`dsb_runtime.cli.process.ending`). Without `argv`
    this is the process of the command, whose words are its own."""
    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        args = build_parser().parse_args(words)
        args.command_line = shlex.join(["dsb", *words])
        # This command line starts the same process again, however it was started.
        args.process = sys.orig_argv if argv is None else ["dsb", *words]
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        return args.run(args)

    return (run_process if argv is None else ending)("dsb", run)

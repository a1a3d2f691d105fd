"""Train an embedded model: `python -m tools.embedded_model.train --course NAME --out DIR`.

A run depends on its settings alone: the batch of a step is drawn from the seed and the step's
number. A checkpoint therefore needs no generator states, and a run that was resumed ends in the
weights of one that was not. Interrupt it with Ctrl-C and start it again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsb_runtime.families import LLADA
from tools.embedded_model import sudoku, words
from tools.embedded_model.course import Batch, Course, Settings

MAX_SEQUENCE_LENGTH = 512
VOCAB_MULTIPLE = 64  # the vocabulary has unused ids, as LLaDA's has, since kernels like round sizes
LOG_EVERY = 100  # steps, of which a line of the log has the mean loss
COURSES: dict[str, Course] = {"words": words.COURSE, "sudoku": sudoku.COURSE}


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with bidirectional attention, as LLaDA is, and weights drawn from the seed."""
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=settings.hidden, intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads, max_position_embeddings=MAX_SEQUENCE_LENGTH,
        rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # a padding embedding would get no gradient, and here it is the EOS
        bos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    config.is_causal = False
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    start = COURSES[settings.course].embeddings(tokenizer, model.config.vocab_size, settings.hidden)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(0.3 * start)
        model.lm_head.weight.copy_(0.05 * start)
    return model


def learning_rate(settings: Settings, step: int) -> float:
    """The rate of a step: it rises linearly, is constant, and falls to zero in the second half."""
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    fall = min(1.0, 2 * (1 - step / settings.steps))
    return settings.learning_rate * warm * fall


def build_optimizer(settings: Settings, model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW, with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": settings.weight_decay}]
    groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy of the masked positions, a scalar."""
    length = batch.targets.shape[1]
    logits = model(input_ids=batch.input_ids, logits_to_keep=length, use_cache=False).logits
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum().clamp_min(1.0)


def train(
    settings: Settings, checkpoint: Path, device: torch.device, checkpoint_every: int = 500,
    stop_after: int | None = None,
) -> tuple[LlamaForCausalLM, bool]:  # fmt: skip
    """Start or resume a run. Returns the model and whether the run is complete.

    Ctrl-C or the step `stop_after` ends it early, with the last step in the checkpoint. A log
    beside the checkpoint, in JSON lines, has the mean loss of every LOG_EVERY steps.
    """
    course = COURSES[settings.course]
    tokenizer = course.tokenizer()
    model = build_model(settings, tokenizer).to(device)
    optimizer = build_optimizer(settings, model)
    first = load_checkpoint(checkpoint, settings, model, optimizer)
    last = settings.steps if stop_after is None else min(stop_after, settings.steps)
    log = checkpoint.with_suffix(".jsonl")
    cut_log(log, first)
    step = first
    losses: list[float] = []
    with (
        interrupt_flag() as interrupted,
        tqdm(total=settings.steps, initial=first, desc="training", unit="step") as bar,
    ):
        while step < last and not interrupted:
            batch = course.batch(settings, tokenizer, step)
            batch = Batch(*(t.to(device) for t in (batch.input_ids, batch.targets, batch.weights)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            loss = batch_loss(model, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{fmean(losses):.3f}", refresh=False)
            if step % LOG_EVERY == 0:
                line = {"step": step, "loss": fmean(losses), "time": time.time()}
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                losses.clear()
            if step % checkpoint_every == 0:
                save_checkpoint(checkpoint, settings, model, optimizer, step)
    if step > first and step % checkpoint_every:
        save_checkpoint(checkpoint, settings, model, optimizer, step)
    return model, step == settings.steps


def cut_log(log: Path, step: int) -> None:
    """Drop the lines of a log that come after `step`, where a run goes on, and a line cut short."""
    lines = log.read_text().splitlines() if log.exists() else []
    past = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"{line}\n" for line in past))


@contextmanager
def interrupt_flag() -> Iterator[list[int]]:
    """A list that is not empty after Ctrl-C, so that the loop ends after the step that runs."""
    pressed: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def save_checkpoint(
    path: Path, settings: Settings, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int
) -> None:
    """Write beside `path`, then replace it, so that a crash leaves the old checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    weights, moments = model.state_dict(), optimizer.state_dict()
    state = {"settings": asdict(settings), "step": step, "model": weights, "optimizer": moments}
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, settings: Settings, model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW | None = None,
) -> int:  # fmt: skip
    """Fill model and optimizer from `path` and return its step; 0 if there is no file."""
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint={str(path)!r}: not a readable checkpoint") from error
    for name, value in asdict(settings).items():
        stored = state["settings"].get(name)
        if stored != value:
            raise ValueError(
                f"{name}={value!r}: checkpoint {str(path)!r} was made with {stored!r}; "
                "give that value, or another --out"
            )
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def llada_name(name: str) -> str:
    """The name in the LLaDA hub format of a weight of transformers' Llama."""
    for theirs, ours in LLADA.key_mapping.items():
        pattern = re.escape(ours).replace(r"\\1", r"(\d+)")
        published = theirs.removeprefix("^").replace(r"\.", ".").replace(r"(\d+)", r"\1")
        renamed, hits = re.subn(f"^{pattern}", published, name)
        if hits:
            return renamed
    raise ValueError(f"name={name!r}: expected a weight of LlamaForCausalLM")


def llada_config(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The model's `config.json` in the LLaDA hub format."""
    config = model.config
    return {
        "architectures": ["LLaDAModelLM"], "model_type": "llada",
        "d_model": config.hidden_size, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "n_layers": config.num_hidden_layers,
        "mlp_hidden_size": config.intermediate_size, "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size, "max_sequence_length": config.max_position_embeddings,
        "rope": True, "rope_theta": config.rope_parameters["rope_theta"], "alibi": False,
        "include_bias": False, "include_qkv_bias": False,
        "layer_norm_type": "rms", "rms_norm_eps": config.rms_norm_eps,
        "activation_type": "silu", "block_type": "llama",
        "scale_logits": False, "weight_tying": False,
        "mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def export(model: LlamaForCausalLM, course: Course, out: Path) -> None:
    """Write `out`: float32 weights, configuration and tokenizer in the LLaDA hub format."""
    tokenizer = course.tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    weights = {llada_name(k): v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(llada_config(model, tokenizer), indent=1) + "\n")
    generation = json.dumps({"max_new_tokens": course.gen_length}, indent=2)
    (out / "generation_config.json").write_text(generation + "\n")
    tokenizer.save_pretrained(out)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.embedded_model.train", description="Train an embedded model."
    )
    parser.add_argument("--course", choices=COURSES, default="words", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--checkpoint", type=Path, help="default: OUT.checkpoint.pt")
    parser.add_argument("--steps", type=int, help="default: the course's")
    parser.add_argument("--stop-after", type=int, metavar="STEP",
                        help="end early, with this step in the checkpoint")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--export-only", action="store_true",
                        help="write OUT from the checkpoint as it is")  # fmt: skip
    args = parser.parse_args(arguments)
    for name in ("steps", "stop_after", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {str(args.out)!r}: expected a folder, this is a file")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device not in ("cpu", "cuda"):
        parser.error(f"--device {args.device!r}: expected cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device 'cuda': torch finds no CUDA device here; expected cpu")
    args.checkpoint = args.checkpoint or args.out.with_name(args.out.name + ".checkpoint.pt")
    if args.export_only and not args.checkpoint.exists():
        parser.error(f"--checkpoint {str(args.checkpoint)!r}: no such file to export")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns 0 after the model is written, 2 for bad arguments, 130 where the run
    ended early."""
    args = parse_arguments(arguments)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    course = COURSES[args.course]
    settings = replace(course.settings, steps=args.steps or course.settings.steps, seed=args.seed)
    try:
        if args.export_only:
            model = build_model(settings, course.tokenizer())
            load_checkpoint(args.checkpoint, settings, model)
        else:
            device = torch.device(args.device)
            model, complete = train(settings, args.checkpoint, device, stop_after=args.stop_after)
            if not complete:
                print(f"interrupted; run again to go on from {args.checkpoint}", file=sys.stderr)
                return 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    export(model, course, args.out)
    print(f"model written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

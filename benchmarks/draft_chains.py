"""Forwards that more than one draft would save, counted: the engine runs one (`drafts=1`).

    python -m benchmarks.draft_chains --json benchmarks/draft_chains.json

The steps are the engine's own, and so is every guess: the rule selects by the confidences that are
known. In a *chain* each draft follows from the one before it and sees its keys and values, and all
of them are computed beside the step. Of the *two likeliest* next states one is the engine's guess;
the other decides otherwise about the candidate of which the guess was least certain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

import dsb_runtime as dsb
from benchmarks import batches_of, print_lines, problems_parser, record_of
from benchmarks.drafts import NAMES, settings_of
from dsb_kernels.rows import read_rows
from dsb_runtime.cli.process import run_process
from dsb_runtime.demo.tasks import TASKS
from dsb_runtime.engine.cache import KVCache
from dsb_runtime.engine.drafts import STATE, DraftingStep, DraftState
from dsb_runtime.engine.session import Session, next_step

# How many drafts a chain has, and whether there is one of the second likeliest state beside it.
WAYS = {
    "no draft": (0, False), "one": (1, False), "a chain of two": (2, False),
    "of three": (3, False), "the two likeliest": (1, True),
}  # fmt: skip


def second_likeliest(step: DraftingStep) -> torch.Tensor:
    """The known confidences (B, L + 1) by which the other state is guessed. In each row one of them
    is changed: that which is nearest to what the guess of `step.drafts` asks for. It becomes 0 if
    the guess commits its candidate, and 1 if not."""
    drafts, position = step.drafts, step.state.position
    index = position.clamp(min=0).long()
    known = drafts.last_confidence.gather(1, index)
    value = torch.tensor(step.guess_spec.rule_value)
    if step.spec.rule == "quota":  # it asks for the least that it commits
        value = known.masked_fill(~drafts.commit, torch.inf).amin(-1, keepdim=True)
    distance = (known - value).abs().masked_fill(position < 0, torch.inf)
    nearest = distance.argmin(-1, keepdim=True)
    changed = (~drafts.commit.gather(1, nearest)).float()
    return drafts.last_confidence.scatter(1, index.gather(1, nearest), changed)


def guess(step: DraftingStep, drafts: Sequence[DraftState], chain: int) -> None:
    """Make the draft states that follow from the step's state."""
    state = step.state
    for draft in drafts[:chain]:
        step.drafts = draft
        step.guess()
        step.state = draft  # of which the next one follows
    step.state = state
    for draft in drafts[chain:]:
        step.drafts = drafts[0]
        step.drafts = draft._replace(last_confidence=second_likeliest(step))
        step.guess()


def copy_of(cache: KVCache) -> KVCache:
    """A cache into which a draft may write before it is accepted."""
    if cache.scratch:  # no forward reads what another has written
        return cache
    keys, values = ([x.clone() for x in buffers] for buffers in (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


def keep(cache: KVCache, drafted: KVCache, accepted: torch.Tensor) -> None:
    """Write the K and V of accepted drafts (B,) into the cache."""
    for mine, theirs in zip(
        (*cache.keys, *cache.values), (*drafted.keys, *drafted.values), strict=True
    ):
        if mine is not theirs:
            mine[accepted] = theirs[accepted]


def decode(session: Session, chain: int, second: bool) -> int:
    """Decode a session of `drafts=1` to its end. Returns how many forwards its rows took part
    in."""
    step, forwards = session.step, 0
    state, known, cache = step.state, step.drafts, step.cache
    drafts = [
        known._replace(**{name: getattr(known, name).clone() for name in STATE})
        for _ in range(chain + second)
    ]
    num_rows = len(state.canvas)
    while True:
        rows = [row for draft in drafts for row in read_rows(draft.table)]
        shape = next_step(session, read_rows(state.table), rows)
        if shape is None:
            return forwards
        forwards += shape.num_rows
        shape = replace(shape, num_rows=num_rows)
        computed, caches = [], [cache]
        for number, each in enumerate((state, *drafts)):
            if number:  # a draft of the chain sees the one before it, another the step alone
                caches.append(copy_of(caches[number - 1 if number <= chain else 0]))
            step.cache = caches[-1]
            layout, position = step.place(each, shape, num_rows)
            computed.append((layout, position, step.propose(shape, layout, None, None)[0]))
        step.cache = cache
        for layout, position, proposed in reversed(computed):
            step.remember(layout, position, proposed)
        step.unmask(computed[0][0], computed[0][2])
        for draft, drafted, (layout, position, proposed) in zip(
            drafts, caches[1:], computed[1:], strict=True
        ):
            step.drafts = draft
            accepted, table = layout.active & step.equal(), state.table.clone()
            keep(cache, drafted, accepted)
            layout = layout._replace(active=accepted)
            step.remember(layout, position, proposed)
            step.unmask(layout, proposed)
            # A row whose draft is dropped stays comparable with the next draft.
            state.table.copy_(torch.where(accepted[:, None], state.table, table))
        guess(step, drafts, chain)
        step.drafts = known


def count_forwards(
    model: PreTrainedModel, batches: list[Any], how: dict[str, Any], chain: int, second: bool
) -> tuple[int, list[torch.Tensor]]:
    """The forwards of all rows with so many drafts in a chain, and with one of the second likeliest
    state beside them if `second`; and the sequences."""
    engine, config = dsb.Engine(model), dsb.DecodingConfig(**how, drafts=1)
    forwards, sequences = 0, []
    for _, ids, mask in batches:
        masks = ids.new_full((len(ids), config.gen_length), model.dsb.mask_id)
        leftpad = (mask == 0).sum(-1).int()
        with torch.no_grad():
            session = engine.loop.session(config, torch.cat([ids, masks], 1), leftpad)
            forwards += decode(session, chain, second)
        sequences.append(session.state.canvas)
    return forwards, sequences


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One line for each task and setting."""
    lines = []
    for task in TASKS.values():
        model, _, batches = batches_of(task, args)
        for block in task.compared:
            for name, how in settings_of(task.gen_length, block, [0.9], False):
                general = name["rule"] in ("one token a step", "threshold 0.9")
                if general and name["schedule"] != "DSB const":
                    counts = {
                        way: count_forwards(model, batches, how, *drafts)[0]
                        for way, drafts in WAYS.items()
                    }
                    lines.append({"task": task.name, **name, "problems": args.problems, **counts})
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    args, lines = record_of(problems_parser("draft_chains", __doc__), argv, measure)
    names = NAMES | {"cache": "left"}
    print_lines(
        names | dict.fromkeys(WAYS, "right"),
        [
            [*(str(line[name]) for name in names),
             *(f"{line[way] / line['problems']:.2f}" for way in WAYS)]
            for line in lines
        ],
        args.markdown,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_process("draft_chains", main))

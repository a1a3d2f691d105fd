"""The model `dsb` of lm-evaluation-harness.

The model generates with the settings that `--model_args` names, and estimates log-likelihoods as
`likelihood` does. Under `accelerate launch` the harness deals the requests out to the processes,
and this module adds up their measurements.

Releases of the harness after 0.4.13 find the model by an entry point. Release 0.4.13 reads none.
There `python -m dsb_runtime.doors.lm_eval --model dsb ...` registers the model and then runs the
harness's own command.
"""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar, cast

import lm_eval.models  # noqa: F401 - fills the harness's list, which takes no more once it has one
import torch
import torch.distributed as dist
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from dsb_runtime.config import DecodingConfig, check_bool, check_int, settings
from dsb_runtime.defaults import defaults_for
from dsb_runtime.doors.likelihood import Scored, are_greedy, by_text_length, log_likelihoods
from dsb_runtime.doors.lm_eval_requests import (
    added_up,
    answer_text,
    check_request,
    first_batch_size,
    first_copies,
    read_ids,
    request_settings,
    stops_of,
)
from dsb_runtime.engine.batcher import Batcher
from dsb_runtime.engine.cache import is_out_of_memory
from dsb_runtime.engine.check import check_side_by_side
from dsb_runtime.engine.lane import response_of
from dsb_runtime.engine.output import GenerationOutput
from dsb_runtime.engine.request import Request
from dsb_runtime.families import check_model
from dsb_runtime.models.load import load_model, load_tokenizer

logger = logging.getLogger("lm_eval.dsb")  # shown as the harness shows its own

T = TypeVar("T")


@register_model("dsb")
class DSBLM(TemplateLM):
    """A LLaDA- or Dream-format checkpoint for lm-evaluation-harness.

    Args:
        pretrained: folder or hub id.
        tokenizer: folder or hub id of the tokenizer, where it is not the checkpoint's.
        peft: folder or hub id of an adapter, which is `load_model`'s `adapter`.
        trust_remote_code: accepted as the harness passes it on; no code of a checkpoint ever runs.
        dtype, family, mask_id, revision: as `load_model` takes them.
        device: as `load_model` takes it; under `accelerate launch` each process has its own.
        batch_size: prompts (or masked texts, for likelihoods) in one forward, at most. "auto"
            begins with `max_batch_size`, and halves a batch of texts that does not fit into memory;
            of prompts, a forward has as many as fit.
        max_batch_size: of batch_size="auto", 64 by default.
        mc_num: how many masks are drawn for each log-likelihood.
        seed: of those masks, and of the random numbers at a temperature above 0.
        check_greedy: whether log-likelihoods come with `is_greedy`, for which every continuation is
            decoded at one forward a token. Without it `is_greedy` is always False.
        max_length: longest prompt and response together, where it is below the model's.
        named: any setting of `DecodingConfig`; `defaults_for` gives the others.

    Raises:
        TypeError, ValueError: an unknown argument, or a wrong value; the message is one line.
    """

    backend = "causal"  # a prompt and its continuation are tokenized together

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        peft: str | None = None,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        family: str | None = None,
        mask_id: int | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        mc_num: int = 128,
        seed: int = 0,
        check_greedy: bool = True,
        max_length: int | None = None,
        **named: Any,
    ) -> None:
        super().__init__()
        for name in sorted(set(named) - set(settings())):
            known = ", ".join((*list(inspect.signature(DSBLM).parameters)[:-1], *settings()))
            raise TypeError(
                f"{name}={named[name]!r}: no such argument of model dsb; expected {known}"
            )
        self.auto = batch_size == "auto"
        self.batch_size = first_batch_size(batch_size, max_batch_size)
        check_int("mc_num", mc_num, 1)
        check_int("seed", seed, 0, 2**31 - 1)
        check_bool("check_greedy", check_greedy)
        check_bool("trust_remote_code", trust_remote_code)
        self.mc_num, self.seed, self.check_greedy = mc_num, seed, check_greedy
        self.settings = named = read_ids(named)
        # A wrong setting is refused before the weights are read.
        check_side_by_side(defaults_for(None, **{"stop_at_eos": True, **named}))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState  # type: ignore[import-untyped]

            state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
            self._rank, self._world_size = state.process_index, state.num_processes
            device = str(state.device)
        self.model = load_model(
            pretrained, dtype=dtype, device=device or "auto", family=family, mask_id=mask_id,
            revision=revision, adapter=peft,
        )  # fmt: skip
        self.info = check_model(self.model)
        self.tokenizer = load_tokenizer(tokenizer or pretrained, None if tokenizer else revision)
        self.pretrained, self._device = pretrained, self.model.device
        most = self.model.config.max_position_embeddings
        self.max_length = most if max_length is None else max_length
        check_int("max_length", self.max_length, 2, most, " (the model's)")
        self.generator = torch.Generator(self._device).manual_seed(seed + self._rank)
        self.totals = dict.fromkeys(("answers", "tokens", "forwards", "seconds"), 0.0)
        self.measured: dict[str, float] = {}
        self.warned: set[str] = set()

    def decoding_config(self, kwargs: Mapping[str, Any]) -> DecodingConfig:
        """The settings of a request whose `generation_kwargs` are `kwargs`.

        Raises:
            TypeError, ValueError: a value is not accepted, or asks for what would change the
                answer and does not exist here, as a repetition penalty.
        """
        for name in check_request(kwargs):
            what = f"generation_kwargs {name}={kwargs[name]!r}"
            self.warn(name, f"{what} means nothing to model dsb")
        return defaults_for(self.model, **request_settings(self.model, self.settings, kwargs))

    def warn(self, key: str, message: str) -> None:
        """Log a warning, once for each key."""
        if key not in self.warned:
            self.warned.add(key)
            logger.warning(message)

    @property
    def eot_token_id(self) -> int:
        for token in (self.tokenizer.eos_token_id, *self.info.eos_ids):
            if token is not None:
                return token
        raise ValueError(f"{self.pretrained}: neither model nor tokenizer names an EOS token")

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            lacks = "the tokenizer has no chat template; run without --apply_chat_template"
            raise ValueError(f"{self.pretrained}: {lacks}")
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]  # a str
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text, with the tokenizer's special tokens unless it begins with the BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def cut_prompt(self, ids: list[int], longest: int) -> list[int]:
        """The end of a prompt of more than `longest` tokens."""
        if len(ids) > longest:
            self.warn("cut", f"prompts of more than {longest} tokens lose their beginning")
        return ids[-longest:]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers in the order of the requests, which are decoded side by side: a row that is
        done takes the next request."""
        answers: list[str] = [""] * len(requests)
        source = first_copies(requests)
        members = [i for i in range(len(requests)) if source[i] == i]
        began = time.perf_counter()
        with self.bar(len(members), "generate_until", disable_tqdm) as bar:
            for i, answer in self.answer_all(requests, members):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args, answer)
                bar.update()
        self.totals["seconds"] += time.perf_counter() - began
        self.measured = self.add_up()
        if self._rank == 0 and self.measured:
            logger.info("dsb: " + ", ".join(f"{v:.6g} {k}" for k, v in self.measured.items()))
        return [answers[i] for i in source]

    def answer_all(self, requests: list[Instance], members: list[int]) -> Iterator[tuple[int, str]]:
        """(index, answer) of the requests `members`, as they are done."""
        configs: dict[str, DecodingConfig] = {}
        order: list[tuple[str, int, int, list[int]]] = []
        for i in members:
            text, kwargs = requests[i].args
            key = json.dumps(kwargs, sort_keys=True)
            if key not in configs:
                configs[key] = self.decoding_config(kwargs)
            longest = self.max_length - configs[key].gen_length
            if longest < 1:
                raise ValueError(
                    f"gen_length={configs[key].gen_length}: no room for a prompt in "
                    f"{self.max_length} positions"
                )
            ids = self.cut_prompt(self.tok_encode(text) or [self.prefix_token_id], longest)
            order.append((key, -len(ids), i, ids))
        # The longest prompts come first: one that does not fit into memory says so at once.
        order.sort()
        index_of: dict[Request, int] = {}

        def submitted() -> Iterator[Request]:
            for key, _, i, ids in order:
                request = Request(
                    self.model, ids, configs[key], self.generator,
                    # An EOS fills what follows a stop string, which a model without one cannot do.
                    stop_strings=stops_of(requests[i]) if self.info.eos_ids else None,
                    tokenizer=self.tokenizer,
                )  # fmt: skip
                index_of[request] = i
                yield request

        for request in Batcher(self.model, self.batch_size).decode(submitted()):
            i = index_of.pop(request)
            if not isinstance(request.outcome, GenerationOutput):
                raise cast(BaseException, request.outcome)
            self.totals["answers"] += 1
            self.totals["tokens"] += request.outcome.row_tokens[0]
            self.totals["forwards"] += request.outcome.nfe
            ids = response_of(request.outcome, request)
            stops = stops_of(requests[i])
            yield i, answer_text(self.tokenizer, ids, self.info.eos_ids, stops)

    def fitting(self, run: Callable[[int], T]) -> T:
        """`run(batch_size)`. With `--batch_size auto` the batch is halved until it fits."""
        while True:
            try:
                return run(self.batch_size)
            except RuntimeError as error:
                if not (self.auto and is_out_of_memory(error) and self.batch_size > 1):
                    raise
                half = self.batch_size // 2
                self.warn(f"batch {half}", f"a batch of {self.batch_size} does not fit: {half} now")
            self.batch_size = half  # here, where the error holds no tensors any more

    @property
    def batch_sizes(self) -> dict[int, int]:
        """What `--batch_size auto` has come to, which the harness writes beside the scores."""
        return {0: self.batch_size} if self.auto else {}

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        items = [self.scored(prompt, text) for _, prompt, text in requests]
        results = [(0.0, False)] * len(items)
        groups, greedy = by_text_length(items), dict[int, bool]()

        def done(i: int, total: float) -> None:
            if self.check_greedy and i not in greedy:  # a batch is checked at its first item
                group, size = groups[len(items[i].text)], self.batch_size
                part, group[:] = group[:size], group[size:]
                texts = [items[k] for k in part]
                flags = self.fitting(lambda n: are_greedy(self.model, texts, batch_size=n))
                greedy.update(zip(part, flags, strict=True))
            results[i] = total, greedy.get(i, False)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])

        self.score(items, "loglikelihood", disable_tqdm, done)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, which are cut into pieces of the model's length; each
        token is scored in one piece."""
        pieces: list[list[Scored]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1
            )
            pieces.append([self.scored(*make_disjoint_window(window)) for window in windows])
        items, totals = list(itertools.chain(*pieces)), [0.0] * len(pieces)

        def done(text: int, total: float) -> None:
            totals[text] = total
            self.cache_hook.add_partial("loglikelihood_rolling", requests[text].args, total)

        adding = added_up([len(of_text) for of_text in pieces], done)
        self.score(items, "loglikelihood_rolling", disable_tqdm, adding)
        return totals

    def scored(self, prompt: list[int], text: list[int]) -> Scored:
        """A prompt and the text after it; a prompt that is too long loses its beginning."""
        most = self.max_length - 1
        if not 1 <= len(text) <= most:
            raise ValueError(f"a continuation of {len(text)} tokens: expected 1 to {most}")
        return Scored(tuple(self.cut_prompt(prompt, self.max_length - len(text))), tuple(text))

    def score(
        self, items: list[Scored], name: str, disable_tqdm: bool,
        on_done: Callable[[int, float], None],
    ) -> None:  # fmt: skip
        """Call `on_done` with the index and the log-likelihood of each item once it is known. What
        is known is lost neither by an interrupt nor by a batch that does not fit."""
        if scale := self.settings.get("cfg_scale"):
            raise ValueError(f"cfg_scale={scale}: {name} is that of the model alone; expected 0")

        known: dict[int, float] = {}

        def done(i: int, total: float) -> None:
            on_done(i, total)
            bar.update()

        with self.bar(len(items), name, disable_tqdm) as bar:
            self.fitting(lambda n: log_likelihoods(
                self.model, items, samples=self.mc_num, seed=self.seed, batch_size=n, known=known,
                on_done=done,
            ))  # fmt: skip

    def bar(self, total: int, name: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=name, disable=disable or self._rank != 0)

    def add_up(self) -> dict[str, float]:
        """The sum of the measurements of all processes, {} where none has decoded. The seconds are
        those of the slowest process."""
        mine = torch.tensor([*self.totals.values()], dtype=torch.float64, device=self._device)
        parts = self.all_gather(mine).view(-1, len(mine)).cpu()
        answers, tokens, forwards, _ = parts.sum(0).tolist()
        seconds = parts[:, -1].max().item()
        if not forwards:
            return {}
        return {
            "answers": answers, "tokens": tokens, "forwards": forwards,
            "tokens_per_forward": tokens / forwards, "tokens_per_second": tokens / seconds,
            "seconds": seconds, "processes": len(parts),
        }  # fmt: skip

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores: `results["config"]`."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "dsb_settings": asdict(defaults_for(self.model, **self.settings)),
            "dsb_measured": self.measured,
        }

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self._world_size == 1:
            return tensor
        tensor = tensor.reshape(-1)
        parts = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self._world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if self._world_size > 1:
            dist.barrier()


if __name__ == "__main__":
    cli_evaluate()

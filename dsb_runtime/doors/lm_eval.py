"""The model `dsb` of lm-evaluation-harness: `lm_eval --model dsb --model_args pretrained=...`.

Generation is `generate` with the settings named in `--model_args`; log-likelihoods are the
Monte-Carlo estimate of `likelihood`. Under `accelerate launch` the harness deals the requests out
to the processes, and what each measured is added up.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from dsb_runtime.config import DecodingConfig, check_int
from dsb_runtime.doors.likelihood import Scored, are_greedy, left_pad, log_likelihoods
from dsb_runtime.engine.engine import generate
from dsb_runtime.models.load import load_model, load_tokenizer

logger = logging.getLogger("lm_eval.dsb")  # shown as the harness shows its own
SETTINGS = tuple(DecodingConfig.__dataclass_fields__)
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def read_batch_size(value: Any) -> int:
    """The harness passes an int or its digits."""
    number = int(value) if isinstance(value, str) and value.isdigit() else value
    check_int("batch_size", number, 1)
    return number


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text before whichever stop string comes first."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=None)]


@register_model("dsb")
class DSBLM(TemplateLM):
    """A LLaDA- or Dream-format checkpoint for lm-evaluation-harness.

    Args:
        pretrained: folder or hub id.
        tokenizer: folder or hub id of the tokenizer, where it is not the checkpoint's.
        dtype, family, mask_id, revision: as `load_model` takes them.
        device: as `load_model` takes it; under `accelerate launch` each process has its own.
        batch_size: prompts (or masked texts, for likelihoods) in one forward.
        mc_num: masks drawn for each log-likelihood.
        seed: of those masks, and of the random numbers at a temperature above 0.
        check_greedy: False skips `is_greedy` of log-likelihoods (then always False), which
            decodes every continuation, one forward a token.
        max_length: longest prompt and response together, where it is below the model's.
        settings: any field of `DecodingConfig`. `gen_length` is the response canvas; a request
            for fewer tokens gets a shorter one, and without it each request's own number holds.
            `stop_at_eos` is True unless named.

    Raises:
        TypeError, ValueError: an unknown argument, or a wrong value, said in one line.
    """

    backend = "causal"  # a prompt and its continuation are tokenized together

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        family: str | None = None,
        mask_id: int | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        mc_num: int = 128,
        seed: int = 0,
        check_greedy: bool = True,
        max_length: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            raise TypeError(
                f"{unknown[0]}={settings[unknown[0]]!r}: no such argument of model dsb; expected "
                f"pretrained, tokenizer, dtype, device, family, mask_id, revision, batch_size, "
                f"mc_num, seed, check_greedy, max_length, {', '.join(SETTINGS)}"
            )
        self.batch_size = read_batch_size(batch_size)
        check_int("mc_num", mc_num, 1)
        check_int("seed", seed, 0, 2**31 - 1)
        if not isinstance(check_greedy, bool):
            raise TypeError(f"check_greedy={check_greedy!r}: expected True or False")
        self.mc_num, self.seed, self.check_greedy = mc_num, seed, check_greedy
        self.settings = settings
        self.decoding_config({})  # a wrong setting is said before the weights are read
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
            self._rank, self._world_size = state.process_index, state.num_processes
            device = str(state.device)
        self.model = load_model(
            pretrained, dtype=dtype, device=device or "auto", family=family, mask_id=mask_id,
            revision=revision,
        )  # fmt: skip
        self.tokenizer = load_tokenizer(tokenizer or pretrained, None if tokenizer else revision)
        self.pretrained, self._device = pretrained, self.model.device
        self.settings.setdefault("stop_at_eos", bool(self.model.dsb.eos_ids))
        self.max_length = self.model.config.max_position_embeddings
        if max_length is not None:
            check_int("max_length", max_length, 2, self.max_length, " (the model's)")
            self.max_length = max_length
        self.generator = torch.Generator(self._device).manual_seed(seed + self._rank)
        self.totals = dict.fromkeys(("answers", "tokens", "forwards", "seconds"), 0.0)
        self.warned: set[str] = set()

    # --- what one request asks for ------------------------------------------------------------

    def decoding_config(self, asked: dict[str, Any]) -> DecodingConfig:
        """The settings of a request whose `generation_kwargs` are `asked`.

        Its own temperature, `top_p`, `top_k` hold where it asks for sampling; any other field of
        `DecodingConfig` in it (`--gen_kwargs threshold=0.8`) overrides the model's.
        """
        asked = {name: value for name, value in asked.items() if value is not None}
        sampling = asked.pop("do_sample", True) and asked.get("temperature", 0) > 0
        length = next((asked[name] for name in LENGTH_NAMES if name in asked), None)
        own = {k: v for k, v in asked.items() if k in SETTINGS}
        if not sampling:
            for name in ("temperature", "top_p", "top_k"):
                own.pop(name, None)
        for name in sorted(set(asked) - set(SETTINGS) - set(LENGTH_NAMES) - {"until"}):
            self.warn(name, f"generation_kwargs {name}={asked[name]!r} means nothing to model dsb")
        settings = {**self.settings, **own}
        rules = {"threshold", "factor", "frechet", "steps"}
        if rules & set(own):  # the request's rule replaces the model's
            settings = {k: v for k, v in settings.items() if k not in rules or k in own}
        gen_length = settings.get("gen_length")
        if length is not None:
            check_int("max_gen_toks", length, 1)
            gen_length = length if gen_length is None else min(gen_length, length)
        if gen_length is None:
            gen_length = self.max_gen_toks
        named = settings.get("block_length")
        block = max(1, min(32, gen_length // 4)) if named is None else named
        if isinstance(block, int) and length is not None:
            block = min(block, gen_length)  # a block of the model's may outgrow a short request
        return DecodingConfig(**{**settings, "gen_length": gen_length, "block_length": block})

    def warn(self, key: str, message: str) -> None:
        """Say it once."""
        if key not in self.warned:
            self.warned.add(key)
            logger.warning(message)

    @property
    def max_gen_toks(self) -> int:
        """Response positions where neither model_args nor a request says."""
        known = hasattr(self, "model") and self.model.generation_config.max_new_tokens
        return known or DecodingConfig.gen_length

    # --- text and tokens ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if not self.model.dsb.eos_ids:
            raise ValueError(f"{self.pretrained}: neither model nor tokenizer names an EOS token")
        return self.model.dsb.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{self.pretrained}: the tokenizer has no chat template; run without "
                "--apply_chat_template"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, with the tokenizer's own special tokens unless the text begins with its BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def prompt_ids(self, text: str, room: int) -> list[int]:
        """A prompt's ids, its beginning cut off where it is longer than `room`."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        if len(ids) > room:
            self.warn("cut", f"prompts of more than {room} tokens lose their beginning")
        return ids[-room:]

    def answer(self, ids: list[int], stops: Sequence[str]) -> str:
        """A response's text, up to its first EOS and the first stop string."""
        special = set(self.tokenizer.all_special_ids)
        known = {self.tokenizer.convert_tokens_to_ids(stop) for stop in stops} & special
        ends = known | set(self.model.dsb.eos_ids)
        end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return cut_at_stop(self.tokenizer.decode(ids[:end], skip_special_tokens=True), stops)

    # --- requests -----------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, in the requests' order; requests with equal settings share batches."""
        answers: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        seen: Counter[int] = Counter()
        first: dict[int, int] = {}
        copies = []
        for i, request in enumerate(requests):
            seen[id(request)] += 1
            if seen[id(request)] > request.repeats:  # padding for equal work in every process
                copies.append(i)
                continue
            first.setdefault(id(request), i)
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        bar = self.bar(len(requests) - len(copies), "generate_until", disable_tqdm)
        began = time.perf_counter()
        for members in groups.values():
            asked = requests[members[0]].args[1]
            config = self.decoding_config(dict(asked))
            stops = asked.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            room = self.max_length - config.gen_length
            if room < 1:
                raise ValueError(
                    f"gen_length={config.gen_length}: no room for a prompt in {self.max_length} "
                    "positions"
                )
            prompts = {i: self.prompt_ids(requests[i].args[0], room) for i in members}
            members.sort(key=lambda i: -len(prompts[i]))  # little padding, the longest first
            for at in range(0, len(members), self.batch_size):
                part = members[at : at + self.batch_size]
                for i, ids in zip(
                    part, self.decode([prompts[i] for i in part], config), strict=True
                ):
                    answers[i] = self.answer(ids, stops)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
                bar.update(len(part))
        bar.close()
        self.totals["seconds"] += time.perf_counter() - began
        for i in copies:
            answers[i] = answers[first[id(requests[i])]]
        self.measured = self.add_up()
        if self._rank == 0 and self.measured:
            logger.info("dsb: " + ", ".join(f"{v:.6g} {k}" for k, v in self.measured.items()))
        return answers

    def decode(self, prompts: list[list[int]], config: DecodingConfig) -> list[list[int]]:
        """Response ids of one batch, each up to and including its first EOS."""
        ids, mask = (t.to(self._device) for t in left_pad(prompts))
        generator = self.generator if config.temperature > 0 else None
        out = generate(self.model, ids, config, attention_mask=mask, generator=generator)
        self.totals["answers"] += len(prompts)
        self.totals["tokens"] += sum(out.row_tokens)
        self.totals["forwards"] += sum(out.row_nfe)
        response = out.sequences[:, ids.shape[1] :].tolist()
        return [row[:length] for row, length in zip(response, out.row_tokens, strict=True)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        items = [self.scored(prompt, text) for _, prompt, text in requests]
        totals = self.score(items, self.bar(len(items), "loglikelihood", disable_tqdm))
        greedy = [False] * len(items)
        if self.check_greedy:
            greedy = are_greedy(self.model, items, batch_size=self.batch_size)
        results = list(zip(totals, greedy, strict=True))
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: windows of the model's length, each token scored in one of them."""
        items, owner = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,  # a token of context beside it
                context_len=1,
            )
            for prompt, text in map(make_disjoint_window, windows):
                items.append(self.scored(prompt, text))
                owner.append(i)
        scores = self.score(items, self.bar(len(items), "loglikelihood_rolling", disable_tqdm))
        totals = [0.0] * len(requests)
        for i, score in zip(owner, scores, strict=True):
            totals[i] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def scored(self, prompt: list[int], text: list[int]) -> Scored:
        """A prompt (its beginning cut off where it is too long) and the text after it."""
        if not 1 <= len(text) < self.max_length:
            raise ValueError(
                f"a continuation of {len(text)} tokens: expected 1 to {self.max_length - 1}"
            )
        room = self.max_length - len(text)
        if len(prompt) > room:
            self.warn("cut", f"prompts longer than {self.max_length} tokens lose their beginning")
        return Scored(tuple(prompt[-room:]), tuple(text))

    def score(self, items: list[Scored], bar: tqdm) -> list[float]:
        with bar:
            return log_likelihoods(
                self.model, items, samples=self.mc_num, seed=self.seed,
                batch_size=self.batch_size, on_done=bar.update,
            )  # fmt: skip

    def bar(self, total: int, name: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=name, disable=disable or self._rank != 0)

    # --- results and processes ----------------------------------------------------------------

    def add_up(self) -> dict[str, float]:
        """Over all processes: tokens and forwards of every answer, seconds of the slowest."""
        mine = torch.tensor([*self.totals.values()], dtype=torch.float64, device=self._device)
        parts = self.all_gather(mine).view(-1, len(mine)).cpu()
        answers, tokens, forwards, _ = parts.sum(0).tolist()
        seconds = parts[:, -1].max().item()
        if not forwards:
            return {}
        return {
            "answers": answers,
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / forwards,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "processes": self._world_size,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the scores: `results["config"]`."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "dsb_settings": self.settings,
            "dsb_measured": getattr(self, "measured", {}),
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
        parts = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if self._world_size > 1:
            dist.barrier()

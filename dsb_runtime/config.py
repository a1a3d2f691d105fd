"""The settings of a decoding. Each is one field of `DecodingConfig`, with all that the doors need.

A field is declared by `setting(default, help, ...)`, which states its type, its range or choices,
its help and its group once. The checks, the command line, `custom_generate`, the harness's model
and the documentation's table read them from `settings()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

from dsb_kernels.rows import CACHES, REFRESH_COMMITS, SCHEDULES
from dsb_kernels.rules import RULES, Rule
from dsb_kernels.score import CONFIDENCES

DEFAULT_FULL_EVERY = 4
RANDOM = "random"  # the confidence that no op computes
MAX_INT = 2**31 - 1  # a row's state on the device is int32

DEFAULT_RULE = next(rule for rule in RULES.values() if rule.default is not None)

# The command line's help lists settings in these groups.
DECODING = "decoding"
RULE = f"selection rule, at most one (default: --{DEFAULT_RULE.setting} {DEFAULT_RULE.default})"
SAMPLING = "sampling and ending"
REFRESHES = "refreshes"
DRAFTS = "drafts"

T = TypeVar("T")


def check_int(name: str, value: Any, low: int, high: int | None = None, why: str = "") -> None:
    """Raise unless `value` is an int in [low, high] (numpy's are ints too); the message names what
    is accepted. Without `high` the bound is `MAX_INT`, which is named only where it matters."""
    accepted = f"an int >= {low}" if high is None else f"an int from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: expected {accepted}")
    value = int(value)
    if value > MAX_INT and high is None:
        raise ValueError(f"{name}={value!r}: expected an int from {low} to {MAX_INT}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r}: expected {accepted}{why}")


def check_real(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise unless `value` is a finite number in [low, high] (or (low, high])."""
    accepted = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r}: expected {accepted}")
    number: Any = value
    below = number <= low if open_low else number < low
    if below or number > high or not math.isfinite(number):
        raise ValueError(f"{name}={value!r}: expected {accepted}")


def check_choice(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(accepted)}")


def check_ids(name: str, value: Any) -> None:
    """Raise unless `value` is a tuple or a list of ints >= 0."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}={value!r}: expected a tuple of token ids")
    for token in value:
        check_int(name, token, 0)


def check_bool(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False")


@dataclass(frozen=True)
class Setting:
    """What every door needs to know of one setting. A bound (`low`, `high`) is a number, or the
    name of another setting whose value is the bound. `unset` says in help and docs what happens if
    the setting is not named. `doors` has the setting's name at each door that uses a different
    one."""

    default: Any
    help: str
    kind: type[int] | type[float] | type[bool] | type[str] | type[tuple] = int
    group: str = DECODING
    low: float | str = 1
    high: float | str | None = None
    open_low: bool = False
    choices: tuple[str, ...] = ()
    unset: str = ""
    doors: Mapping[str, str] = field(default_factory=dict)

    @property
    def accepted(self) -> str:
        """What the setting accepts, in words."""
        if self.choices:
            return " | ".join(self.choices)
        if self.kind is bool:
            return "True | False"
        if self.kind is tuple:
            return "token ids"
        low, high = (f"{b:g}" if isinstance(b, (int, float)) else b for b in (self.low, self.high))
        if high is None:
            return f"{self.kind.__name__} >= {low}"
        return f"{self.kind.__name__} in {'(' if self.open_low else '['}{low}, {high}]"

    def check(self, name: str, value: Any, others: Any) -> None:
        """Raise TypeError or ValueError unless `value` is accepted. Bounds that are names are read
        from the config `others`."""
        low: Any = getattr(others, self.low) if isinstance(self.low, str) else self.low
        high: Any = getattr(others, self.high) if isinstance(self.high, str) else self.high
        if value is None and self.default is None:  # not named
            return
        if self.choices:
            check_choice(name, value, self.choices)
        elif self.kind is bool:
            check_bool(name, value)
        elif self.kind is tuple:
            check_ids(name, value)
        elif self.kind is float:
            check_real(name, value, low, high, open_low=self.open_low)
        else:
            why = f" (at least {self.low})" if isinstance(self.low, str) else ""
            why += f" (at most {self.high})" if isinstance(self.high, str) else ""
            check_int(name, value, low, high, why)


def setting(default: Any, help: str, **how: Any) -> Any:
    """Declare a field of `DecodingConfig`. The arguments are those of `Setting`."""
    return field(default=default, metadata={"setting": Setting(default, help, **how)})


def rule_setting(rule: Rule) -> Any:
    """Declare the field that turns a selection rule on."""
    return setting(
        None, rule.help, kind=rule.kind, group=RULE, low=rule.low, open_low=rule.open_low,
        high="gen_length" if rule.high is None else rule.high,
        unset="" if rule.default is None else f"{rule.default:g}, where no other rule is named",
    )  # fmt: skip


def with_rule_settings(cls: type[T]) -> type[T]:
    """Add a field to a class for each rule's setting that it does not list itself. The class is
    made a dataclass afterwards."""
    for rule in RULES.values():
        if rule.setting not in cls.__annotations__:
            cls.__annotations__[rule.setting] = f"{rule.kind.__name__} | None"
            setattr(cls, rule.setting, rule_setting(rule))
    return cls


@dataclass(frozen=True)
@with_rule_settings
class DecodingConfig:
    """How to decode. At most one of the rules' settings (`threshold`, `factor`, `frechet`,
    `entropy`, `eb`, `steps`) may be named; with none of them the rule is threshold 0.9.

    The rules listed here are known to type checkers and editors; `with_rule_settings` adds the
    others.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a value is not accepted. The message names the field, its value and what is
            accepted.
    """

    gen_length: int = setting(
        256, "response positions", unset="as the checkpoint says, or 256",
        doors={"custom_generate": "max_new_tokens"},
    )  # fmt: skip
    block_length: int = setting(
        32, "positions of the block that decoding begins with", high="gen_length",
        unset="gen_length / 4, at most 32",
    )  # fmt: skip
    schedule: str = setting(
        "dsb", "dsb slides the block to the first mask; naive goes block by block",
        kind=str, choices=SCHEDULES,
    )  # fmt: skip
    max_block_length: int | None = setting(
        None, "positions that a sliding block may grow to", low="block_length",
        unset="unbounded (greedy)",
    )  # fmt: skip
    cache: str = setting(
        "dsb", "cache policy: whose keys and values a step computes again", kind=str,
        choices=CACHES, doors={"custom_generate": "cache_policy"},
    )  # fmt: skip
    prefix_window: int | None = setting(
        None, "positions before the block that DSB Cache recomputes with it", low=0,
        unset="the family's published value",
    )  # fmt: skip
    suffix_window: int = setting(
        0, "positions after the block that a window step recomputes with it", low=0
    )
    context_masks: int | None = setting(
        None, "masks behind the block that a refresh sees, beside the last position; it leaves the "
        "others out (approximate, arXiv 2601.17917)", low=0, unset="all of them",
    )  # fmt: skip
    eos_bound: bool = setting(
        False, "masks behind the first EOS of a response are left out (approximate)", kind=bool,
    )  # fmt: skip
    threshold: float | None = rule_setting(RULES["threshold"])
    factor: float | None = rule_setting(RULES["factor"])
    frechet: float | None = rule_setting(RULES["frechet"])
    entropy: float | None = rule_setting(RULES["entropy"])
    eb: float | None = rule_setting(RULES["eb"])
    steps: int | None = rule_setting(RULES["quota"])
    progress: float | None = setting(
        None, "lower the threshold as the block fills: by this share of it once no mask is left "
        "(arXiv 2601.17917)", kind=float, low=0.0, high=1.0, open_low=True, unset="off",
    )  # fmt: skip
    confidence: str = setting(
        None, "what ranks candidates: the token's probability, its margin over the "
        "second, the negative entropy, or a random number", kind=str, group=SAMPLING,
        choices=(*CONFIDENCES, RANDOM),
        unset="the rule's own: entropy for entropy and eb, else probability",
    )  # fmt: skip
    confidence_temperature: float | None = setting(
        None, "draw the order of candidates: from the softmax of their confidences over this "
        "temperature; with steps only", kind=float, group=SAMPLING, low=0.0, high=1e6,
        open_low=True, unset="the order of the confidences", doors={"custom_generate": "alg_temp"},
    )  # fmt: skip
    temperature: float = setting(0.0, "0 is greedy", kind=float, group=SAMPLING, low=0.0, high=1e6)
    top_p: float | None = setting(
        None, "cut to the most likely tokens of this probability; Dream only", kind=float,
        group=SAMPLING, low=0.0, high=1.0, open_low=True, unset="no cut",
    )  # fmt: skip
    top_k: int | None = setting(
        None, "cut to so many most likely tokens; Dream only", group=SAMPLING, unset="no cut"
    )
    cfg_scale: float = setting(
        0.0, "classifier-free guidance: how far logits move away from those without the prompt; "
        "a forward then runs every row twice", kind=float, group=SAMPLING, low=0.0, high=1e6,
    )  # fmt: skip
    stop_at_eos: bool = setting(
        False, "a row ends at an EOS with no mask to its left", kind=bool, group=SAMPLING,
        unset="where the model has an EOS",
    )  # fmt: skip
    banned_tokens: tuple[int, ...] = setting(
        (), "ids of tokens that are never proposed; the others are scored as if there were no such "
        "tokens", kind=tuple, group=SAMPLING, unset="none",
    )  # fmt: skip
    min_new_tokens: int = setting(
        0, "no EOS is proposed at so many positions from the response's first on", group=SAMPLING,
        low=0, high="gen_length",
    )  # fmt: skip
    refresh_commit: str | None = setting(
        None, "a refresh commits what the rule selects, or the first masked position only",
        kind=str, group=REFRESHES, choices=REFRESH_COMMITS, unset="the family's way",
    )  # fmt: skip
    refresh_policy: str = setting(
        "full", "response: most refreshes leave the prompt's K/V as they are", kind=str,
        group=REFRESHES, choices=("full", "response"),
    )  # fmt: skip
    full_refresh_every: int | None = setting(
        None, "of refresh_policy=response: one refresh in so many is full", group=REFRESHES,
        low=2, unset=str(DEFAULT_FULL_EVERY),
    )  # fmt: skip

    drafts: int = setting(
        0, "1: guess what a step commits, and compute the step after it in the same forward; the "
        "same tokens in fewer forwards", low=0, high=1, group=DRAFTS,
    )  # fmt: skip
    draft_threshold: float | None = setting(
        None, "of drafts, with threshold: a candidate is guessed to be committed if its last "
        "confidence reaches this", kind=float, low=0.0, high=1.0, group=DRAFTS,
        unset="0.95 times threshold",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, entry in settings().items():
            value = getattr(self, name)
            entry.check(name, value, self)
            if value is not None and entry.kind in (int, float):  # a number of numpy, for instance
                object.__setattr__(self, name, entry.kind(value))
        # A list would not be hashable, as the settings of a session must be.
        banned = tuple(dict.fromkeys(map(int, self.banned_tokens)))
        object.__setattr__(self, "banned_tokens", banned)
        names = rule_names()
        named = [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) is not None]
        if len(named) > 1:
            raise ValueError(f"{', '.join(named)}: expected at most one of {', '.join(names)}")
        if not named:
            object.__setattr__(self, DEFAULT_RULE.setting, DEFAULT_RULE.default)
        if self.confidence is None:
            object.__setattr__(self, "confidence", RULES[self.rule].confidences[0])
        for name, wrong, why in self._conflicts():
            if wrong:
                raise ValueError(f"{name}={getattr(self, name)!r}: {why}")

    def _conflicts(self) -> list[tuple[str, bool, str]]:
        """For each setting that another may rule out: its name, whether it does, and the reason."""
        naive, full = self.schedule == "naive", self.refresh_policy == "full"
        fitting = RULES[self.rule].confidences
        if self.rule == "quota":  # the one rule that compares confidences with nothing
            fitting = (*fitting, RANDOM)
        return [
            ("confidence", self.confidence not in fitting,
             f"the rule of {RULES[self.rule].setting} is not defined for it; "
             f"expected {' or '.join(map(repr, fitting))}"),
            ("confidence_temperature",
             self.confidence_temperature is not None and self.rule != "quota",
             f"a drawn order does not fit {RULES[self.rule].setting}; expected steps with it"),
            ("confidence_temperature",
             self.confidence_temperature is not None and self.confidence == RANDOM,
             "confidence='random' is a drawn order already; expected None"),
            ("progress", self.progress is not None and self.rule != "threshold",
             f"it lowers a threshold; expected None with {RULES[self.rule].setting}"),
            ("max_block_length", naive and self.max_block_length is not None,
             "only schedule='dsb' resizes its block; expected None with schedule='naive'"),
            ("steps", naive and (self.steps or 0) % self.num_blocks > 0,
             f"schedule='naive' spreads steps evenly over its {self.num_blocks} blocks; expected "
             f"a multiple of {self.num_blocks}"),
            ("prefix_window", self.cache != "dsb" and self.prefix_window is not None,
             f"only cache='dsb' has a prefix window; expected None with cache={self.cache!r}"),
            ("suffix_window", self.cache == "none" and self.suffix_window > 0,
             "cache='none' has no window steps; expected 0"),
            ("context_masks", self.context_masks is not None and not full,
             "a response refresh computes every mask; expected None with it"),
            ("eos_bound", self.eos_bound and not full,
             "a response refresh computes every mask; expected False with it"),
            ("eos_bound", self.eos_bound and not self.stop_at_eos,
             "masks behind an EOS get no token of their own; expected stop_at_eos=True with it"),
            ("refresh_commit", self.cache == "none" and self.refresh_commit is not None,
             "cache='none' has no refresh steps; expected None"),
            ("refresh_policy", self.cache == "none" and not full,
             "cache='none' keeps no K/V; expected 'full'"),
            ("drafts", self.drafts > 0 and self.sparse,
             "a draft sees the whole context; expected 0 with context_masks or eos_bound"),
            ("drafts", self.drafts > 0 and self.cfg_scale > 0,
             "guidance runs every row twice already; expected 0 with cfg_scale"),
            ("draft_threshold", self.draft_threshold is not None and self.drafts == 0,
             "it guesses for drafts, and drafts=0; expected None or drafts=1"),
            ("draft_threshold", self.draft_threshold is not None and self.rule != "threshold",
             f"the guess selects by {RULES[self.rule].setting} itself; expected None"),
            ("full_refresh_every", full and self.full_refresh_every is not None,
             "every refresh is full with refresh_policy='full'; expected None"),
        ]  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether decoding needs random numbers."""
        drawn_order = self.confidence == RANDOM or self.confidence_temperature is not None
        return self.temperature > 0 or drawn_order

    @property
    def sparse(self) -> bool:
        """Whether forwards leave some masks out."""
        return self.context_masks is not None or self.eos_bound

    @property
    def num_blocks(self) -> int:
        """How many blocks schedule="naive" has in the response. The last may be shorter."""
        return -(-self.gen_length // self.block_length)

    @property
    def rule(self) -> str:
        """The selection rule in force: a key of `dsb_kernels.rules.RULES`."""
        return next(r.name for r in RULES.values() if getattr(self, r.setting) is not None)

    @property
    def rule_value(self) -> float:
        """The value of the rule's setting, or 0 for a quota, whose value is `steps`."""
        rule = RULES[self.rule]
        return 0.0 if rule.kind is int else float(getattr(self, rule.setting))

    @property
    def full_every(self) -> int:
        """One refresh in so many is full. The first always is."""
        if self.refresh_policy == "full":
            return 1
        return self.full_refresh_every or DEFAULT_FULL_EVERY


def settings() -> dict[str, Setting]:
    """Every setting by its name, in the order of the fields."""
    return {f.name: f.metadata["setting"] for f in fields(DecodingConfig)}


def rule_names() -> tuple[str, ...]:
    """The names of the selection rules' settings. Exactly one of these is set in a config."""
    return tuple(dict.fromkeys(rule.setting for rule in RULES.values()))


def settings_table() -> list[tuple[str, str, str, str, str]]:
    """(name, type, default, accepted, help) of every setting, for the documentation."""
    return [
        (name, entry.kind.__name__, entry.unset or str(entry.default), entry.accepted, entry.help)
        for name, entry in settings().items()
    ]


def check_names(named: Mapping[str, Any]) -> None:
    """Raise TypeError for the first name that no setting has."""
    for name in sorted(set(named) - set(settings())):
        raise TypeError(f"{name}={named[name]!r}: expected one of {', '.join(settings())}")

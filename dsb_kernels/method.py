"""The method for one row, in plain Python over lists: read this page first.

A masked diffusion model sees a *canvas*, the prompt and then `gen_length` mask tokens, and proposes
a token and a confidence for every mask at once. Decoding runs the model again and again; after each
forward it commits some of the proposals, and commits are final. Three choices make a decoder:

    the schedule      where tokens may be committed next: the block [start, end)
    the rule          which of the masks in the block are committed
    the cache policy  which positions the next forward computes; the others keep their K/V

**Schedule.** "naive" cuts the response into blocks of `block_length` and moves to the next one when
a block is full. "dsb" (Dynamic Sliding Block, arXiv 2602.05992, section 3) lets the block begin at
the first mask and grow with each commit, up to `max_block_length` positions if that is given: easy
positions further right need not wait for a hard one.

**Rule.** The candidates are sorted by confidence, the largest first. A rule commits the first few
of them, and at least one: "threshold" commits all whose confidence reaches a value, "quota" a
number that was fixed in advance, "factor" (Fast-dLLM) and "frechet" (arXiv 2606.02955) as many as
their bound on the joint choice allows. For "entropy" and "eb" (arXiv 2505.24857) a confidence is
the negative entropy of the proposal: the one commits all entropies up to a value, the other as many
as the sum of the entropies before them allows.

**Cache policy.** "none" computes every position in every forward. "dual" (Fast-dLLM) does so only
at a *refresh*, and between refreshes computes the positions from the block's start at the last
refresh to the block's end. "dsb" (DSB Cache, same paper as the schedule) computes a prefix with the
block, since a commit changes the K/V of its neighbours most: the prefix has as many positions as
the block has just moved by, and at least `prefix_window`. Both policies refresh once `block_length`
tokens have been committed since the last refresh, those of the refresh included. Of every
`full_every` refreshes the first computes every position; the others compute the response and leave
the K/V of what is around it as they are.

**Infilling.** The masks may stand anywhere. Then the response reaches from the first mask to the
last: a token that is given between them counts as unmasked from the beginning, as if it had been
committed, and what follows the last mask is context, as the prompt is.

    row = Row(prompt_length=2, gen_length=8, block_length=4)
    while not row.done:
        first, last = row.computed()  # the positions that this forward computes
        tokens, confidences = model(row.canvas, row.candidates())
        row.advance(tokens, confidences)

Nothing here is shared with the ops, which do the same for a batch on a GPU; the tests hold
`place_rows` and `unmask_and_slide` against this page.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MASK, EOS = -1, 0


def choose(confidences: list[float], rule: str, value: float, due: int = 0) -> list[int]:
    """Which candidates the rule commits: indices into `confidences`, ascending.

    Of equal confidences the one with the lower index comes first. `due` is the number that "quota"
    commits.
    """
    order = sorted(range(len(confidences)), key=lambda i: (-confidences[i], i))
    c = [confidences[i] for i in order]
    if rule == "threshold":
        count = sum(x >= value for x in c)
    elif rule == "quota":
        count = due
    elif rule == "factor":
        count = len(c)
        for j, x in enumerate(c, start=1):
            if x < (-1.0 if j == 1 else 1.0 - value / (j + 1)):
                count = len(c) if j == len(c) else j - 1
                break
    elif rule == "frechet":
        count = 0
        for n in range(1, len(c) + 1):
            if sum(c[:n]) - (n - 1) - (1 - c[n - 1]) > value:
                count = n
    elif rule == "entropy":
        count = sum(-x <= value for x in c)
    elif rule == "eb":
        count = sum(-sum(c[:n]) <= value for n in range(len(c)))
    else:
        raise ValueError(f"rule={rule!r}: expected one of those above")
    return sorted(order[: min(max(count, 1), len(c))])


def source(position: int, shift: bool) -> int:
    """The position whose output predicts `position`: with `shift` (Dream) it is the one before."""
    return max(position - 1, 0) if shift else position


@dataclass
class Row:
    """The decoding of one row, step by step. The settings are those of `UnmaskSpec`."""

    prompt_length: int
    gen_length: int
    block_length: int
    max_block_length: int | None = None  # dsb: None lets the block grow without bound
    schedule: str = "dsb"
    cache: str = "dsb"
    prefix_window: int = 0  # cache="dsb"
    rule: str = "threshold"
    value: float = 0.9  # the value of the rule's setting
    steps: int = 1  # quota: how many steps the response (dsb) or each block (naive) is given
    refresh_commit: str = "select"  # "first": a refresh commits the first candidate alone
    min_prefix: int = 0  # cache="dual": 1 if the block's first token is predicted before the block
    stop_at_eos: bool = False
    full_every: int = 1  # of so many refreshes, the first computes what is around the response too
    progress: float = 0.0  # threshold: how far it falls as the block fills
    leftpad: int = 0  # how many padding positions there are, at the left of the prompt
    given: dict[int, int] = field(default_factory=dict)  # tokens in the response, by position
    suffix_length: int = 0  # how many positions follow the response

    canvas: list[int] = field(init=False)
    next_kind: str = "refresh"  # "refresh", "response", "window" or "nothing"
    start: int = field(init=False)
    end: int = field(init=False)
    prefix: int = 0  # how many positions before the block the next window has
    unmasked: int = field(init=False)  # how many response positions are given or committed
    planned: int = field(init=False)  # how many masks the plan of "quota" covers
    since_refresh: int = 0  # tokens committed since the last refresh, the refresh itself included
    step: int = 0  # how many steps the row (dsb) or its block (naive) has had
    refreshes: int = 0  # how many refreshes the row has had, of either kind

    def __post_init__(self) -> None:
        response = range(self.prompt_length, self.length)
        self.canvas = [1] * self.prompt_length + [self.given.get(i, MASK) for i in response]
        self.canvas += [1] * self.suffix_length
        self.unmasked = len(self.given)
        self.start, self.end = self.block()
        self.planned = self.masks_left()

    @property
    def length(self) -> int:
        """Where the response ends: a suffix may follow."""
        return self.prompt_length + self.gen_length

    @property
    def done(self) -> bool:
        return self.next_kind == "nothing"

    def first_masked(self) -> int:
        return self.canvas.index(MASK) if MASK in self.canvas else self.length

    def block(self) -> tuple[int, int]:
        """The schedule: the block [start, end) that the present canvas has."""
        first = self.first_masked()
        if self.schedule == "naive":
            if first == self.length:
                return self.length, self.length
            number = (first - self.prompt_length) // self.block_length
            start = self.prompt_length + number * self.block_length
            return start, min(start + self.block_length, self.length)
        end = min(self.prompt_length + self.block_length + self.unmasked, self.length)
        if self.max_block_length is not None:
            end = min(end, first + self.max_block_length)
        return first, end

    def candidates(self) -> list[int]:
        """Positions that may be committed: masks before the block's end."""
        return [i for i in range(self.prompt_length, self.end) if self.canvas[i] == MASK]

    def computed(self, shift: bool = False) -> tuple[int, int]:
        """The positions [first, last) that the coming forward computes.

        With `shift` (Dream) a token is predicted from the position before it, so that a response
        step also computes the prompt's last position.
        """
        if self.next_kind == "window":
            return self.start - self.prefix, self.end
        if self.next_kind == "response":
            return max(self.prompt_length - int(shift), self.leftpad), self.length
        return self.leftpad, len(self.canvas)

    def masks_left(self) -> int:
        """How many masks a plan that begins now covers: all, or with "naive" those of the block."""
        return self.canvas.count(MASK) if self.schedule == "dsb" else len(self.candidates())

    def due(self) -> int:
        """How many tokens this step must commit to meet the plan: those that are planned up to and
        including this step, less those that have been committed. The plan spreads m masks over k
        steps; each of the first m mod k steps takes one more than the others."""
        committed = self.planned - self.masks_left()
        if self.step + 1 >= self.steps:
            return self.planned - committed
        each, more = divmod(self.planned, self.steps)
        return sum(each + (t < more) for t in range(self.step + 1)) - committed

    def advance(self, tokens: list[int], confidences: list[float]) -> list[int]:
        """Commit and slide. `tokens` and `confidences` have one entry for each candidate. Returns
        the positions that were committed."""
        candidates, is_refresh = self.candidates(), self.next_kind != "window"
        if is_refresh and self.refresh_commit == "first":
            chosen = [0]
        else:
            due = self.due() if self.rule == "quota" else 0
            masked = len(candidates) / (self.end - self.start)  # as a share of the block
            value = self.value * (1 - self.progress * (1 - masked)) if self.progress else self.value
            chosen = choose(confidences, self.rule, value, due)
        for i in chosen:
            self.canvas[candidates[i]] = tokens[i]
        self.unmasked += len(chosen)
        self.since_refresh = (0 if is_refresh else self.since_refresh) + len(chosen)
        self.refreshes += is_refresh
        self.slide(is_refresh)
        return [candidates[i] for i in chosen]

    def slide(self, was_refresh: bool) -> None:
        """Move the block, and decide what the next forward computes. In a row that stops at an EOS,
        the rest of the response becomes EOS."""
        old_start = self.start
        self.start, self.end = self.block()
        distance = self.start - old_start
        self.step += 1
        if self.schedule == "naive" and distance:  # each block has a plan of its own
            self.step, self.planned = 0, self.masks_left()

        refresh = self.cache == "none" or self.since_refresh >= self.block_length
        if self.cache == "none":
            self.prefix = 0
        elif self.cache == "dsb":
            self.prefix = max(distance, self.prefix_window)
        elif self.cache == "dual":  # the prefix begins where the block began at the last refresh
            since = 0 if was_refresh else self.prefix
            self.prefix = max(0 if refresh else since + distance, self.min_prefix)
        else:
            raise ValueError(f"cache={self.cache!r}: expected one of those above")
        self.prefix = min(self.prefix, self.start - self.leftpad)
        full = self.refreshes % self.full_every == 0
        self.next_kind = ("refresh" if full else "response") if refresh else "window"

        first = self.first_masked()
        eos = [i for i in range(self.prompt_length, first) if self.canvas[i] == EOS]
        if self.stop_at_eos and eos:  # everything after an EOS becomes EOS
            self.canvas[eos[0] + 1 : self.length] = [EOS] * (self.length - eos[0] - 1)
        if first == self.length or (self.stop_at_eos and eos):
            self.next_kind = "nothing"

"""Continuous batching on the paged KV cache: which runs of tokens are in the batch, in which pages.

Runs are sorted, so that those with a common beginning are neighbours. What neighbours share is
computed once, as a `Prefix`, and forked. A run is admitted when its pages, to its longest possible
end, are free, so that one that has begun never waits; the run that follows is admitted in the step
in which another ends.

Every rank of a replica makes the same steps: they follow from lengths and from logits, which are
equal on all of them.

Letters: V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from transformers import LogitsProcessorList

from qwen3cp.errors import KVCacheFullError
from qwen3cp.kv_cache import PagedKVCache, Sequence
from qwen3cp.model import CPQwen3MoeForCausalLM, Request
from qwen3cp.parallel import ForwardPhase
from qwen3cp.plan import MAX_CALL_ROWS

__all__ = [
    "Batch",
    "Generated",
    "Prefix",
    "Run",
    "Scored",
    "check_room",
    "longest",
    "shared_prefixes",
    "sharing_order",
]

Tokens = np.ndarray[Any, np.dtype[np.int32]]

LEAST_SHARED = 16
"""Tokens that a prefix must save each of its runs to be worth a forward and a copied page."""
CHUNK_LOGITS = 1 << 26
"""Logits that are looked at a time: 256 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Tokens to be run through the model, of which the logits of some are wanted."""

    tokens: Tokens
    first_wanted: int
    """The first token whose logits are wanted; those before it may come from the cache."""
    choices: Seq[int] = ()
    """Scoring: the tokens that may come after the last. Those after the others are `tokens`."""
    max_new_tokens: int = 0
    """Generation: the last token's logits begin it. 0 scores."""
    ends: Callable[[list[int]], bool] = field(default=lambda new: False, compare=False)
    """Generation: whether it ends after these new tokens."""
    processors: LogitsProcessorList | None = None
    """Generation: what changes the logits, [1, V], before a token is chosen; None: nothing."""
    seed: int | None = None
    """Generation: draws tokens, from a generator of the run's own. None: the likeliest."""

    @property
    def longest(self) -> int:
        """Tokens in the cache when it ends."""
        return longest(self)


def longest(run: Any) -> int:
    """Tokens in the cache when a run ends: the last new one is never run."""
    return len(run.tokens) + max(0, run.max_new_tokens - 1)


def check_room(cache: PagedKVCache, lengths: Seq[int]) -> None:
    """Raises KVCacheFullError if the empty cache has no room for a sequence of such a length."""
    room = (cache.num_pages - 1) * cache.page_size
    if max(lengths, default=0) > room:
        raise KVCacheFullError(
            f"a document needs {max(lengths)} tokens of the KV cache, its longest answer included, "
            f"but the cache has {room}: make it larger (cache_tokens), or allow fewer new tokens "
            "(max_gen_toks)"
        )


@dataclass(frozen=True)
class Scored:
    """Natural logarithms of probabilities, and whether a token was the likeliest."""

    logprobs: list[float]
    """Of tokens[first_wanted + 1:], then of each choice."""
    greedy: list[bool]


@dataclass(frozen=True)
class Generated:
    tokens: list[int]
    logprobs: list[float]
    """Natural logarithms of their probabilities, by the model's own logits."""


@dataclass(eq=False)
class Prefix:
    """Tokens that several runs begin with, after those of its parent."""

    tokens: Tokens
    parent: Prefix | None
    users: int = 0
    """Runs and prefixes that are still to be forked from it."""
    sequence: Sequence | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)


def sharing_order(runs: Seq[Tokens]) -> list[int]:
    """Indices of the runs in the order of their tokens: equal beginnings are neighbours."""
    return sorted(range(len(runs)), key=lambda i: runs[i].astype(">u4").tobytes())


def shared_prefixes(
    runs: Seq[Tokens], limits: Seq[int], least: int = LEAST_SHARED
) -> list[Prefix | None]:
    """For each of the sorted runs the longest beginning that it shares with others, if any.

    A prefix is at least `least` tokens longer than its parent, and no longer than the limit of any
    of its runs. Its users are counted.
    """
    common = [0] * (len(runs) + 1)  # with the run before
    for i in range(1, len(runs)):
        most = min(limits[i - 1], limits[i], len(runs[i - 1]), len(runs[i]))
        different = np.flatnonzero(runs[i - 1][:most] != runs[i][:most])
        common[i] = int(different[0]) if len(different) else most

    # The intervals of neighbours that share so many tokens are a tree. `open_` is the path to the
    # current run; an interval that turns out to lie in a new, shorter one becomes its child.
    lengths, parents = [0], [-1]
    open_, deepest = [0], [0] * len(runs)
    for i in range(len(runs)):
        closed = None
        while lengths[open_[-1]] > common[i]:
            closed = open_.pop()
        if lengths[open_[-1]] < common[i]:
            lengths.append(common[i])
            parents.append(open_[-1])
            new = len(lengths) - 1
            if closed is None:
                deepest[i - 1] = new
            else:
                parents[closed] = new
            open_.append(new)
        deepest[i] = open_[-1]

    prefixes: list[Prefix | None] = [None] * len(lengths)
    seen = [False] * len(lengths)
    seen[0] = True

    def prefix_of(node: int, run: int) -> Prefix | None:
        path = []
        while not seen[node]:
            path.append(node)
            node = parents[node]
        prefix = prefixes[node]
        for node in reversed(path):
            if lengths[node] - (prefix.length if prefix else 0) >= least:
                if prefix is not None:
                    prefix.users += 1
                prefix = Prefix(runs[run][: lengths[node]], prefix)
            prefixes[node], seen[node] = prefix, True
        return prefix

    of_run = [prefix_of(node, run) for run, node in enumerate(deepest)]
    for prefix in of_run:
        if prefix is not None:
            prefix.users += 1
    return of_run


@dataclass(eq=False)
class _Row:
    """A run that has been admitted."""

    index: int
    run: Run
    sequence: Sequence
    new: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    generator: torch.Generator | None = None
    scored: list[tuple[float, bool]] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Asked once after each forward of the row."""
        most = self.run.max_new_tokens
        return len(self.new) >= most or self.run.ends(self.new)

    @property
    def result(self) -> Scored | Generated:
        if self.run.max_new_tokens:
            return Generated(self.new, self.logprobs)
        logprobs, greedy = zip(*self.scored, strict=True)
        return Scored(list(logprobs), list(greedy))


class Batch:
    """Runs runs on pages of a cache. Collective over the replica: every rank makes the same calls.

    Args:
        max_rows: runs in the batch at a time.
        prefill_tokens: tokens of a prefill; longer runs go in chunks.
        on_step: told after each forward how many tokens it ran.
    """

    def __init__(
        self,
        model: CPQwen3MoeForCausalLM,
        cache: PagedKVCache,
        *,
        max_rows: int,
        prefill_tokens: int,
        on_step: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.model, self.cache = model, cache
        self.max_rows, self.prefill_tokens = min(max_rows, MAX_CALL_ROWS), prefill_tokens
        self.on_step = on_step
        self._rows: list[_Row] = []
        self._waiting: deque[tuple[int, Run, Prefix | None]] = deque()
        self._computed: list[Prefix] = []

    def run(self, runs: Seq[Run]) -> Iterator[tuple[int, Scored | Generated]]:
        """The index of each run and what came of it, as they end; all pages are free afterwards.

        Raises:
            KVCacheFullError: a run that even the empty cache has no room for; before any forward.
        """
        check_room(self.cache, [run.longest for run in runs])
        order = sharing_order([run.tokens for run in runs])
        prefixes = shared_prefixes(
            [runs[i].tokens for i in order], [runs[i].first_wanted for i in order]
        )
        self._waiting.extend((i, runs[i], p) for i, p in zip(order, prefixes, strict=True))
        try:
            while self._waiting or self._rows:
                yield from self._admit()
                if self._rows:
                    yield from self._decode()
        finally:
            self._waiting.clear()
            for row in self._rows:
                self.cache.free(row.sequence)
            self._rows.clear()
            for prefix in self._computed:
                if prefix.sequence is not None:
                    self.cache.free(prefix.sequence)
            self._computed.clear()

    @property
    def pages_in_use(self) -> int:
        return self.cache.num_pages - 1 - self.cache.num_free_pages

    # ------------------------------------------------------------------------------- admission

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.cache.page_size)

    def _admit(self) -> Iterator[tuple[int, Scored | Generated]]:
        """Takes as many waiting runs into the batch as have room, and prefills them."""
        while self._waiting:
            admitted = self._choose_runs()
            if not admitted and not self._rows:
                self._make_room()
                admitted = self._choose_runs()
                assert admitted, "an empty cache has room for every run"
            if not admitted:
                return
            self._compute_prefixes([prefix for _, _, prefix in admitted if prefix is not None])
            rows = []
            for index, run, prefix in admitted:
                row = _Row(index, run, self._fork(prefix, run.longest))
                self._rows.append(row)
                rows.append(row)
            yield from self._prefill_rows(rows)

    def _choose_runs(self) -> list[tuple[int, Run, Prefix | None]]:
        """The first waiting runs that fit: into the rows, the pages and the tokens of a prefill.

        A decode over the batch is to be one attention call, which counts the pages of each row,
        shared or not, and takes at most as many as the pool has.
        """
        page_size = self.cache.page_size
        free = self.cache.num_free_pages
        free -= sum(self._pages(r.run.longest) - len(r.sequence.pages) for r in self._rows)
        countable = self.cache.num_pages - sum(self._pages(r.run.longest) for r in self._rows)
        tokens = self.prefill_tokens
        chosen: list[tuple[int, Run, Prefix | None]] = []
        planned: set[int] = set()
        while self._waiting and len(self._rows) + len(chosen) < self.max_rows:
            index, run, prefix = self._waiting[0]
            shared = prefix.length if prefix else 0
            pages = self._pages(run.longest) - shared // page_size
            new_tokens = len(run.tokens) - shared
            missing = []
            while prefix is not None and prefix.sequence is None and id(prefix) not in planned:
                missing.append(id(prefix))
                before = prefix.parent.length if prefix.parent else 0
                pages += self._pages(prefix.length) - before // page_size
                new_tokens += prefix.length - before
                prefix = prefix.parent
            counted = self._pages(run.longest)
            if pages > free or counted > countable or (chosen and new_tokens > tokens):
                break
            free, countable, tokens = free - pages, countable - counted, tokens - new_tokens
            planned.update(missing)
            chosen.append(self._waiting.popleft())
        return chosen

    def _make_room(self) -> None:
        """Gives up computed prefixes for the first waiting run, which has no room beside them."""
        for prefix in reversed(self._computed):
            if prefix.sequence is not None:
                self.cache.free(prefix.sequence)
                prefix.sequence = None
                if prefix.parent is not None:
                    prefix.parent.users += 1  # it is forked again, if ever
        self._computed.clear()
        index, run, prefix = self._waiting[0]
        pages, ancestor = self._pages(run.longest), prefix
        while ancestor is not None:
            pages += 1  # of each prefix the last page is its own
            ancestor = ancestor.parent
        if prefix is not None and pages > self.cache.num_free_pages:
            self._waiting[0] = (index, run, None)
            self._release(prefix)

    def _fork(self, prefix: Prefix | None, length: int) -> Sequence:
        """A sequence that begins with the prefix, with all pages that it needs in the end: those
        that are taken at once follow each other if they can."""
        if prefix is None:
            sequence = self.cache.new_sequence()
            self.cache.reserve([sequence], [length])
            return sequence
        assert prefix.sequence is not None
        sequence = self.cache.fork(prefix.sequence, new_tokens=length - prefix.length)
        self._release(prefix)
        return sequence

    def _release(self, prefix: Prefix) -> None:
        prefix.users -= 1
        if prefix.users == 0 and prefix.sequence is not None:
            self.cache.free(prefix.sequence)
            prefix.sequence = None
            self._computed.remove(prefix)

    def _compute_prefixes(self, prefixes: list[Prefix]) -> None:
        """Computes those that are missing, parents first, equally deep ones together."""
        levels: list[dict[int, Prefix]] = []
        for prefix in prefixes:
            path: list[Prefix] = []
            missing: Prefix | None = prefix
            while missing is not None and missing.sequence is None:
                path.append(missing)
                missing = missing.parent
            for depth, each in enumerate(reversed(path)):
                if depth == len(levels):
                    levels.append({})
                levels[depth][id(each)] = each
        for level in levels:
            for prefix in level.values():
                prefix.sequence = self._fork(prefix.parent, prefix.length)
                self._computed.append(prefix)
            sequences = [p.sequence for p in level.values() if p.sequence is not None]
            ids = [p.tokens[p.parent.length if p.parent else 0 :] for p in level.values()]
            for _ in self._prefill(sequences, ids, [len(x) for x in ids]):
                raise AssertionError("no logits were asked for")

    # --------------------------------------------------------------------------------- forwards

    def _prefill(
        self, sequences: Seq[Sequence], ids: Seq[Tokens], first_wanted: Seq[int]
    ) -> Iterator[tuple[torch.Tensor, list[tuple[int, int]]]]:
        """Appends ids to the sequences, in chunks, and asks for the logits from some token on.

        Yields:
            float32 logits [rows, V], and for each row which of the sequences and of its ids it is.
        """
        step = max(1, CHUNK_LOGITS // self.model.vocab_size)
        for parts in _packed([len(x) for x in ids], self.prefill_tokens, MAX_CALL_ROWS):
            wanted = [
                (which, i)
                for which, start, stop in parts
                for i in range(max(start, first_wanted[which]), stop)
            ]
            offset, base = {}, 0
            for which, start, stop in parts:
                offset[which], base = base - start, base + stop - start
            rows = torch.tensor([offset[which] + i for which, i in wanted], dtype=torch.int64)
            chunk = np.concatenate([ids[which][start:stop] for which, start, stop in parts])
            request = Request(
                cache=self.cache,
                sequences=[sequences[which] for which, _, _ in parts],
                new_lengths=[stop - start for _, start, stop in parts],
                ids=torch.from_numpy(chunk.astype(np.int64)),
                wanted=rows,
            )
            core = self.model.model
            with core.step(ForwardPhase.PREFILL, lambda request=request: request) as (_, plan):
                hidden, residual = core.run(request, plan)
                for i in range(0, len(rows), step):
                    logits = self.model._logits(hidden, residual, plan, rows[i : i + step])
                    yield logits.float(), wanted[i : i + step]
            self.on_step(len(chunk))

    def _prefill_rows(self, rows: list[_Row]) -> Iterator[tuple[int, Scored | Generated]]:
        """Prefills admitted rows; scores them, or chooses the first new token."""
        starts = [row.sequence.length for row in rows]
        ids = [row.run.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        wanted = [r.run.first_wanted - start for r, start in zip(rows, starts, strict=True)]
        for logits, places in self._prefill([r.sequence for r in rows], ids, wanted):
            scores, begin = [], []
            for place, (which, i) in enumerate(places):
                row = rows[which]
                if row.run.max_new_tokens:
                    begin.append((place, row))
                else:
                    last = i + 1 == len(ids[which])
                    nexts = row.run.choices if last else (int(ids[which][i + 1]),)
                    scores.extend((place, token, row) for token in nexts)
            if scores:
                _score(logits, scores)
            if begin:
                at = [place for place, _ in begin]
                chosen = logits if len(at) == len(logits) else logits[at]
                self._choose_tokens(chosen, [row for _, row in begin])
        yield from self._retire()

    def _decode(self) -> Iterator[tuple[int, Scored | Generated]]:
        """One more token for every row."""
        rows = self._rows
        logits = self.model.decode(
            self.cache, [row.sequence for row in rows], [row.new[-1] for row in rows]
        )
        self.on_step(len(rows))
        self._choose_tokens(logits, rows)
        yield from self._retire()

    def _choose_tokens(self, logits: torch.Tensor, rows: list[_Row]) -> None:
        """Appends the next token to each row: the likeliest, or a drawn one. One read of the
        device, and one more for each row whose logits are processed."""
        tokens = logits.argmax(-1)
        for i, row in enumerate(rows):
            if row.run.processors is not None:
                tokens[i] = _process(logits[i : i + 1], row)
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        # bits of both in one tensor: one copy to the host
        host = torch.stack((tokens.int(), logprobs.view(torch.int32))).cpu()
        new, logprob = host[0].tolist(), host[1].view(torch.float32).tolist()
        for row, token, value in zip(rows, new, logprob, strict=True):
            row.new.append(token)
            row.logprobs.append(value)

    def _retire(self) -> Iterator[tuple[int, Scored | Generated]]:
        """Takes the rows that have ended out of the batch, and gives their pages back."""
        ended, going_on = [], []
        for row in self._rows:
            (ended if row.has_ended else going_on).append(row)
        self._rows = going_on
        for row in ended:
            self.cache.free(row.sequence)
        for row in ended:
            yield row.index, row.result


def _packed(
    lengths: Seq[int], most_tokens: int, most_rows: int
) -> Iterator[list[tuple[int, int, int]]]:
    """Cuts runs of these lengths into forwards of so many tokens: (which, start, stop) of each."""
    parts: list[tuple[int, int, int]] = []
    room = most_tokens
    for which, length in enumerate(lengths):
        start = 0
        while start < length:
            stop = min(length, start + room)
            parts.append((which, start, stop))
            room -= stop - start
            start = stop
            if room == 0 or len(parts) == most_rows:
                yield parts
                parts, room = [], most_tokens
    if parts:
        yield parts


def _score(logits: torch.Tensor, scores: list[tuple[int, int, _Row]]) -> None:
    """Appends the log-probabilities of tokens to their rows. One read of the device."""
    place = torch.tensor([place for place, _, _ in scores], device=logits.device)
    token = torch.tensor([token for _, token, _ in scores], device=logits.device)
    logprobs = logits[place, token] - logits.logsumexp(-1)[place]
    greedy = logits.argmax(-1)[place] == token
    host = torch.stack((logprobs, greedy.float())).cpu().tolist()
    for (_, _, row), logprob, is_greedy in zip(scores, *host, strict=True):
        row.scored.append((logprob, bool(is_greedy)))


def _process(logits: torch.Tensor, row: _Row) -> int:
    """The next token of a row whose logits, [1, V], are processed first."""
    run = row.run
    assert run.processors is not None
    ids = torch.tensor([[*run.tokens.tolist(), *row.new]], device=logits.device)
    scores = run.processors(cast(Any, ids), cast(Any, logits.clone()))
    if run.seed is None:
        return int(scores.argmax(-1))
    if row.generator is None:
        row.generator = torch.Generator().manual_seed(run.seed)
    probabilities = scores.float().softmax(-1).cpu()
    return int(torch.multinomial(probabilities, 1, generator=row.generator))

"""The paged KV cache: pages of 128 tokens, shared between sequences by reference count, and its
adapter to transformers' `Cache`.

Letters: L layers, P pages, B page size, W = local KV heads * head_dim.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch._dynamo import maybe_mark_dynamic
from transformers import Cache

from qwen3cp.errors import InputError, KVCacheFullError
from qwen3cp.parallel import ForwardPhase, ParallelContext
from qwen3cp.plan import ForwardPlan

__all__ = ["LayerKV", "PagedCacheAdapter", "PagedKVCache", "Sequence"]

DEFAULT_PAGE_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """One layer's part of the cache. Keys and values are views of its rows, so that compiled code
    is given a layer as one tensor."""

    rows: torch.Tensor
    """[2 * P * B, W]: all key slots, then all value slots; what a plan's slots index."""
    page_size: int
    causal_mask: torch.Tensor
    """bool [2048, 2048], True above the diagonal: the attention operator's fixed template."""

    def pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, both [P, B, W]."""
        key, value = self.rows.view(2, -1, self.page_size, self.rows.shape[1]).unbind()
        return key, value

    @property
    def key(self) -> torch.Tensor:
        """[P, B, W]"""
        return self.pages()[0]

    @property
    def value(self) -> torch.Tensor:
        """[P, B, W]"""
        return self.pages()[1]


class Sequence:
    """A handle on the tokens of one sequence in a cache. Made by `new_sequence` and `fork`."""

    def __init__(self, cache: PagedKVCache) -> None:
        self._cache: PagedKVCache | None = cache
        self._length = 0
        self._pages: list[int] = []

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def pages(self) -> tuple[int, ...]:
        """The pages that hold its tokens, in order; more than needed while a call is prepared."""
        return tuple(self._pages)

    def __repr__(self) -> str:
        if self._cache is None:
            return "Sequence(freed)"
        return f"Sequence(length={self._length}, pages={self._pages})"


class PagedKVCache:
    """Keys and values of many sequences, in pages, for all layers of a rank.

    Every CP rank holds all tokens of its TP rank's KV heads. Page 0 belongs to no sequence: the
    padding rows of a gather are written there.

    Not collective. The same calls in the same order give the same pages on every rank, which the
    model's forwards rely on (and check).

    Args:
        num_pages: pages, page 0 included.
        page_size: tokens of a page; the attention operator wants a multiple of 128, at most 512.
        kv_width: W, this rank's KV heads * head_dim.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        kv_width: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> None:
        if page_size % 128 or not 128 <= page_size <= 512:
            raise InputError(f"page_size must be 128, 256, 384 or 512, got {page_size}")
        if num_pages < 2:
            raise InputError(f"num_pages must be at least 2 (page 0 is reserved), got {num_pages}")
        self.page_size = page_size
        self.num_pages = num_pages
        # Tensors of inference mode could only be written in it; a cache outlives the block that
        # makes it.
        with torch.inference_mode(False):
            mask = torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)
            # Zeroed, so that nothing that was never written can be a NaN. A tensor for each layer:
            # compiled code would take views of one, of which it writes some, for the whole of it.
            self._layers = [
                LayerKV(
                    rows=torch.zeros(
                        2 * num_pages * page_size, kv_width, dtype=dtype, device=device
                    ),
                    page_size=page_size,
                    causal_mask=mask,
                )
                for _ in range(num_layers)
            ]
        for layer in self._layers:
            maybe_mark_dynamic(layer.rows, 0)
        self._free = list(range(1, num_pages))  # always sorted
        self._references = [0] * num_pages

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def kv_width(self) -> int:
        return self._layers[0].rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].rows.dtype

    @property
    def device(self) -> torch.device:
        return self._layers[0].rows.device

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of this rank."""
        return sum(layer.rows.nbytes for layer in self._layers)

    def layer(self, index: int) -> LayerKV:
        """The part of one layer, as the modules take it."""
        return self._layers[index]

    def new_sequence(self) -> Sequence:
        """An empty sequence; it owns no page yet."""
        return Sequence(self)

    def fork(self, sequence: Sequence, *, new_tokens: int = 0) -> Sequence:
        """A new sequence with the same tokens. Full pages are shared, a partial one is copied.

        Args:
            new_tokens: reserve pages for so many more tokens, too.

        Raises:
            KVCacheFullError: too few pages are free for the copy and the new tokens.
        """
        self.check([sequence])
        if new_tokens < 0:
            raise InputError(f"new_tokens must not be negative, got {new_tokens}")
        partial = sequence.length % self.page_size != 0
        pages = self._pages_of(sequence.length)
        count = partial + self._pages_of(sequence.length + new_tokens) - pages
        self._require(count, "fork a sequence")
        twin = Sequence(self)
        twin._length = sequence.length
        twin._pages = sequence._pages[:pages]
        for page in twin._pages:
            self._references[page] += 1
        own = self._take(count)
        if partial:
            self._own_last_page(twin, own.pop(0))
        twin._pages += own
        return twin

    def free(self, sequence: Sequence) -> None:
        """Gives the sequence's pages back. It cannot be used afterwards."""
        self.check([sequence])
        self._release(sequence, 0)
        sequence._length = 0
        sequence._cache = None

    def pages_freed(self, sequences: Seq[Sequence]) -> int:
        """Pages that freeing the sequences would give back: those that no other sequence holds."""
        self.check(sequences)
        held = Counter(page for sequence in sequences for page in sequence._pages)
        return sum(self._references[page] == count for page, count in held.items())

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Drops the tokens from position `length` on, and the pages that only they used."""
        self.check([sequence])
        if not 0 <= length <= sequence.length:
            raise InputError(f"cannot truncate a sequence of {sequence.length} tokens to {length}")
        sequence._length = length
        self._release(sequence, self._pages_of(length))

    def pages_needed(self, sequences: Seq[Sequence], new_lengths: Seq[int]) -> int:
        """Free pages that `reserve` would take, copies of shared partial pages included."""
        self.check(sequences)
        added = sum(
            max(0, self._pages_of(s.length + n) - len(s._pages))
            for s, n in zip(sequences, new_lengths, strict=True)
        )
        writers = Counter(page for s in sequences if (page := self._open_page(s)) is not None)
        # of the writers of one page, the last may keep it if nobody else holds it
        return added + sum(min(n, self._references[page] - 1) for page, n in writers.items())

    def reserve(self, sequences: Seq[Sequence], new_lengths: Seq[int]) -> None:
        """Gives the sequences pages for so many new tokens each. All of them or none.

        A reservation is kept until the tokens are committed, or it is cancelled; reserving again
        for as many tokens does nothing.

        Raises:
            KVCacheFullError: too few free pages; nothing was reserved.
            InputError: a sequence that was freed, is of another cache, or is given twice.
        """
        self._require(
            self.pages_needed(sequences, new_lengths), f"hold {sum(new_lengths)} more tokens"
        )
        for sequence, new in zip(sequences, new_lengths, strict=True):
            page = self._open_page(sequence)
            if page is not None and self._references[page] > 1:
                self._own_last_page(sequence, *self._take(1))
            missing = self._pages_of(sequence.length + new) - len(sequence._pages)
            if missing > 0:
                after = sequence._pages[-1] if sequence._pages else -1
                sequence._pages += self._take(missing, after)

    def commit(self, sequences: Seq[Sequence], new_lengths: Seq[int]) -> None:
        """Counts new tokens whose keys and values every layer has written to reserved pages."""
        self.check(sequences)
        for sequence, new in zip(sequences, new_lengths, strict=True):
            if self._pages_of(sequence.length + new) > len(sequence._pages):
                raise InputError(f"{new} tokens were not reserved for {sequence}")
        for sequence, new in zip(sequences, new_lengths, strict=True):
            sequence._length += new

    def cancel(self, sequences: Seq[Sequence]) -> None:
        """Gives back the pages that were reserved for tokens that are not committed."""
        self.check(sequences)
        for sequence in sequences:
            self._release(sequence, self._pages_of(sequence.length))

    def plan(
        self,
        sequences: Seq[Sequence],
        new_lengths: Seq[int],
        phase: ForwardPhase,
        ctx: ParallelContext,
    ) -> ForwardPlan:
        """Reserves pages for new tokens and plans this rank's part of their forward.

        Not collective; every rank makes the same call. The tokens count once `commit` is called.

        Returns:
            The plan, its tensors on the cache's device.
        """
        if len(sequences) != len(new_lengths):
            raise InputError(f"{len(sequences)} sequences, but {len(new_lengths)} new lengths")
        if not sequences:
            raise InputError("a forward needs at least one sequence, got an empty batch")
        for i, new in enumerate(new_lengths):
            if new < 1:
                raise InputError(f"sequence {i} has {new} new tokens; it needs at least one")
        self.reserve(sequences, new_lengths)
        plan = ForwardPlan.build(
            new_lengths,
            cached_lengths=[s.length for s in sequences],
            block_tables=[s._pages for s in sequences],
            num_pages=self.num_pages,
            page_size=self.page_size,
            phase=phase,
            cp_rank=ctx.cp_rank,
            cp_size=ctx.cp_size,
        ).to(self.device)
        if phase is ForwardPhase.DECODE:
            for call in plan.calls:  # compiled code is for any number of pages
                maybe_mark_dynamic(call.block_table, 1)
        return plan

    def grow(self, num_pages: int) -> None:
        """Makes the pool larger, to `num_pages`; copies what it holds. What `layer` returned before
        goes stale."""
        if num_pages < self.num_pages:
            raise InputError(f"the cache has {self.num_pages} pages already, got {num_pages}")
        grown = []
        for layer in self._layers:
            with torch.inference_mode(False):
                rows = layer.rows.new_zeros(2 * num_pages * self.page_size, self.kv_width)
            maybe_mark_dynamic(rows, 0)
            grown.append(replace(layer, rows=rows))
            for new, old in zip(grown[-1].pages(), layer.pages(), strict=True):
                new[: self.num_pages] = old
        self._layers = grown
        self._free += range(self.num_pages, num_pages)
        self._references += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def read(self, sequence: Sequence, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys (rotated) and values of a sequence: both [length, W]."""
        self.check([sequence])
        kv = self.layer(layer)
        pages = torch.tensor(sequence._pages, device=self.device, dtype=torch.int64)
        keys, values = (part[pages].flatten(0, 1)[: sequence.length] for part in (kv.key, kv.value))
        return keys, values

    def check(self, sequences: Seq[Sequence]) -> None:
        """Raises InputError unless all are different, living sequences of this cache."""
        for i, sequence in enumerate(sequences):
            if not isinstance(sequence, Sequence):
                raise InputError(f"sequence {i} is a {type(sequence).__name__}, not a Sequence")
            if sequence._cache is None:
                raise InputError(f"sequence {i} was freed")
            if sequence._cache is not self:
                raise InputError(f"sequence {i} belongs to another cache")
        if len({id(s) for s in sequences}) != len(sequences):
            raise InputError("a sequence is given twice in one call; fork it instead")

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _open_page(self, sequence: Sequence) -> int | None:
        """The page, already in use, that the sequence's next token goes to, if there is one."""
        full, partial = divmod(sequence.length, self.page_size)
        return sequence._pages[full] if partial else None

    def _own_last_page(self, sequence: Sequence, target: int) -> None:
        """Makes the page of the sequence's last token a copy of its own, on a page just taken."""
        last = self._pages_of(sequence.length) - 1
        source = sequence._pages[last]
        for layer in self._layers:
            pages = layer.rows.view(2, -1, self.page_size, self.kv_width)
            pages[:, target] = pages[:, source]
        self._references[source] -= 1
        sequence._pages[last] = target

    def _take(self, count: int, after: int = -1) -> list[int]:
        """Free pages: those that follow the page `after`, or at least each other, if there are
        such, since a CPU reads them without a copy; else the lowest."""

        if count == 0:
            return []

        def follow(start: int) -> bool:
            return self._free[start + count - 1] - self._free[start] == count - 1

        last = len(self._free) - count
        start = bisect(self._free, after)
        if not (start <= last and self._free[start] == after + 1 and follow(start)):
            start = next(filter(follow, range(last + 1)), 0)
        pages = self._free[start : start + count]
        del self._free[start : start + count]
        for page in pages:
            self._references[page] = 1
        return pages

    def _release(self, sequence: Sequence, keep: int) -> None:
        """Gives back all pages of a sequence but the first `keep`."""
        while len(sequence._pages) > keep:
            page = sequence._pages.pop()
            self._references[page] -= 1
            if self._references[page] == 0:
                insort(self._free, page)

    def _require(self, pages: int, what: str) -> None:
        if pages > len(self._free):
            raise KVCacheFullError(
                f"{pages} pages of {self.page_size} tokens are needed to {what}, but only "
                f"{len(self._free)} of {self.num_pages - 1} are free: free sequences, or make the "
                "cache larger (max_tokens or num_pages of new_kv_cache)"
            )


class PagedCacheAdapter(Cache):
    """A batch of sequences of a `PagedKVCache`, one a row, as `past_key_values`.

    Made by `model.generate`, by `model(...)`, or by hand to generate on pages of a cache of one's
    own. `get_seq_length()` counts columns, left padding included, as transformers slices by it;
    the sequences hold no padding. The layers write to the pages themselves: `update` is not used.

    Args:
        grow: make the pool larger when it is full, instead of `KVCacheFullError`.
    """

    def __init__(self, cache: PagedKVCache, *, grow: bool = False) -> None:
        super().__init__(layers=[])
        self.paged = cache
        self.sequences: list[Sequence] = []
        self.columns = 0
        self.grow = grow
        self.allow_empty_rows = False
        """Whether a row may have no token yet, as in the first chunks of a padded batch."""
        self.closed_rows: set[int] = set()
        """Rows that ended with padding, after which nothing can follow."""

    def __len__(self) -> int:
        return self.paged.num_layers

    def __repr__(self) -> str:
        return f"PagedCacheAdapter(columns={self.columns}, sequences={self.sequences})"

    def rows(self, batch_size: int) -> list[Sequence]:
        """The sequences of a batch; new ones, which `advance` keeps, before its first forward."""
        if not self.sequences:
            return [self.paged.new_sequence() for _ in range(batch_size)]
        if len(self.sequences) != batch_size:
            raise InputError(
                f"past_key_values holds {len(self.sequences)} rows, the batch has {batch_size}"
            )
        return self.sequences

    def ensure_room(self, sequences: list[Sequence], new_lengths: list[int]) -> None:
        """Grows the pool, at least twofold, if it may and must."""
        missing = self.paged.pages_needed(sequences, new_lengths) - self.paged.num_free_pages
        if self.grow and missing > 0:
            num_pages = self.paged.num_pages
            self.paged.grow(num_pages + max(num_pages, missing))

    def advance(self, sequences: list[Sequence], columns: int, closed: set[int]) -> None:
        """Counts the columns of a forward that has succeeded."""
        self.sequences = sequences
        self.columns += columns
        self.closed_rows = closed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0

    def update(self, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise InputError("only qwen3cp's layers can write to a paged cache")

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last -tokens_to_remove columns and frees their pages."""
        if tokens_to_remove > 0:
            raise InputError(
                f"crop({tokens_to_remove}): pass the negative number of columns to remove"
            )
        if tokens_to_remove == 0:
            return
        if self.closed_rows:
            raise InputError("a batch with padding on the right cannot be cropped")
        for sequence in self.sequences:
            self.paged.truncate(sequence, max(0, sequence.length + tokens_to_remove))
        self.columns = max(0, self.columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Makes row i the old row indices[i]: repeated rows are forked, dropped rows freed.

        Raises:
            KVCacheFullError: too few pages for the forks, and the pool may not grow. No row was
                changed.
        """
        chosen = torch.as_tensor(indices).tolist()
        for row in chosen:
            if not 0 <= row < len(self.sequences):
                raise InputError(f"there is no row {row} of {len(self.sequences)} to select")
        first_use = {row: place for place, row in reversed(list(enumerate(chosen)))}
        dropped = [s for row, s in enumerate(self.sequences) if row not in first_use]
        repeated = [self.sequences[r] for place, r in enumerate(chosen) if first_use[r] != place]
        copies = sum(s.length % self.paged.page_size != 0 for s in repeated)
        missing = copies - self.paged.num_free_pages - self.paged.pages_freed(dropped)
        if missing > 0:
            if not self.grow:
                raise KVCacheFullError(f"{missing} more pages are needed to repeat rows of a batch")
            self.paged.grow(self.paged.num_pages + max(self.paged.num_pages, missing))
        for sequence in dropped:
            self.paged.free(sequence)
        self.closed_rows = {place for place, row in enumerate(chosen) if row in self.closed_rows}
        self.sequences = [
            self.sequences[row] if first_use[row] == place else self.paged.fork(self.sequences[row])
            for place, row in enumerate(chosen)
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.sequences))
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        for sequence in self.sequences:
            self.paged.free(sequence)
        self.sequences, self.columns, self.closed_rows = [], 0, set()

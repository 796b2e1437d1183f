"""Pages: what sequences read back is what was written to them, whatever happens in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from qwen3cp import ForwardPhase, PagedKVCache, ParallelContext
from qwen3cp.errors import InputError, KVCacheFullError
from qwen3cp.kv_cache import Sequence
from qwen3cp.plan import ForwardPlan

PAGE = 128
LAYERS = 2
WIDTH = 3


def new_cache(num_pages: int = 8, page_size: int = PAGE) -> PagedKVCache:
    return PagedKVCache(
        num_layers=LAYERS,
        num_pages=num_pages,
        kv_width=WIDTH,
        dtype=torch.float32,
        page_size=page_size,
    )


def rows_of(tokens: list[int], layer: int, *, is_value: bool) -> torch.Tensor:
    """What a layer holds for tokens: distinct in every row, layer, half and column."""
    base = torch.tensor(tokens, dtype=torch.float32)[:, None] * 16 + layer * 8 + is_value * 4
    return base + torch.arange(WIDTH)


def write(
    cache: PagedKVCache,
    sequences: list[Sequence],
    tokens: list[list[int]],
    *,
    cp: int = 1,
    phase: ForwardPhase = ForwardPhase.PREFILL,
) -> None:
    """What a forward does with reserved pages: scatters the rows that its ranks gathered."""
    plan = ForwardPlan.build(
        [len(t) for t in tokens],
        cached_lengths=[s.length for s in sequences],
        block_tables=[s.pages for s in sequences],
        num_pages=cache.num_pages,
        page_size=cache.page_size,
        phase=phase,
        cp_size=cp,
    )
    flat = [t for each in tokens for t in each]
    ranks = cp if phase is ForwardPhase.PREFILL else 1
    for layer in range(LAYERS):
        gathered = torch.full((2, ranks * plan.padded_rows, WIDTH), torch.nan)  # padding: NaN
        for half in (0, 1):
            gathered[half][plan.inverse] = rows_of(flat, layer, is_value=bool(half))
        by_rank = gathered.view(2, ranks, plan.padded_rows, WIDTH).transpose(0, 1)
        cache.layer(layer).rows[plan.slots[:, 0]] = by_rank.reshape(-1, WIDTH)


def append(cache: PagedKVCache, sequence: Sequence, tokens: list[int]) -> None:
    cache.reserve([sequence], [len(tokens)])
    write(cache, [sequence], [tokens])
    cache.commit([sequence], [len(tokens)])


def assert_holds(cache: PagedKVCache, sequence: Sequence, tokens: list[int]) -> None:
    assert sequence.length == len(tokens)
    for layer in range(LAYERS):
        keys, values = cache.read(sequence, layer)
        assert torch.equal(keys, rows_of(tokens, layer, is_value=False))
        assert torch.equal(values, rows_of(tokens, layer, is_value=True))


def pages_for(tokens: int) -> int:
    pages = 0
    while pages * PAGE < tokens:
        pages += 1
    return pages


def if_any(rule: Any) -> Any:
    """Only where there is a sequence."""
    return precondition(lambda machine: machine.tokens)(rule)


class CacheMachine(RuleBasedStateMachine):
    """A cache beside a dictionary of what each sequence should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = new_cache()
        self.tokens: dict[Sequence, list[int]] = {}
        self.next_token = 0

    @initialize(num_pages=st.integers(2, 9), length=st.sampled_from([0, 100, 128, 130]))
    def start(self, num_pages, length):
        self.cache = new_cache(num_pages)
        self.new_sequence()
        if length:
            self.append_to(list(self.tokens), [length])

    def any_of_them(self, data: st.DataObject) -> Sequence:
        return data.draw(st.sampled_from(list(self.tokens)))

    def state(self) -> Any:
        lengths_and_pages = [(s.length, s.pages) for s in self.tokens]
        return self.cache.num_free_pages, self.cache.num_pages, lengths_and_pages

    def new_tokens(self, lengths: list[int]) -> list[list[int]]:
        made = []
        for length in lengths:
            made.append(list(range(self.next_token, self.next_token + length)))
            self.next_token += length
        return made

    def pages_to_reserve(self, sequences: list[Sequence], lengths: list[int]) -> int:
        """Counted one sequence after the other, each taking its pages before the next."""
        holders = Counter(page for s in self.tokens for page in s.pages)
        needed = 0
        for sequence, new in zip(sequences, lengths, strict=True):
            needed += pages_for(sequence.length + new) - pages_for(sequence.length)
            if sequence.length % PAGE:
                open_page = sequence.pages[sequence.length // PAGE]
                if holders[open_page] > 1:
                    holders[open_page] -= 1
                    needed += 1
        return needed

    def attempt(self, pages: int, action: Callable[[], Any]) -> bool:
        """Does what needs so many pages: it fails, and changes nothing, iff they are not free."""
        if pages <= self.cache.num_free_pages:
            action()
            return True
        before = self.state()
        with pytest.raises(KVCacheFullError, match=f"{pages} pages of 128 tokens are needed"):
            action()
        assert self.state() == before
        return False

    def append_to(
        self,
        chosen: list[Sequence],
        lengths: list[int],
        cp: int = 1,
        phase: ForwardPhase = ForwardPhase.PREFILL,
    ) -> None:
        needed = self.pages_to_reserve(chosen, lengths)
        assert self.cache.pages_needed(chosen, lengths) == needed
        if self.attempt(needed, lambda: self.cache.reserve(chosen, lengths)):
            reserved = self.state()
            self.cache.reserve(chosen, lengths)
            assert self.state() == reserved
            made = self.new_tokens(lengths)
            write(self.cache, chosen, made, cp=cp, phase=phase)
            self.cache.commit(chosen, lengths)
            for sequence, tokens in zip(chosen, made, strict=True):
                self.tokens[sequence] += tokens

    @precondition(lambda self: len(self.tokens) < 8)
    @rule()
    def new_sequence(self):
        self.tokens[self.cache.new_sequence()] = []

    @if_any
    @rule(data=st.data(), length=st.sampled_from([1, 7, 128, 150]))
    def append_to_one(self, data, length):
        self.append_to([self.any_of_them(data)], [length])

    @if_any
    @rule(data=st.data())
    def fill_the_page_of_one(self, data):
        sequence = self.any_of_them(data)
        self.append_to([sequence], [PAGE - sequence.length % PAGE])

    @if_any
    @rule(data=st.data(), cp=st.integers(1, 3), phase=st.sampled_from(list(ForwardPhase)))
    def append_to_some(self, data, cp, phase):
        sequences = st.sampled_from(list(self.tokens))
        chosen = data.draw(st.lists(sequences, min_size=1, max_size=4, unique=True))
        lengths = [data.draw(st.integers(1, 60)) for _ in chosen]
        self.append_to(chosen, lengths, cp, phase)

    @if_any
    @rule(data=st.data(), length=st.integers(1, 400))
    def reserve_then_cancel(self, data, length):
        sequence = self.any_of_them(data)
        needed = self.pages_to_reserve([sequence], [length])
        if self.attempt(needed, lambda: self.cache.reserve([sequence], [length])):
            write(self.cache, [sequence], self.new_tokens([length]))
            self.cache.cancel([sequence])
            assert len(sequence.pages) == pages_for(sequence.length)

    @precondition(lambda self: self.tokens and len(self.tokens) < 8)
    @rule(
        data=st.data(),
        dropped=st.sampled_from([0, 0, 1, 28]),
        new_tokens=st.sampled_from([0, 0, 1, 200]),
    )
    def fork(self, data, dropped, new_tokens):
        sequence = self.any_of_them(data)
        twins = []
        full = sequence.length // PAGE
        needed = max(pages_for(sequence.length), pages_for(sequence.length + new_tokens)) - full
        free = self.cache.num_free_pages

        def fork() -> None:
            twins.append(self.cache.fork(sequence, new_tokens=new_tokens))

        if self.attempt(needed, fork):
            assert self.cache.num_free_pages == free - needed
            self.cache.reserve(twins, [new_tokens])
            assert self.cache.num_free_pages == free - needed
            self.cache.cancel(twins)
            self.tokens[twins[0]] = list(self.tokens[sequence])
            self.truncate_to(twins[0], max(0, sequence.length - dropped))

    def truncate_to(self, sequence: Sequence, length: int) -> None:
        self.cache.truncate(sequence, length)
        del self.tokens[sequence][length:]

    @if_any
    @rule(data=st.data(), dropped=st.sampled_from([0, 1, 28, 128, 200]))
    def truncate(self, data, dropped):
        sequence = self.any_of_them(data)
        self.truncate_to(sequence, max(0, sequence.length - dropped))

    @precondition(lambda self: len(self.tokens) > 1)
    @rule(data=st.data())
    def free(self, data):
        sequence = self.any_of_them(data)
        self.cache.free(sequence)
        del self.tokens[sequence]
        with pytest.raises(InputError, match="sequence 0 was freed"):
            self.cache.free(sequence)

    @precondition(lambda self: self.cache.num_pages < 10)
    @rule(pages=st.integers(0, 2))
    def grow(self, pages):
        free = self.cache.num_free_pages
        self.cache.grow(self.cache.num_pages + pages)
        assert self.cache.num_free_pages == free + pages

    @invariant()
    def sequences_hold_their_tokens(self):
        for sequence, tokens in self.tokens.items():
            assert len(sequence.pages) == pages_for(len(tokens))
            assert_holds(self.cache, sequence, tokens)

    @invariant()
    def every_page_is_free_or_owned(self):
        owned = {page for s in self.tokens for page in s.pages}
        assert len(owned) + self.cache.num_free_pages == self.cache.num_pages - 1
        assert owned <= set(range(1, self.cache.num_pages))

    @invariant()
    def a_shared_page_holds_one_prefix(self):
        """Equal tokens up to it and in it, as far as both go."""
        holders: dict[int, list[tuple[int, list[int]]]] = {}
        for sequence, tokens in self.tokens.items():
            assert len(set(sequence.pages)) == len(sequence.pages)
            for place, page in enumerate(sequence.pages):
                for other_place, other in holders.get(page, []):
                    assert other_place == place
                    end = min(len(tokens), len(other), (place + 1) * PAGE)
                    assert tokens[:end] == other[:end]
                holders.setdefault(page, []).append((place, tokens))

    def teardown(self):
        for sequence in self.tokens:
            self.cache.free(sequence)
        assert self.cache.num_free_pages == self.cache.num_pages - 1


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30)


# Forks


@pytest.mark.parametrize(("length", "copied"), [(0, 0), (1, 1), (127, 1), (128, 0), (300, 1)])
def test_a_fork_shares_full_pages_and_copies_the_partial_one(length, copied):
    cache = new_cache()
    sequence = cache.new_sequence()
    if length:
        append(cache, sequence, list(range(length)))
    free = cache.num_free_pages
    twin = cache.fork(sequence)
    assert free - cache.num_free_pages == copied
    full = length // PAGE
    assert twin.pages[:full] == sequence.pages[:full]
    assert not set(twin.pages[full:]) & set(sequence.pages[full:])
    append(cache, sequence, [1000])
    append(cache, twin, [2000, 2001])
    assert_holds(cache, sequence, [*range(length), 1000])
    assert_holds(cache, twin, [*range(length), 2000, 2001])
    cache.free(sequence)
    assert_holds(cache, twin, [*range(length), 2000, 2001])
    cache.free(twin)
    assert cache.num_free_pages == cache.num_pages - 1


def test_a_fork_leaves_out_pages_that_are_only_reserved():
    cache = new_cache()
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(PAGE)))
    cache.reserve([sequence], [200])
    twin = cache.fork(sequence)
    assert twin.pages == sequence.pages[:1]
    cache.cancel([sequence])
    assert sequence.pages == twin.pages


def test_a_fork_with_room_for_tokens():
    cache = new_cache(num_pages=9)
    sequence, other = cache.new_sequence(), cache.new_sequence()
    append(cache, sequence, list(range(PAGE + 1)))
    append(cache, other, [1])
    append(cache, sequence, list(range(PAGE)))
    assert sequence.pages == (1, 2, 4)
    cache.free(other)
    twin = cache.fork(sequence, new_tokens=2 * PAGE)
    assert twin.pages == (1, 2, 5, 6, 7)  # the copy and what follows it
    assert_holds(cache, twin, [*range(PAGE + 1), *range(PAGE)])
    with pytest.raises(KVCacheFullError, match="3 pages .* fork a sequence, .* only 2 of 8"):
        cache.fork(sequence, new_tokens=2 * PAGE)
    with pytest.raises(InputError, match="new_tokens must not be negative, got -1"):
        cache.fork(sequence, new_tokens=-1)
    assert cache.num_free_pages == 2


def test_pages_follow_each_other_where_they_can():
    cache = new_cache(num_pages=10)
    sequences = [cache.new_sequence() for _ in range(4)]
    cache.reserve(sequences, [1, 3 * PAGE, 1, 1])
    assert [s.pages for s in sequences] == [(1,), (2, 3, 4), (5,), (6,)]
    for freed in (0, 2):
        cache.free(sequences[freed])
    assert cache.num_free_pages == 5  # 1, 5, 7, 8, 9
    cache.reserve([sequences[1]], [4 * PAGE])
    assert sequences[1].pages == (2, 3, 4, 5)
    long = cache.new_sequence()
    cache.reserve([long], [2 * PAGE])
    assert long.pages == (7, 8)
    cache.reserve([long], [4 * PAGE])  # nothing follows: the lowest
    assert long.pages == (7, 8, 1, 9)


def test_appending_inside_a_shared_page_copies_it_first():
    cache = new_cache(num_pages=4)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(PAGE)))
    twin, third = cache.fork(sequence), cache.fork(sequence)
    cache.truncate(twin, 100)
    cache.truncate(third, 50)
    assert twin.pages == third.pages == sequence.pages
    assert cache.num_free_pages == 2
    append(cache, twin, [500])
    append(cache, third, [600, 601])
    assert cache.num_free_pages == 0
    assert len({sequence.pages, twin.pages, third.pages}) == 3
    assert_holds(cache, sequence, list(range(PAGE)))
    assert_holds(cache, twin, [*range(100), 500])
    assert_holds(cache, third, [*range(50), 600, 601])


def test_the_last_writer_of_a_shared_page_keeps_it():
    cache = new_cache(num_pages=3)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(PAGE)))
    twin = cache.fork(sequence)
    cache.truncate(sequence, 100)
    cache.truncate(twin, 60)
    cache.reserve([sequence, twin], [3, 4])  # one copy: there is one free page
    write(cache, [sequence, twin], [[500, 501, 502], [600, 601, 602, 603]])
    cache.commit([sequence, twin], [3, 4])
    assert_holds(cache, sequence, [*range(100), 500, 501, 502])
    assert_holds(cache, twin, [*range(60), 600, 601, 602, 603])


def test_every_writer_of_a_page_that_another_holds_needs_a_copy():
    cache = new_cache(num_pages=3)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(PAGE)))
    twins = [cache.fork(sequence), cache.fork(sequence)]
    for twin in twins:
        cache.truncate(twin, 100)
    with pytest.raises(KVCacheFullError, match="2 pages of 128 tokens .* only 1 of 2 are free"):
        cache.reserve(twins, [1, 1])
    assert {s.pages for s in (sequence, *twins)} == {(1,)}
    cache.grow(4)
    cache.reserve(twins, [1, 1])
    write(cache, twins, [[500], [600]])
    cache.commit(twins, [1, 1])
    assert_holds(cache, sequence, list(range(PAGE)))
    assert_holds(cache, twins[0], [*range(100), 500])
    assert_holds(cache, twins[1], [*range(100), 600])


def test_a_full_cache_refuses_a_copy_and_leaves_both_sequences():
    cache = new_cache(num_pages=2)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(PAGE)))
    twin = cache.fork(sequence)
    cache.truncate(twin, 100)
    with pytest.raises(KVCacheFullError, match="1 pages of 128 tokens .* only 0 of 1 are free"):
        cache.reserve([twin], [1])
    with pytest.raises(KVCacheFullError, match="fork a sequence"):
        cache.fork(twin)
    assert_holds(cache, sequence, list(range(PAGE)))
    assert_holds(cache, twin, list(range(100)))


def test_pages_that_freeing_would_give_back():
    cache = new_cache(num_pages=10)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(300)))
    twin = cache.fork(sequence)
    assert [cache.pages_freed(s) for s in ([], [sequence], [twin], [sequence, twin])] == [
        0,
        1,
        1,
        4,
    ]
    free = cache.num_free_pages
    cache.free(sequence)
    assert cache.num_free_pages == free + 1
    assert cache.pages_freed([twin]) == 3


# Reservations


def test_reserve_gives_pages_to_all_sequences_or_to_none():
    cache = new_cache(num_pages=4)
    first, second = cache.new_sequence(), cache.new_sequence()
    with pytest.raises(KVCacheFullError, match="4 pages .* hold 500 more tokens"):
        cache.reserve([first, second], [250, 250])
    assert first.pages == second.pages == ()
    cache.reserve([first, second], [250, 100])
    assert (first.pages, second.pages) == ((1, 2), (3,))
    cache.cancel([first, second])
    assert cache.num_free_pages == 3
    assert first.length == second.length == 0


def test_tokens_cannot_be_committed_without_pages():
    cache = new_cache()
    first, second = cache.new_sequence(), cache.new_sequence()
    with pytest.raises(InputError, match="1 tokens were not reserved"):
        cache.commit([first], [1])
    cache.reserve([first, second], [PAGE, 1])
    with pytest.raises(InputError, match="129 tokens were not reserved"):
        cache.commit([second, first], [1, PAGE + 1])
    assert first.length == second.length == 0
    cache.commit([second, first], [1, PAGE])
    assert (first.length, second.length) == (PAGE, 1)


def test_truncate_gives_pages_back_and_checks_its_length():
    cache = new_cache()
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(300)))
    for length in (-1, 301):
        with pytest.raises(InputError, match=f"300 tokens to {length}"):
            cache.truncate(sequence, length)
    cache.truncate(sequence, 129)
    assert len(sequence.pages) == 2
    cache.truncate(sequence, 128)
    assert len(sequence.pages) == 1
    assert_holds(cache, sequence, list(range(128)))
    cache.truncate(sequence, 0)
    assert cache.num_free_pages == cache.num_pages - 1


def test_plan_reserves_and_refuses_what_is_no_forward():
    cache, ctx = new_cache(num_pages=3), ParallelContext.single()
    sequence = cache.new_sequence()
    prefill = ForwardPhase.PREFILL
    plan = cache.plan([sequence], [200], prefill, ctx)
    assert sequence.pages == (1, 2)
    assert plan.slots[:, 0].tolist() == [*range(128, 328), *range(512, 712)]
    assert sequence.length == 0
    cache.cancel([sequence])
    for sequences, lengths in (([], []), ([sequence], []), ([sequence], [0]), ([sequence], [-1])):
        with pytest.raises(InputError):
            cache.plan(sequences, lengths, prefill, ctx)
    with pytest.raises(KVCacheFullError):
        cache.plan([sequence], [257], prefill, ctx)
    assert sequence.pages == ()


# Handles


def test_only_living_sequences_of_the_cache_are_taken():
    cache, other = new_cache(), new_cache()
    mine, freed, foreign = cache.new_sequence(), cache.new_sequence(), other.new_sequence()
    cache.free(freed)
    assert repr(freed) == "Sequence(freed)"
    bad: list[tuple[Any, str]] = [
        (freed, "was freed"),
        (foreign, "belongs to another cache"),
        ([1, 2], "is a list, not a Sequence"),
    ]
    for sequence, message in bad:
        with pytest.raises(InputError, match=f"sequence 1 {message}"):
            cache.reserve([mine, sequence], [1, 1])
        for call in (
            cache.fork,
            cache.free,
            lambda s: cache.truncate(s, 0),
            lambda s: cache.read(s, 0),
            lambda s: cache.commit([s], [0]),
            lambda s: cache.cancel([s]),
        ):
            with pytest.raises(InputError, match=f"sequence 0 {message}"):
                call(sequence)
    with pytest.raises(InputError, match="twice in one call"):
        cache.reserve([mine, mine], [1, 1])
    assert cache.num_free_pages == cache.num_pages - 1


def test_the_same_calls_give_the_same_pages():
    tables = []
    for _ in range(2):
        cache = new_cache(num_pages=6)
        a, b = cache.new_sequence(), cache.new_sequence()
        append(cache, a, list(range(130)))
        append(cache, b, list(range(10)))
        cache.truncate(a, 5)
        append(cache, b, list(range(200)))
        cache.grow(8)
        append(cache, a, list(range(500)))
        tables.append((a.pages, b.pages))
    assert tables[0] == tables[1]


# Storage


@pytest.mark.parametrize("page_size", [0, 1, 64, 100, 192, 1024, -128])
def test_page_sizes_that_the_attention_operator_refuses(page_size):
    with pytest.raises(InputError, match=f"page_size must be .* got {page_size}"):
        new_cache(page_size=page_size)


@pytest.mark.parametrize("page_size", [128, 256, 384, 512])
def test_page_sizes_that_it_takes(page_size):
    cache = new_cache(num_pages=5, page_size=page_size)
    sequence = cache.new_sequence()
    tokens = list(range(page_size + 1))
    append(cache, sequence, tokens)
    assert len(sequence.pages) == 2
    assert cache.layer(0).page_size == page_size
    assert_holds(cache, sequence, tokens)


@pytest.mark.parametrize("num_pages", [1, 0, -3])
def test_a_cache_needs_a_page_beside_the_reserved_one(num_pages):
    with pytest.raises(InputError, match=f"num_pages must be at least 2 .* got {num_pages}"):
        new_cache(num_pages)


def test_a_layer_is_views_of_the_cache():
    cache = new_cache(num_pages=3)
    assert cache.num_bytes == LAYERS * 2 * 3 * PAGE * WIDTH * 4
    assert (cache.num_layers, cache.kv_width, cache.dtype) == (LAYERS, WIDTH, torch.float32)
    for index in range(LAYERS):
        layer = cache.layer(index)
        assert layer.rows.shape == (2 * 3 * PAGE, WIDTH)
        assert layer.key.shape == layer.value.shape == (3, PAGE, WIDTH)
        assert layer.rows.is_contiguous()
        assert layer.key.is_contiguous()
        assert layer.value.is_contiguous()
        assert layer.key.data_ptr() == layer.rows.data_ptr()
        assert layer.value.data_ptr() == layer.rows[3 * PAGE :].data_ptr()
        assert layer.rows.data_ptr() == cache.layer(index).rows.data_ptr()
        layer.rows[PAGE + 5] = index + 1
        layer.rows[3 * PAGE + 2 * PAGE + 7] = index + 11
    for index in range(LAYERS):
        layer = cache.layer(index)
        assert (layer.key[1, 5] == index + 1).all()
        assert (layer.value[2, 7] == index + 11).all()
        assert torch.count_nonzero(layer.rows) == 2 * WIDTH


def test_the_causal_mask_is_the_operators_template():
    mask = new_cache().layer(0).causal_mask
    assert mask.shape == (2048, 2048)
    assert mask.dtype == torch.bool
    row, column = torch.arange(2048)[:, None], torch.arange(2048)
    assert torch.equal(mask, column > row)


def test_grow_keeps_what_is_held_and_cannot_shrink():
    cache = new_cache(num_pages=3)
    sequence = cache.new_sequence()
    append(cache, sequence, list(range(200)))
    with pytest.raises(InputError, match="3 pages already, got 2"):
        cache.grow(2)
    cache.grow(3)
    assert cache.num_free_pages == 0
    cache.grow(5)
    assert (cache.num_pages, cache.num_free_pages) == (5, 2)
    append(cache, sequence, list(range(200, 400)))
    assert sequence.pages == (1, 2, 3, 4)
    assert_holds(cache, sequence, list(range(400)))

"""The plan of every rank, against plain loops. Pure: no rank is started."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3cp import ForwardPhase
from qwen3cp.errors import InputError
from qwen3cp.plan import ForwardPlan

PAGE = 128
PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE


@dataclass(frozen=True)
class Batch:
    """The arguments of a plan."""

    new: list[int]
    cached: list[int]
    tables: list[list[int]]
    num_pages: int
    cp: int = 1
    phase: ForwardPhase = PREFILL

    def plan(self, rank: int = 0) -> ForwardPlan:
        return ForwardPlan.build(
            self.new,
            cached_lengths=self.cached,
            block_tables=self.tables,
            num_pages=self.num_pages,
            page_size=PAGE,
            phase=self.phase,
            cp_rank=rank,
            cp_size=self.cp,
        )

    def plans(self) -> list[ForwardPlan]:
        return [self.plan(rank) for rank in range(self.cp)]

    def tokens(self) -> list[tuple[int, int]]:
        """(sequence, index among its new tokens) of each of the T new tokens."""
        return [(s, i) for s, length in enumerate(self.new) for i in range(length)]

    def slot(self, sequence: int, position: int) -> int:
        return self.tables[sequence][position // PAGE] * PAGE + position % PAGE


def pages_for(tokens: int) -> int:
    pages = 0
    while pages * PAGE < tokens:
        pages += 1
    return pages


def batch_of(
    new: Seq[int],
    cached: Seq[int] | None = None,
    *,
    cp: int = 1,
    phase: ForwardPhase = PREFILL,
    spare_pages: int = 0,
) -> Batch:
    """A batch whose pages are handed out from the last to the first."""
    lengths = list(cached) if cached is not None else [0] * len(new)
    needed = [pages_for(n + c) for n, c in zip(new, lengths, strict=True)]
    free = list(range(1, sum(needed) + 1 + spare_pages))
    tables = [[free.pop() for _ in range(n)] for n in needed]
    return Batch(list(new), lengths, tables, sum(needed) + 1 + spare_pages, cp, phase)


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    phases: Seq[ForwardPhase] = (PREFILL, DECODE),
    max_cp: int = 16,
    shared: bool = True,
    spare: bool = True,
) -> Batch:
    """Any batch: pages in random order, full pages shared between sequences as after a fork."""
    lengths = st.one_of(
        st.integers(1, 60), st.integers(1, 3), st.sampled_from([128, 200, 333, 512])
    )
    new = draw(st.lists(lengths, min_size=1, max_size=8))
    cached = [draw(st.one_of(st.just(0), st.integers(0, 300))) for _ in new]
    needed = [pages_for(n + c) for n, c in zip(new, cached, strict=True)]
    extra = [draw(st.integers(0, 2)) if spare else 0 for _ in new]
    num_pages = 1 + sum(needed) + sum(extra) + (draw(st.integers(0, 4)) if spare else 0)
    free = draw(st.permutations(range(1, num_pages)))
    tables: list[list[int]] = []
    for sequence, count in enumerate(needed):
        table: list[int] = []
        if shared and sequence and draw(st.booleans()):
            parent = draw(st.integers(0, sequence - 1))
            full = min(cached[sequence], cached[parent]) // PAGE
            table = tables[parent][: draw(st.integers(0, full))]
        while len(table) < count + extra[sequence]:
            table.append(free.pop())
        tables.append(table)
    if shared and not spare:  # the smallest pool that holds them
        names = {page: i + 1 for i, page in enumerate(sorted({p for t in tables for p in t}))}
        tables = [[names[page] for page in table] for table in tables]
        num_pages = len(names) + 1
    return Batch(
        new, cached, tables, num_pages, draw(st.integers(1, max_cp)), draw(st.sampled_from(phases))
    )


def slow_runs(batch: Batch) -> list[list[tuple[int, int, int]]]:
    """Of each rank, in the order of its rows: (sequence, first index, end index), none empty.

    Each sequence's longer pairs start at the rank after the last longer pair of the one before.
    """
    num_ranks = batch.cp if batch.phase is PREFILL else 1
    num_blocks = 2 * num_ranks
    early: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    late: list[list[tuple[int, int, int]]] = [[] for _ in range(num_ranks)]
    next_rank = 0
    for sequence, length in enumerate(batch.new):
        edges = [0]
        for block in range(num_blocks):
            longer = 1 if block < length % num_blocks else 0
            edges.append(edges[-1] + length // num_blocks + longer)
        assert edges[-1] == length
        sizes = [edges[b + 1] - edges[b] for b in range(num_blocks)]
        pairs = [sizes[j] + sizes[num_blocks - 1 - j] for j in range(num_ranks)]
        longer_pairs = [j for j in range(num_ranks) if pairs[j] > min(pairs)]
        first = longer_pairs[0] if longer_pairs else 0
        for j in range(num_ranks):
            rank = (next_rank + j - first) % num_ranks
            mirror = num_blocks - 1 - j
            if mirror == j + 1:
                early[rank].append((sequence, edges[j], edges[mirror + 1]))
            else:
                early[rank].append((sequence, edges[j], edges[j + 1]))
                late[rank].append((sequence, edges[mirror], edges[mirror + 1]))
        next_rank += len(longer_pairs)
    ranks = [[run for run in early[r] + late[r] if run[2] > run[1]] for r in range(num_ranks)]
    return ranks if batch.phase is PREFILL else ranks * batch.cp


def slow_rows(batch: Batch) -> list[list[tuple[int, int]]]:
    """Of each rank: (sequence, index) of each of its rows."""
    return [[(s, i) for s, a, b in runs for i in range(a, b)] for runs in slow_runs(batch)]


def is_shared(batch: Batch) -> bool:
    pages = [page for table in batch.tables for page in table]
    return len(set(pages)) < len(pages)


# Rows


@given(batches(phases=[PREFILL]))
def test_ranks_partition_the_tokens_evenly(batch):
    plans = batch.plans()
    rows = [token for plan in plans for token in plan.local_indices.tolist()]
    assert sorted(rows) == list(range(sum(batch.new)))
    totals = [plan.num_rows for plan in plans]
    assert totals == [len(plan.local_indices) for plan in plans]
    assert max(totals) - min(totals) <= 1
    assert {plan.padded_rows for plan in plans} == {max(totals)}
    assert batch.cp * max(totals) - sum(batch.new) <= batch.cp - 1


@given(batches())
def test_rows_are_the_zigzag_in_order_with_global_positions(batch):
    tokens = batch.tokens()
    for plan, expected in zip(batch.plans(), slow_rows(batch), strict=True):
        assert [tokens[i] for i in plan.local_indices.tolist()] == expected
        assert plan.positions.tolist() == [batch.cached[s] + i for s, i in expected]
        assert plan.local_indices.dtype == plan.positions.dtype == torch.int64


@given(batches(phases=[DECODE]))
def test_decode_runs_every_row_on_every_rank(batch):
    plans = batch.plans()
    for rank, plan in enumerate(plans):
        assert (plan.cp_rank, plan.cp_size, plan.is_split) == (rank, batch.cp, False)
        assert plan.local_indices.tolist() == list(range(sum(batch.new)))
        assert plan.inverse.tolist() == plan.local_indices.tolist()
        assert plan.num_rows == plan.padded_rows == sum(batch.new)
        assert torch.equal(plan.slots, plans[0].slots)
        assert [c.kv_lengths for c in plan.calls] == [c.kv_lengths for c in plans[0].calls]
    totals = [c + n for c, n in zip(batch.cached, batch.new, strict=True)]
    assert [kv for call in plans[0].calls for kv in call.kv_lengths] == totals
    rows = torch.arange(sum(batch.new))
    assert torch.equal(plans[-1].split(rows), rows)


@given(st.integers(1, 16), st.data())
def test_causal_work_is_equal_where_blocks_are(cp, data):
    blocks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    cached = [data.draw(st.integers(0, 300)) for _ in blocks]
    batch = batch_of([2 * cp * b for b in blocks], cached, cp=cp)
    work = [sum(p + 1 for p in plan.positions.tolist()) for plan in batch.plans()]
    assert len(set(work)) == 1

    contiguous = [0] * cp
    for length, past in zip(batch.new, cached, strict=True):
        for i in range(length):
            contiguous[i // (length // cp)] += past + i + 1
    assert sum(contiguous) == sum(work)
    assert len(set(contiguous)) == cp


# Attention calls


@given(batches())
def test_each_row_sees_exactly_the_keys_up_to_its_own(batch):
    tokens = batch.tokens()
    for plan in batch.plans():
        row = 0
        for call in plan.calls:
            assert call.start == row
            assert call.query_ends[-1] == call.stop - call.start
            assert len(call.query_ends) == len(call.kv_lengths) == len(call.block_table)
            assert call.block_table.dtype == torch.int32
            first = 0
            for end, kv, pages in zip(
                call.query_ends, call.kv_lengths, call.block_table.tolist(), strict=True
            ):
                assert end > first
                length = end - first
                for i in range(length):
                    # sparse mode 3: the last query row sees all kv keys, each before one less
                    visible = kv - (length - 1 - i)
                    sequence, index = tokens[plan.local_indices[row]]
                    assert visible == batch.cached[sequence] + index + 1
                    used = pages_for(kv)
                    assert pages[:used] == batch.tables[sequence][:used]
                    assert not any(pages[used:])
                    row += 1
                first = end
            assert call.stop == row
        assert row == plan.num_rows


@given(batches())
def test_virtual_sequences_are_the_merged_blocks(batch):
    for plan, runs in zip(batch.plans(), slow_runs(batch), strict=True):
        kv_lengths = [kv for call in plan.calls for kv in call.kv_lengths]
        assert kv_lengths == [batch.cached[s] + end for s, _, end in runs]
        assert len(runs) <= 2 * len(batch.new)
        if batch.cp == 1:
            assert len(runs) == len(batch.new)
        for place, (sequence, _, end) in enumerate(runs):
            assert (sequence, end) not in {(s, a) for s, a, _ in runs[place + 1 :]}


@given(batches(spare=False))
def test_calls_fit_the_pool_and_are_as_few_as_can_be(batch):
    for plan in batch.plans():
        counted = [[pages_for(kv) for kv in call.kv_lengths] for call in plan.calls]
        assert all(sum(call) <= batch.num_pages for call in counted)
        assert plan.num_attention_calls == len(plan.calls)
        total = sum(sum(call) for call in counted)
        if plan.num_rows == 0:
            assert plan.num_attention_calls == 0
        else:
            assert (plan.num_attention_calls == 1) == (total <= batch.num_pages)
        if not is_shared(batch):
            assert plan.num_attention_calls <= 2
        for call, following in zip(counted, counted[1:], strict=False):
            assert sum(call) + following[0] > batch.num_pages


@given(batches(phases=[PREFILL], shared=False, spare=False))
def test_a_pool_that_just_holds_the_tokens_needs_at_most_two_calls(batch):
    assert batch.num_pages == 1 + sum(
        pages_for(n + c) for n, c in zip(batch.new, batch.cached, strict=True)
    )
    for plan in batch.plans():
        assert plan.num_attention_calls <= 2
        if batch.cp == 1:
            assert plan.num_attention_calls == 1


def test_one_long_prompt_is_two_calls_in_its_own_pool_and_one_in_twice_the_room():
    tight, roomy = batch_of([1024], cp=2), batch_of([1024], cp=2, spare_pages=8)
    # rank 0 sees 256 and 1024 keys, which counts 2 + 8 pages; rank 1 sees 768 in one block
    assert [p.num_attention_calls for p in tight.plans()] == [2, 1]
    assert [p.num_attention_calls for p in roomy.plans()] == [1, 1]
    early, late = tight.plan(0).calls
    assert (early.start, early.stop, late.start, late.stop) == (0, 256, 256, 512)
    assert (early.query_ends, late.query_ends) == ([256], [256])


@pytest.mark.parametrize(
    ("num_sequences", "rows"), [(4096, [4096]), (4097, [4096, 1]), (9000, [4096, 4096, 808])]
)
def test_a_call_takes_4096_virtual_sequences(num_sequences, rows):
    batch = batch_of([1] * num_sequences, phase=DECODE)
    assert [len(call.query_ends) for call in batch.plan().calls] == rows


def test_blocks_of_many_sequences_are_counted_not_sequences():
    batch = batch_of([4] * 3000, cp=2, spare_pages=3000)
    assert [len(call.query_ends) for call in batch.plan(0).calls] == [4096, 1904]
    assert [len(call.query_ends) for call in batch.plan(1).calls] == [3000]


# Slots, gather and its inverse


@given(batches())
def test_slots_put_each_gathered_row_where_its_token_is(batch):
    ranks = slow_rows(batch) if batch.phase is PREFILL else slow_rows(batch)[:1]
    padded = max(len(rows) for rows in ranks)
    values = batch.num_pages * PAGE
    owned = {page for table in batch.tables for page in table}
    for plan in batch.plans():
        slots = plan.slots.reshape(len(ranks), 2, padded).tolist()
        assert plan.slots.shape == (len(ranks) * 2 * padded, 1)
        flat = plan.slots.flatten().tolist()
        assert len(set(flat)) == len(flat)
        for (key_slots, value_slots), rows in zip(slots, ranks, strict=True):
            assert [slot + values for slot in key_slots] == value_slots
            real = [batch.slot(s, batch.cached[s] + i) for s, i in rows]
            assert key_slots[: len(rows)] == real
            assert {slot // PAGE for slot in real} <= owned
            assert all(slot // PAGE == 0 for slot in key_slots[len(rows) :])


@given(batches())
def test_split_then_gather_is_the_identity(batch):
    plans = batch.plans()
    total = sum(batch.new)
    rows = torch.arange(total * 2).reshape(total, 2)
    parts = []
    for plan in plans if batch.phase is PREFILL else plans[:1]:
        part = torch.full((plan.padded_rows, 2), -1)
        part[: plan.num_rows] = plan.split(rows)
        parts.append(part)
    gathered = torch.cat(parts)
    for plan in plans:
        assert torch.equal(gathered[plan.inverse], rows)


@given(batches())
def test_owners_say_which_rank_runs_a_token_and_where(batch):
    ranks = slow_rows(batch)
    tokens = batch.tokens()
    last = [sum(batch.new[: s + 1]) - 1 for s in range(len(batch.new))]
    for plan in batch.plans():
        assert plan.last_tokens.tolist() == last
        owners, rows = plan.owners(torch.arange(len(tokens)))
        for token, owner, row in zip(tokens, owners.tolist(), rows.tolist(), strict=True):
            assert ranks[owner][row] == token
        if batch.phase is DECODE:
            assert not owners.any()


@given(st.integers(1, 300), st.integers(1, 16))
def test_owner_of_the_last_token_of_one_sequence(length, cp):
    plan = batch_of([length], cp=cp).plan()
    block = min(length, 2 * cp) - 1
    pair = block if block < cp else 2 * cp - 1 - block
    # the longer pairs of the first sequence start on rank 0
    longer = length % (2 * cp)
    rotation = 0 if longer < cp else cp - longer % cp
    owner, _ = plan.owners(plan.last_tokens)
    assert owner.tolist() == [(pair - rotation) % cp]


# Worked examples


@pytest.mark.parametrize(
    ("new", "cached", "cp", "rows", "query_ends", "kv_lengths"),
    [
        pytest.param(
            [13],
            [0],
            2,
            [[0, 1, 2, 3, 10, 11, 12], [4, 5, 6, 7, 8, 9]],
            [[4, 7], [6]],
            [[4, 13], [10]],
            id="13 tokens on 2 ranks",
        ),
        pytest.param(
            [13, 9],
            [0, 5],
            2,
            [
                [0, 1, 2, 3, 16, 17, 18, 19, 10, 11, 12],
                [4, 5, 6, 7, 8, 9, 13, 14, 15, 20, 21],
            ],
            [[4, 8, 11], [6, 9, 11]],
            [[4, 12, 13], [10, 8, 14]],
            id="the longer pair of the second sequence goes to rank 1",
        ),
        pytest.param(
            [5],
            [0],
            4,
            [[3, 4], [0], [1], [2]],
            [[2], [1], [1], [1]],
            [[5], [1], [2], [3]],
            id="fewer tokens than blocks",
        ),
        pytest.param([1], [0], 2, [[0], []], [[1], None], [[1], None], id="one token"),
        pytest.param(
            [7],
            [0],
            2,
            [[2, 3, 4, 5], [0, 1, 6]],
            [[4], [2, 3]],
            [[6], [2, 7]],
            id="the longer pair comes last",
        ),
        pytest.param([4], [130], 1, [[0, 1, 2, 3]], [[4]], [[134]], id="one rank"),
    ],
)
def test_worked_examples(new, cached, cp, rows, query_ends, kv_lengths):
    plans = batch_of(new, cached, cp=cp, spare_pages=9).plans()
    assert [plan.local_indices.tolist() for plan in plans] == rows
    calls = [plan.calls[0] if plan.calls else None for plan in plans]
    assert [call and call.query_ends for call in calls] == query_ends
    assert [call and call.kv_lengths for call in calls] == kv_lengths


def test_one_token_prompts_spread_over_16_ranks():
    batch = batch_of([1] * 20, cp=16)
    assert [plan.num_rows for plan in batch.plans()] == [2] * 4 + [1] * 12
    alone = batch_of([1], cp=16).plans()
    assert [plan.num_rows for plan in alone] == [1] + [0] * 15
    assert [plan.num_attention_calls for plan in alone] == [1] + [0] * 15
    assert alone[15].padded_rows == 1
    assert alone[15].slots.shape == (32, 1)
    assert alone[15].split(torch.ones(1, 3)).shape == (0, 3)


def test_a_million_tokens_on_16_ranks():
    length = 1_000_003
    batch = batch_of([length], cp=16)
    first, last = batch.plan(0), batch.plan(15)
    assert (first.padded_rows, first.num_rows, last.num_rows) == (62501, 62501, 62500)
    assert first.inverse.shape == (length,)
    assert first.slots.shape == (2 * 16 * 62501, 1)
    assert first.num_attention_calls == 2
    assert last.num_attention_calls == 1
    assert int(first.inverse.max()) < 16 * 62501


def test_to_moves_what_layers_read_and_nothing_else():
    plan = batch_of([13, 9], [0, 5], cp=2).plan()
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    tables = [call.block_table for call in moved.calls]
    assert {t.device.type for t in (moved.positions, moved.slots, *tables)} == {"meta"}
    for host in ("local_indices", "inverse", "last_tokens"):
        assert torch.equal(getattr(moved, host), getattr(plan, host))
    assert [(c.start, c.stop, c.query_ends, c.kv_lengths) for c in moved.calls] == [
        (c.start, c.stop, c.query_ends, c.kv_lengths) for c in plan.calls
    ]
    assert moved.digest == plan.digest


# Chunks and prefixes


@given(st.integers(1, 16), st.data())
def test_any_chunks_fill_the_same_slots(cp, data):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
    whole = batch_of(lengths, cp=cp)

    def filled(batch: Batch) -> dict[tuple[int, int], int]:
        """The slot of each (sequence, position) that a forward writes."""
        plan = batch.plan(data.draw(st.integers(0, cp - 1)))
        keys = plan.slots.reshape(-1, 2, plan.padded_rows)[:, 0].flatten()[plan.inverse].tolist()
        places = [(s, batch.cached[s] + i) for s, i in batch.tokens()]
        return dict(zip(places, keys, strict=True))

    done = [0] * len(lengths)
    chunks: dict[tuple[int, int], int] = {}
    while done != lengths:
        going = [s for s in range(len(lengths)) if done[s] < lengths[s]]
        sizes = [data.draw(st.integers(1, lengths[s] - done[s])) for s in going]
        chunk = Batch(
            sizes,
            [done[s] for s in going],
            [whole.tables[s] for s in going],
            whole.num_pages,
            cp,
            data.draw(st.sampled_from([PREFILL, DECODE])),
        )
        for (place, position), slot in filled(chunk).items():
            assert (going[place], position) not in chunks
            chunks[going[place], position] = slot
        for s, size in zip(going, sizes, strict=True):
            done[s] += size
    assert chunks == filled(whole)


# Digest


@given(batches())
def test_digest_is_the_same_on_every_rank(batch):
    digests = {plan.digest for plan in batch.plans()}
    assert len(digests) == 1
    assert len(digests.pop()) == 16


@given(batches(), st.data())
def test_digest_tells_plans_apart(batch, data):
    which = data.draw(st.integers(0, len(batch.new) - 1))

    def bumped(values: list[int], by: int) -> list[int]:
        return [v + by if i == which else v for i, v in enumerate(values)]

    spare = batch.num_pages
    tables = [[*table, spare + i] for i, table in enumerate(batch.tables)]
    batch = replace(batch, tables=tables, num_pages=spare + len(tables) + 1)
    page = data.draw(st.integers(0, len(tables[which]) - 1))
    other_page = [
        [batch.num_pages - 1 if (i, j) == (which, page) else p for j, p in enumerate(table)]
        for i, table in enumerate(tables)
    ]
    others = [
        replace(batch, new=bumped(batch.new, 1)),
        replace(batch, cached=bumped(batch.cached, 1)),
        replace(batch, new=bumped(batch.new, 1), cached=bumped(batch.cached, -1)),
        replace(batch, tables=other_page),
        replace(batch, num_pages=batch.num_pages + 1),
        replace(batch, cp=batch.cp + 1),
        replace(batch, phase=DECODE if batch.phase is PREFILL else PREFILL),
    ]
    digests = [other.plan().digest for other in [batch, *others] if min(other.cached) >= 0]
    assert len(set(digests)) == len(digests)


# Bad arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new": [], "cached": [], "tables": []}, "empty batch"),
        ({"new": [5, 0]}, "sequence 1 has no new tokens"),
        ({"new": [-1, 4]}, "sequence 0 has no new tokens"),
        ({"cached": [0, -1]}, "sequence 1 has a negative cached length"),
        ({"new": [5]}, "1 new lengths, 2 cached lengths and 2 block tables"),
        ({"cached": [0]}, "2 new lengths, 1 cached lengths and 2 block tables"),
        ({"tables": [[1]]}, "2 new lengths, 2 cached lengths and 1 block tables"),
        ({"tables": [[1], []]}, "sequence 1 has 0 pages, but 5 tokens need 1"),
        ({"cached": [0, 124]}, "sequence 1 has 1 pages, but 129 tokens need 2"),
        ({"tables": [[1], [0]]}, "page 0"),
        ({"tables": [[1], [3]]}, "page 3"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    batch = Batch([5, 5], [0, 0], [[1], [2]], 3)
    assert batch.plan().num_rows == 10
    with pytest.raises(InputError, match=message):
        replace(batch, **change).plan()


@pytest.mark.parametrize("rank", [-1, 2])
@pytest.mark.parametrize("phase", [PREFILL, DECODE])
def test_a_rank_outside_the_group_is_refused(rank, phase):
    with pytest.raises(InputError, match=f"cp_rank={rank}"):
        batch_of([5], cp=2, phase=phase).plan(rank)

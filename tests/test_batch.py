"""Padded batches read as flat tokens, and the paged cache behind transformers' Cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Cache
from transformers.modeling_utils import slice_logits_to_keep

from qwen3cp import ForwardPhase, PagedKVCache
from qwen3cp.batch import PaddedBatch, device_ids, host_ids
from qwen3cp.errors import InputError, KVCacheFullError
from qwen3cp.kv_cache import PagedCacheAdapter, Sequence

PREFILL, DECODE = ForwardPhase.PREFILL, ForwardPhase.DECODE
VOCABULARY = 1000
PAGE = 128


def new_adapter(num_pages: int = 12, *, grow: bool = False) -> PagedCacheAdapter:
    cache = PagedKVCache(num_layers=1, num_pages=num_pages, kv_width=1, dtype=torch.float64)
    return PagedCacheAdapter(cache, grow=grow)


def read(
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    past: PagedCacheAdapter | None = None,
    *,
    positions: torch.Tensor | None = None,
    phase: ForwardPhase = PREFILL,
) -> PaddedBatch:
    past = new_adapter() if past is None else past
    return PaddedBatch.read(ids, mask, positions, past, phase, VOCABULARY)


def run(past: PagedCacheAdapter, batch: PaddedBatch) -> None:
    """What a forward leaves behind: each token's id as its key, and the columns counted."""
    rows = past.rows(len(batch.token_of_cell))
    sequences = [rows[row] for row in batch.rows]
    past.ensure_room(sequences, batch.lengths)
    past.paged.reserve(sequences, batch.lengths)
    first = 0
    for sequence, length in zip(sequences, batch.lengths, strict=True):
        for i in range(length):
            page = sequence.pages[(sequence.length + i) // PAGE]
            past.paged.layer(0).key[page, (sequence.length + i) % PAGE] = batch.ids[first + i]
        first += length
    past.paged.commit(sequences, batch.lengths)
    past.advance(rows, batch.token_of_cell.shape[1], batch.closed)


def held(past: PagedCacheAdapter) -> list[list[int]]:
    """The ids in each row's pages."""
    return [past.paged.read(s, 0)[0].flatten().int().tolist() for s in past.sequences]


def filled(lengths: list[int], num_pages: int = 12, *, grow: bool = False) -> PagedCacheAdapter:
    """A batch of rows of such lengths, padded on the left, already run."""
    columns = max(lengths)
    mask = torch.tensor([[0] * (columns - n) + [1] * n for n in lengths])
    ids = torch.arange(columns * len(lengths)).view(len(lengths), columns) % VOCABULARY
    past = new_adapter(num_pages, grow=grow)
    run(past, read(ids, mask, past))
    return past


@dataclass(frozen=True)
class Padded:
    """A batch and, for each row, what of it is padding."""

    ids: torch.Tensor
    left: list[int]
    right: list[int]

    @property
    def mask(self) -> torch.Tensor:
        batch_size, columns = self.ids.shape
        mask = torch.zeros(batch_size, columns, dtype=torch.int64)
        for row in range(batch_size):
            mask[row, self.left[row] : columns - self.right[row]] = 1
        return mask

    def tokens(self) -> list[list[int]]:
        columns = self.ids.shape[1]
        return [
            row[left : columns - right]
            for row, left, right in zip(self.ids.tolist(), self.left, self.right, strict=True)
        ]


@st.composite
def padded_batches(draw: st.DrawFn, *, right: bool = False, full_row: bool = False) -> Padded:
    """Batches with padding on the left (and right); with `full_row` row 0 has none on its left."""
    batch_size, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    lefts, rights = [], []
    for row in range(batch_size):
        lefts.append(0 if full_row and row == 0 else draw(st.integers(0, columns - 1)))
        rights.append(draw(st.integers(0, columns - 1 - lefts[-1])) if right else 0)
    cells = batch_size * columns
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=cells, max_size=cells))
    return Padded(torch.tensor(ids).view(batch_size, columns), lefts, rights)


# Reading


@given(padded_batches(right=True), st.sampled_from([torch.int64, torch.int32]), st.booleans())
def test_a_batch_is_read_as_its_tokens_row_by_row(padded, dtype, float_mask):
    mask = padded.mask.float() if float_mask else padded.mask.to(dtype)
    batch = read(padded.ids.to(dtype), mask)
    tokens = padded.tokens()
    assert batch.ids.dtype == torch.int64
    assert batch.ids.tolist() == [token for row in tokens for token in row]
    assert batch.rows == list(range(len(tokens)))
    assert batch.lengths == [len(row) for row in tokens]
    assert batch.closed == {row for row, padding in enumerate(padded.right) if padding}
    number = 0
    for cells, reals in zip(batch.token_of_cell.tolist(), padded.mask.tolist(), strict=True):
        for cell, real in zip(cells, reals, strict=True):
            assert cell == (number if real else -1)
            number += real


@given(padded_batches(full_row=True), st.data())
def test_chunks_leave_the_same_tokens_in_the_cache(padded, data):
    past = new_adapter()
    past.allow_empty_rows = True
    columns = padded.ids.shape[1]
    edges = [0, *sorted(data.draw(st.sets(st.integers(1, columns), max_size=columns))), columns]
    for start, stop in zip(edges, edges[1:], strict=False):
        if stop > start:
            assert past.get_seq_length() == start
            run(past, read(padded.ids[:, start:stop], padded.mask[:, :stop], past))
    assert held(past) == padded.tokens()
    assert past.get_seq_length() == columns


@given(padded_batches(), st.integers(1, 4))
def test_a_batch_goes_on_after_left_padding(padded, columns):
    past = new_adapter()
    run(past, read(padded.ids, padded.mask, past))
    more = torch.arange(len(padded.ids) * columns).view(-1, columns)
    grown = torch.cat((padded.mask, torch.ones_like(more)), 1)
    for mask in (None, grown):
        for phase in ForwardPhase:
            batch = read(more, mask, past, phase=phase)
            assert batch.ids.tolist() == more.flatten().tolist()
            assert batch.lengths == [columns] * len(more)
            assert torch.equal(batch.token_of_cell, more)
            assert batch.closed == set()
    run(past, read(more, grown, past))
    assert held(past) == [a + b for a, b in zip(padded.tokens(), more.tolist(), strict=True)]


def test_nothing_follows_padding_on_the_right():
    past = new_adapter()
    run(
        past, read(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), past)
    )
    assert held(past) == [[1, 2, 3], [4, 5]]
    for phase in ForwardPhase:
        for mask in (None, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])):
            with pytest.raises(InputError, match=r"rows \[1\] ended with padding"):
                read(torch.tensor([[7], [8]]), mask, past, phase=phase)
    with pytest.raises(InputError, match="cannot be cropped"):
        past.crop(-1)
    past.batch_select_indices(torch.tensor([0, 0]))
    assert read(torch.tensor([[7], [8]]), None, past).ids.tolist() == [7, 8]


@pytest.mark.parametrize("phase", list(ForwardPhase))
def test_a_chunk_of_padding_alone_ends_a_row_too(phase):
    past = new_adapter()
    past.allow_empty_rows = True
    run(past, read(torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2), past))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    run(past, read(torch.tensor([[5], [0]]), mask, past))
    assert held(past) == [[1, 2, 5], [3, 4]]
    with pytest.raises(InputError, match=r"rows \[1\] ended with padding"):
        read(torch.tensor([[6], [7]]), None, past, phase=phase)


def test_rows_without_tokens_are_for_chunks_alone():
    ids, mask = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 1], [0, 0]])
    past = new_adapter()
    with pytest.raises(InputError, match=r"rows \[1\] have no tokens"):
        read(ids, mask, past)
    past.allow_empty_rows = True
    batch = read(ids, mask, past)
    assert (batch.rows, batch.lengths, batch.closed) == ([0], [2], set())
    with pytest.raises(InputError, match=r"rows \[0, 1\] have no tokens"):
        read(ids, torch.zeros(2, 2), past)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
ONES = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, "input_ids must be a tensor"),
        (torch.tensor([1, 2]), None, "of shape \\[batch, columns\\]"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "input_ids is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), None, "input_ids is empty"),
        (IDS.float(), None, "must be int64 or int32, got torch.float32"),
        (IDS.bool(), None, "must be int64 or int32, got torch.bool"),
        (IDS * 250, None, f"the id 1500, outside the vocabulary 0..{VOCABULARY - 1}"),
        (IDS - 2, None, "the id -1, outside the vocabulary"),
        (IDS, ONES[:, :2], r"shape \(2, 2\), expected \(2, 3\)"),
        (IDS, ONES[:1], r"shape \(1, 3\), expected \(2, 3\)"),
        (IDS, ONES[:, None, None], r"shape \(2, 1, 1, 3\), expected"),
        (IDS, ONES * 2, "only 0 .* and 1"),
        (IDS, ONES * 0.5, "only 0 .* and 1"),
        (IDS, ONES * float("nan"), "only 0 .* and 1"),
        (IDS, torch.tensor([[1, 1, 1], [1, 0, 1]]), r"rows \[1\] have padding between"),
        (IDS, torch.tensor([[0, 0, 0], [0, 1, 1]]), r"rows \[0\] have no tokens"),
    ],
)
def test_bad_batches_are_refused(ids, mask, message):
    with pytest.raises(InputError, match=message):
        read(ids, mask)


def test_ids_of_padding_are_not_looked_at():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert read(torch.tensor([[-100, 2, 3], [4, 5, 6]]), mask).ids.tolist() == [2, 3, 4, 5, 6]


def test_a_mask_agrees_with_what_is_cached():
    past = filled([3, 2])
    new = torch.tensor([[7], [8]])
    with pytest.raises(InputError, match=r"counts \[3, 3\] cached tokens .* holds \[3, 2\]"):
        read(new, torch.ones(2, 4), past)
    with pytest.raises(InputError, match=r"shape \(2, 1\), expected \(2, 4\)"):
        read(new, torch.ones(2, 1), past)
    with pytest.raises(InputError, match=r"shape \(2, 1\), expected \(2, 4\)"):
        read(new, torch.ones(2, 1), past, phase=DECODE)


def test_decode_takes_cells_as_tokens():
    past = filled([3, 2])
    for ids, message in (
        (torch.tensor([[1], [VOCABULARY]]), "outside the vocabulary"),
        (torch.tensor([[1.0], [2.0]]), "must be int64"),
    ):
        with pytest.raises(InputError, match=message):
            read(ids, None, past, phase=DECODE)
    with pytest.raises(InputError, match="position_ids is not taken in DECODE"):
        read(torch.tensor([[1], [2]]), positions=torch.tensor([[3], [2]]), past=past, phase=DECODE)


@pytest.mark.parametrize("phase", list(ForwardPhase))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_has_as_many_rows_as_the_cache(phase, batch_size):
    past = filled([3, 2])
    ids = torch.ones(batch_size, 1, dtype=torch.int64)
    positions = ids if phase is PREFILL else None
    with pytest.raises(InputError):
        past.rows(len(read(ids, None, past, positions=positions, phase=phase).token_of_cell))
    with pytest.raises(InputError):
        mask = torch.ones(batch_size, 4)
        past.rows(len(read(ids, mask, past, phase=phase).token_of_cell))


@given(padded_batches(), st.data())
def test_position_ids_number_tokens_or_columns(padded, data):
    """Read in two steps; a wrong number of a token is refused, of padding is not seen."""
    columns = padded.ids.shape[1]
    start = data.draw(st.integers(0, columns - 1))
    left = [min(n, start) for n in padded.left]  # so that no row is empty in the second step
    padded = Padded(padded.ids, left, padded.right)
    past = new_adapter()
    past.allow_empty_rows = True
    if start:
        head_mask = padded.mask[:, :start]
        if not head_mask.any():
            return
        run(past, read(padded.ids[:, :start], head_mask, past))
    from_zero = [[column - n for column in range(columns)] for n in left]
    by_column = [list(range(columns))] * len(left)
    mask = padded.mask
    for rows in (from_zero, by_column):
        positions = torch.tensor(rows)[:, start:]
        expected = read(padded.ids[:, start:], mask, past).ids
        for given_mask in (mask, None) if start else (mask,):
            batch = read(padded.ids[:, start:], given_mask, past, positions=positions)
            assert torch.equal(batch.ids, expected)
        row = data.draw(st.integers(0, len(left) - 1))
        column = data.draw(st.integers(0, columns - start - 1))
        changed = positions.clone()
        changed[row, column] = 77
        if mask[row, start + column]:
            with pytest.raises(InputError, match="must number each row's tokens from 0"):
                read(padded.ids[:, start:], mask, past, positions=changed)
        else:
            read(padded.ids[:, start:], mask, past, positions=changed)


def test_position_ids_of_one_row_hold_for_all():
    assert read(IDS, positions=torch.tensor([[0, 1, 2]])).ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert read(IDS, positions=torch.tensor([0, 1, 2])).ids.tolist() == [1, 2, 3, 4, 5, 6]
    for positions, message in (
        (torch.tensor([[0, 1]]), r"shape \(1, 2\), expected \(2, 3\)"),
        (torch.zeros(3, 3), r"shape \(3, 3\), expected \(2, 3\)"),
        (torch.tensor([[1, 2, 3]]), "from 0"),
        (torch.tensor([[0, 0, 0]]), "from 0"),
        (torch.tensor([[0, 1, 2], [0, 1, 3]]), "from 0"),
        (torch.tensor([[2, 1, 0]]), "from 0"),
    ):
        with pytest.raises(InputError, match=message):
            read(IDS, positions=positions)


# Logits that are asked for


def dense_and_batch(padded: Padded) -> tuple[torch.Tensor, PaddedBatch]:
    """[B, S, 2] with zeros for padding, and its token rows [T, 2] as a batch knows them."""
    numbers = torch.arange(1, padded.ids.numel() + 1).view(padded.ids.shape)
    dense = (numbers * padded.mask)[..., None] * torch.tensor([1, 100])
    return dense, read(padded.ids, padded.mask)


def kept(dense: torch.Tensor, batch: PaddedBatch, logits_to_keep: Any) -> torch.Tensor:
    """Only the wanted tokens' rows, put back into their cells."""
    rows = dense[dense[..., 0] > 0]
    cells = batch.cells_to_keep(logits_to_keep)
    return batch.pad(rows[cells[cells >= 0]], cells)


@given(padded_batches(right=True), st.integers(0, 12))
def test_the_last_columns_are_transformers(padded, count):
    dense, batch = dense_and_batch(padded)
    assert torch.equal(kept(dense, batch, count), slice_logits_to_keep(dense, count))


@given(padded_batches(right=True), st.data())
def test_chosen_columns_are_transformers(padded, data):
    dense, batch = dense_and_batch(padded)
    columns = dense.shape[1]
    for low in (0, -columns):
        index = data.draw(st.lists(st.integers(low, columns - 1), max_size=6))
        for dtype in (torch.int64, torch.int32):
            chosen = torch.tensor(index, dtype=dtype)
            expected = slice_logits_to_keep(dense, chosen.long())
            assert torch.equal(kept(dense, batch, chosen), expected)


@given(padded_batches(right=True), st.data())
def test_columns_chosen_by_row_are_transformers(padded, data):
    dense, batch = dense_and_batch(padded)
    batch_size, columns = dense.shape[:2]
    width = data.draw(st.integers(1, 5))
    row = st.lists(st.integers(0, columns - 1), min_size=width, max_size=width)
    chosen = torch.tensor(data.draw(st.lists(row, min_size=batch_size, max_size=batch_size)))
    assert torch.equal(kept(dense, batch, chosen), slice_logits_to_keep(dense, chosen))


@pytest.mark.parametrize(
    ("logits_to_keep", "message"),
    [
        (-1, "must not be negative"),
        (torch.tensor(1), "of 1 or 2 axes"),
        (torch.ones(2, 3, dtype=torch.bool), "integer tensor"),
        (torch.tensor([0.0, 1.0]), "integer tensor"),
        (torch.zeros(2, 1, 1, dtype=torch.int64), "of 1 or 2 axes"),
        (torch.zeros(3, 1, dtype=torch.int64), "3 rows"),
        (torch.tensor([3]), "outside the 3 new columns"),
        (torch.tensor([[0], [-4]]), "outside the 3 new columns"),
    ],
)
def test_bad_logits_to_keep_is_refused(logits_to_keep, message):
    with pytest.raises(InputError, match=message):
        read(IDS).cells_to_keep(logits_to_keep)


def test_pad_keeps_dtype_and_trailing_axes():
    batch = read(IDS, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    rows = torch.arange(5 * 4, dtype=torch.bfloat16).view(5, 2, 2)
    out = batch.pad(rows, batch.token_of_cell)
    assert (out.shape, out.dtype) == ((2, 3, 2, 2), torch.bfloat16)
    assert not out[0, 0].any()
    assert torch.equal(out[0, 1:], rows[:2])
    assert torch.equal(out[1], rows[2:])


# Flat ids


@pytest.mark.parametrize(
    "ids", [[1, 2], (1, 2), torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)]
)
def test_host_ids_takes_lists_and_tensors(ids):
    out = host_ids(ids, "prompt 0", VOCABULARY)
    assert out.dtype == torch.int64
    assert out.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt 0 is empty"),
        ([[1]], r"one axis, got the shape \(1, 1\)"),
        (5, "one axis"),
        ([1.5], "must be int64 or int32"),
        ([True], "must be int64 or int32"),
        ("text", "cannot be read"),
        (None, "cannot be read"),
        ([1, VOCABULARY], f"the id {VOCABULARY}, outside"),
        ([-1], "the id -1, outside"),
        ([2**80], "cannot be read"),
    ],
)
def test_host_ids_refuses(ids, message):
    with pytest.raises(InputError, match=message):
        host_ids(ids, "prompt 0", VOCABULARY)


def test_device_ids_checks_form_alone():
    assert device_ids(torch.tensor([5, 10**6], dtype=torch.int32), "ids").dtype == torch.int64
    for ids in (torch.tensor([[1]]), torch.tensor(1), torch.tensor([1.0])):
        with pytest.raises(InputError, match="ids must"):
            device_ids(ids, "ids")


# The adapter


def test_the_adapter_is_a_cache_of_columns():
    past = filled([3, 5, 1])
    assert isinstance(past, Cache)
    assert past.get_seq_length() == past.get_seq_length(7) == 5
    assert past.get_mask_sizes(2) == (7, 0)
    assert past.get_max_length() == -1
    assert len(past) == 1
    assert [s.length for s in past.sequences] == [3, 5, 1]
    with pytest.raises(InputError, match="only qwen3cp's layers"):
        past.update(torch.zeros(1), torch.zeros(1), 0)


def test_rows_are_kept_once_a_forward_has_succeeded():
    past = new_adapter()
    rows = past.rows(2)
    assert past.sequences == []
    past.advance(rows, 3, set())
    assert past.rows(2) is rows
    with pytest.raises(InputError, match="holds 2 rows, the batch has 3"):
        past.rows(3)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.integers(0, 320))
def test_crop_drops_columns_and_pages(lengths, count):
    past = filled(lengths)
    before = held(past)
    past.crop(-count)
    assert past.get_seq_length() == max(0, max(lengths) - count)
    left = [max(0, n - count) for n in lengths]
    assert held(past) == [row[:n] for row, n in zip(before, left, strict=True)]
    used = sum(-(-n // PAGE) for n in left)
    assert past.paged.num_free_pages == past.paged.num_pages - 1 - used


def test_crop_takes_what_to_remove_as_transformers_does():
    past = filled([3])
    with pytest.raises(InputError, match="pass the negative number"):
        past.crop(1)
    assert past.get_seq_length() == 3


@given(st.lists(st.integers(1, 300), min_size=1, max_size=3), st.data())
def test_selected_rows_hold_the_old_rows_tokens(lengths, data):
    past = filled(lengths, num_pages=20)
    before, sequences = held(past), past.sequences
    index = st.integers(0, len(lengths) - 1)
    chosen = data.draw(st.lists(index, min_size=1, max_size=5))
    past.reorder_cache(torch.tensor(chosen))
    assert held(past) == [before[row] for row in chosen]
    assert past.get_seq_length() == max(lengths)
    assert len(set(past.sequences)) == len(chosen)
    for row, sequence in enumerate(sequences):
        if row in chosen:
            assert sequence in past.sequences
        else:
            with pytest.raises(InputError, match="was freed"):
                past.paged.check([sequence])
    columns = torch.arange(len(chosen))[:, None]
    run(past, read(columns, None, past))
    assert held(past) == [[*before[row], place] for place, row in enumerate(chosen)]
    past.reset()
    assert past.paged.num_free_pages == past.paged.num_pages - 1


@given(st.integers(1, 260), st.integers(1, 4), st.data())
def test_reordered_beams_need_no_more_pages(length, beams, data):
    """Beams of one prompt have one length; here their pages fill the pool."""
    pages = -(-length // PAGE)
    past = filled([length] * beams, num_pages=1 + beams * pages)
    assert past.paged.num_free_pages == 0
    for _ in range(3):
        before = held(past)
        index = st.integers(0, beams - 1)
        chosen = data.draw(st.lists(index, min_size=beams, max_size=beams))
        past.reorder_cache(torch.tensor(chosen))
        assert held(past) == [before[row] for row in chosen]


def test_closed_rows_move_with_their_tokens():
    past = new_adapter()
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    run(past, read(ids, torch.tensor([[1, 1], [1, 0], [1, 0]]), past))
    past.batch_select_indices(torch.tensor([2, 0, 1, 1]))
    assert past.closed_rows == {0, 2, 3}
    past.batch_select_indices(torch.tensor([1]))
    assert past.closed_rows == set()


def test_batch_repeat_interleave():
    past = filled([2, 3])
    before = held(past)
    past.batch_repeat_interleave(2)
    assert held(past) == [before[0], before[0], before[1], before[1]]


def test_a_selection_that_does_not_fit_changes_nothing():
    past = filled([100, 130], num_pages=5)
    before, sequences = held(past), list(past.sequences)
    with pytest.raises(KVCacheFullError):
        past.batch_select_indices(torch.tensor([1, 1, 1, 1]))
    assert past.sequences == sequences
    assert held(past) == before
    assert past.paged.num_free_pages == 1
    past.batch_select_indices(torch.tensor([1, 1, 1]))  # row 0's page is one of the two copies
    assert past.paged.num_free_pages == 0
    assert held(past) == [before[1]] * 3


@pytest.mark.parametrize("index", [-1, 2])
def test_a_selection_of_no_row_changes_nothing(index):
    past = filled([3, 2])
    before = held(past)
    with pytest.raises(InputError, match=f"row {index} of 2"):
        past.batch_select_indices(torch.tensor([1, index]))
    assert held(past) == before


def test_a_growing_adapter_makes_room():
    past = filled([100, 130], num_pages=2, grow=True)
    before = held(past)
    past.batch_repeat_interleave(20)
    assert held(past) == [before[0]] * 20 + [before[1]] * 20
    batch = read(torch.ones(40, 500, dtype=torch.int64), None, past)
    run(past, batch)
    assert [s.length for s in past.sequences] == [600] * 20 + [630] * 20


def test_an_adapter_that_may_not_grow_is_full():
    past = new_adapter(num_pages=3)
    ids = torch.ones(1, 300, dtype=torch.int64)
    with pytest.raises(KVCacheFullError):
        run(past, read(ids, None, past))
    assert past.get_seq_length() == 0
    assert past.sequences == []
    assert past.paged.num_free_pages == 2


def test_reset_gives_all_pages_back():
    past = filled([100, 200])
    sequences: list[Sequence] = past.sequences
    past.closed_rows = {1}
    past.reset()
    assert past.get_seq_length() == 0
    assert past.sequences == []
    assert past.closed_rows == set()
    assert past.paged.num_free_pages == past.paged.num_pages - 1
    assert sequences[0].length == 0
    run(past, read(torch.tensor([[1, 2]]), None, past))
    assert held(past) == [[1, 2]]

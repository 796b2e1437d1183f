"""The plan of one forward: which rank runs which tokens, and where keys and values go.

A pure function of host integers: lengths, page tables, cp_rank, cp_size. No torch.distributed, no
device; the plan of every rank can be built and checked in one process.

PREFILL cuts the new tokens of each sequence into n = 2 * cp_size blocks; the first `length % n`
are one token longer. Pair j is block j (early) and block n-1-j (late): together they do the same
causal work for every j. Pair j goes to rank (j + rotation) % cp_size, and the rotation of each
sequence starts its longer pairs where those of the sequence before ended, so that the row totals
of any two ranks differ by at most one. A rank's rows are all its early blocks, in the order of the
sequences, then all its late blocks.

Example: 13 new tokens on 2 ranks are blocks of 4, 3, 3, 3. Rank 0 runs tokens 0-3 and 10-12, which
see 4 and 13 keys; rank 1 runs tokens 4-6 and 7-9 as one block of 6, which sees 10 keys.

Letters: T new tokens of the batch, R padded rows of a rank, C ranks, V virtual sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qwen3cp import collectives
from qwen3cp.errors import InputError
from qwen3cp.parallel import ForwardPhase, ParallelContext

__all__ = ["AttentionCall", "ForwardPlan", "zigzag_blocks"]

MAX_CALL_ROWS = 4096
"""Sequences that the fused attention operator takes in one TND call (CANN 8.5)."""

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention call over virtual sequences: runs of rows that see one run of keys."""

    start: int
    """First row of the call in the rank's rows."""
    stop: int
    query_ends: list[int]
    """Cumulative query lengths, no leading 0; the last is stop - start."""
    kv_lengths: list[int]
    """Visible keys of each virtual sequence: cached tokens + end of its block. Not cumulative."""
    block_table: torch.Tensor
    """int32 [V, pages]: the pages of each virtual sequence, padded with page 0. At least two
    columns: compilers take a size of 1 for a constant."""


@dataclass(frozen=True, kw_only=True)
class ForwardPlan:
    """What every layer needs to know of one forward. Made once, read by all layers."""

    phase: ForwardPhase
    cp_rank: int
    cp_size: int
    new_lengths: tuple[int, ...]
    cached_lengths: tuple[int, ...]
    num_rows: int
    """Rows of this rank."""
    padded_rows: int
    """R, the rows of the rank that has most: the size of every rank's part in a gather."""
    calls: tuple[AttentionCall, ...]
    """This rank's attention calls, in the order of its rows; none if it has no rows."""
    local_indices: torch.Tensor
    """int64 [num_rows], on the host: which of the T new tokens each row is."""
    positions: torch.Tensor
    """int64 [num_rows]: position of each row in its sequence."""
    slots: torch.Tensor
    """int64 [C * 2 * R, 1]: where each gathered row goes in a layer's [2 * num_slots, kv_width]
    storage. The gathered rows of a rank are its R keys, then its R values. Padding rows go to
    slots of their own in page 0."""
    inverse: torch.Tensor
    """int64 [T], on the host: the row of each new token in the gathered [C * R] rows."""
    digest: bytes
    """16 bytes that are equal on two ranks only if they plan the same forward."""

    @classmethod
    def build(
        cls,
        new_lengths: Seq[int],
        *,
        cached_lengths: Seq[int],
        block_tables: Seq[Seq[int]],
        num_pages: int,
        page_size: int = 128,
        phase: ForwardPhase,
        cp_rank: int = 0,
        cp_size: int = 1,
    ) -> ForwardPlan:
        """Plans one forward. Pure; the same arguments on all ranks but for `cp_rank`.

        Args:
            new_lengths: new tokens of each sequence, at least 1.
            cached_lengths: tokens of each sequence that are in the cache already.
            block_tables: page numbers of each sequence, in order, enough for all its tokens.
            num_pages: pages of the cache, page 0 (which no sequence owns) included.
            page_size: tokens of a page.

        Raises:
            InputError: no sequence, a length below 1, a table that is too short, a page that no
                sequence can own, a rank outside the group.
        """
        if not 0 <= cp_rank < cp_size:
            raise InputError(f"cp_rank={cp_rank} is not in 0..{cp_size - 1}")
        new, cached = np.asarray(new_lengths, np.int64), np.asarray(cached_lengths, np.int64)
        _check_lengths(new, cached, block_tables, page_size)
        # In DECODE every rank runs all rows, which is the plan of a single rank.
        num_ranks, rank = (cp_size, cp_rank) if phase is ForwardPhase.PREFILL else (1, 0)

        starts, lengths = zigzag_blocks(new, num_ranks)  # [C, 2, sequences]
        padded = int(lengths.sum((1, 2)).max())
        first_token = np.cumsum(new) - new
        token_of_row = _token_of_gathered_row(starts + first_token, lengths, padded)  # [C, R]
        inverse = np.empty(int(new.sum()), np.int64)
        real = token_of_row >= 0
        inverse[token_of_row[real]] = np.flatnonzero(real)

        position = _ranges(cached, new)  # [T]
        table, first_page = _concatenate(block_tables)
        page = table[np.repeat(first_page, new) + position // page_size]
        if page.min() < 1 or page.max() >= num_pages:
            raise InputError(
                f"new tokens go to page {page.min() if page.min() < 1 else page.max()}, outside "
                f"the pages of sequences, 1..{num_pages - 1}"
            )
        slot = page * page_size + position % page_size  # [T]
        row_slot = np.empty(token_of_row.shape, np.int64)
        row_slot[real] = slot[token_of_row[real]]
        num_padding = np.count_nonzero(~real)
        assert num_padding < page_size, "row totals differ by more than one"
        row_slot[~real] = np.arange(num_padding)  # page 0
        slots = np.stack((row_slot, row_slot + num_pages * page_size), axis=1)  # [C, 2, R]

        local = token_of_row[rank][real[rank]]
        calls = _attention_calls(
            lengths[rank].ravel(),
            np.tile(cached, 2) + (starts[rank] + lengths[rank]).ravel(),
            [*block_tables, *block_tables],
            num_pages=num_pages,
            page_size=page_size,
        )
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{phase.value} {cp_size} {num_pages} {page_size}".encode())
        for array in (new, cached, first_page, table):
            digest.update(array.tobytes())
        return cls(
            phase=phase,
            cp_rank=cp_rank,
            cp_size=cp_size,
            new_lengths=tuple(new.tolist()),
            cached_lengths=tuple(cached.tolist()),
            num_rows=len(local),
            padded_rows=padded,
            calls=tuple(calls),
            local_indices=torch.from_numpy(local),
            positions=torch.from_numpy(position[local]),
            slots=torch.from_numpy(slots.reshape(-1, 1)),
            inverse=torch.from_numpy(inverse),
            digest=digest.digest(),
        )

    @property
    def num_attention_calls(self) -> int:
        """Attention calls of a layer on this rank: 1 when the pages that its virtual sequences
        count fit into the cache and they are at most 4096, 0 when it has no rows."""
        return len(self.calls)

    @property
    def is_split(self) -> bool:
        """Whether the rows are split over CP ranks."""
        return self.phase is ForwardPhase.PREFILL and self.cp_size > 1

    @property
    def last_tokens(self) -> torch.Tensor:
        """int64 [sequences], on the host: the last new token of each sequence, among all T."""
        return torch.from_numpy(np.cumsum(np.asarray(self.new_lengths)) - 1)

    def owners(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The CP rank that runs each of the new tokens (int64, on the host) and its row there.

        In DECODE, where every rank runs all tokens, the rank is 0.
        """
        gathered = self.inverse[tokens]
        return gathered // self.padded_rows, gathered % self.padded_rows

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows of [T, ...] rows that all ranks have: [num_rows, ...]."""
        return rows[self.local_indices.to(rows.device)] if self.is_split else rows

    def gather(self, rows: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
        """The inverse of `split`: [num_rows, ...] of every rank -> [T, ...] on every rank.

        Collective over cp_group in PREFILL: every rank must call it.
        """
        if not self.is_split:
            return rows
        padded = rows.new_zeros(self.padded_rows, *rows.shape[1:])
        padded[: self.num_rows] = rows
        return collectives.gather_rows(padded, ctx)[self.inverse.to(rows.device)]

    def to(self, device: torch.device | str) -> ForwardPlan:
        """The plan with what the layers read on a device; the other tensors stay on the host."""
        device = torch.device(device)
        if device.type == "cpu":
            return self
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            slots=self.slots.to(device, non_blocking=True),
            calls=tuple(
                replace(call, block_table=call.block_table.to(device, non_blocking=True))
                for call in self.calls
            ),
        )


def zigzag_blocks(new_lengths: Ints, num_ranks: int) -> tuple[Ints, Ints]:
    """Which block of each sequence each rank runs early and late: (starts, lengths).

    Both int64 [num_ranks, 2, sequences]; starts count from the first new token of the sequence.
    The pair in the middle, whose blocks touch, is one early block; its late block is empty.
    Blocks may be empty.
    """
    num_blocks = 2 * num_ranks
    size, longer = np.divmod(new_lengths, num_blocks)

    # The pairs with a token more than the others are a run of `longer % num_ranks`, from pair 0
    # on, or, when every pair has one already, up to the last pair.
    run = longer % num_ranks
    run_start = np.where(longer < num_ranks, 0, num_ranks - run)
    rotation = np.cumsum(run) - run - run_start
    pair = (np.arange(num_ranks)[:, None] - rotation) % num_ranks  # [C, sequences]

    block = np.stack((pair, num_blocks - 1 - pair), axis=1)  # [C, 2, sequences]
    starts = block * size + np.minimum(block, longer)
    lengths = size + (block < longer)
    middle = pair == num_ranks - 1
    lengths[:, 0] += np.where(middle, lengths[:, 1], 0)
    starts[:, 1] = np.where(middle, starts[:, 1] + lengths[:, 1], starts[:, 1])
    lengths[:, 1] = np.where(middle, 0, lengths[:, 1])
    return starts, lengths


def _token_of_gathered_row(starts: Ints, lengths: Ints, padded: int) -> Ints:
    """int64 [C, padded]: the token of each gathered row, -1 for padding."""
    out = np.full((len(starts), padded), -1, np.int64)
    for row, rank_starts, rank_lengths in zip(out, starts, lengths, strict=True):
        tokens = _ranges(rank_starts.ravel(), rank_lengths.ravel())
        row[: len(tokens)] = tokens
    return out


def _attention_calls(
    query_lengths: Ints,
    kv_lengths: Ints,
    block_tables: list[Seq[int]],
    *,
    num_pages: int,
    page_size: int,
) -> list[AttentionCall]:
    """Packs virtual sequences, in order, into as few calls as the operator's limits allow.

    The operator wants a cache of at least as many pages as its rows need in sum, and counts pages
    that two rows share twice. Early blocks alone fit, and late blocks alone fit, unless sequences
    share pages.
    """
    rows = np.flatnonzero(query_lengths)
    counted = -(-kv_lengths // page_size)
    chunks: list[list[int]] = []
    room = 0
    for row in rows.tolist():
        if not chunks or counted[row] > room or len(chunks[-1]) == MAX_CALL_ROWS:
            chunks.append([])
            room = num_pages
        chunks[-1].append(row)
        room -= int(counted[row])

    calls = []
    start = 0
    for chunk in chunks:
        ends = np.cumsum(query_lengths[chunk])
        table = np.zeros((len(chunk), max(2, int(counted[chunk].max()))), np.int32)
        for i, row in enumerate(chunk):
            table[i, : counted[row]] = block_tables[row][: counted[row]]
        calls.append(
            AttentionCall(
                start=start,
                stop=start + int(ends[-1]),
                query_ends=ends.tolist(),
                kv_lengths=kv_lengths[chunk].tolist(),
                block_table=torch.from_numpy(table),
            )
        )
        start += int(ends[-1])
    return calls


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """arange(start, start + length) of every pair, concatenated."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def _concatenate(tables: Seq[Seq[int]]) -> tuple[Ints, Ints]:
    """All tables in one array, and where each begins in it."""
    lengths = np.asarray([len(table) for table in tables], np.int64)
    return np.concatenate([np.asarray(t, np.int64) for t in tables]), np.cumsum(lengths) - lengths


def _check_lengths(new: Ints, cached: Ints, tables: Seq[Seq[int]], page_size: int) -> None:
    if len(new) == 0:
        raise InputError("a forward needs at least one sequence, got an empty batch")
    if not len(new) == len(cached) == len(tables):
        raise InputError(
            f"{len(new)} new lengths, {len(cached)} cached lengths and {len(tables)} block tables: "
            "there must be one of each per sequence"
        )
    if new.min() < 1:
        raise InputError(f"sequence {int(new.argmin())} has no new tokens; it needs at least one")
    if cached.min() < 0:
        raise InputError(f"sequence {int(cached.argmin())} has a negative cached length")
    needed = -(-(new + cached) // page_size)
    for i, table in enumerate(tables):
        if len(table) < needed[i]:
            raise InputError(
                f"sequence {i} has {len(table)} pages, but {int(new[i] + cached[i])} tokens need "
                f"{int(needed[i])}"
            )

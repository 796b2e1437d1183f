"""Which topologies can run a model, and which of their ranks do the same work."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformers import Qwen3MoeConfig

from qwen3cp.config import check_supported, local_experts, local_vocabulary
from qwen3cp.errors import InputError, ParallelConfigError
from qwen3cp.parallel import CommConfig, ForwardPhase, ParallelContext
from qwen3cp.plan import zigzag_blocks
from qwen3cp.planner.counter import visible_pairs

__all__ = ["Step", "Topology", "Workload", "expected_rows", "why_illegal"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward over a batch of sequences of one length."""

    phase: ForwardPhase
    start: int
    """Tokens of each sequence that are cached."""
    new_tokens: int
    """Of each sequence."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of prompts of one length, and a decode step after them.

    Raises:
        InputError: a number below 1.
    """

    prompt: int
    batch: int = 1
    chunk: int | None = None
    """Most new tokens of a sequence in one forward; None is the prompt."""
    new_tokens: int = 1
    """Tokens after the prompt that the cache has room for."""
    decode: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt", "batch", "chunk", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")

    @property
    def steps(self) -> list[Step]:
        chunk = min(self.chunk or self.prompt, self.prompt)
        steps = [
            Step(
                phase=ForwardPhase.PREFILL,
                start=start,
                new_tokens=min(chunk, self.prompt - start),
            )
            for start in range(0, self.prompt, chunk)
        ]
        if self.decode:
            steps.append(Step(phase=ForwardPhase.DECODE, start=self.prompt, new_tokens=1))
        return steps


@dataclass(frozen=True, kw_only=True)
class Topology:
    """cp_size x tp_size ranks, numbered cp_rank * tp_size + tp_rank, and how they communicate."""

    cp_size: int = 1
    tp_size: int = 1
    moe: Literal["tp", "ep"] = "tp"
    comm: CommConfig = CommConfig()

    @property
    def world_size(self) -> int:
        return self.cp_size * self.tp_size

    def rank(self, rank: int) -> ParallelContext:
        """A rank without groups. Raises ParallelConfigError for sizes that are none."""
        return ParallelContext(
            cp_rank=rank // self.tp_size if self.tp_size > 0 else 0,
            cp_size=self.cp_size,
            tp_rank=rank % self.tp_size if self.tp_size > 0 else 0,
            tp_size=self.tp_size,
            moe=self.moe,
            comm=self.comm,
            detached=True,
        )

    def experts(self, config: Qwen3MoeConfig) -> list[int]:
        """How many experts each rank has a part of."""
        if self.moe == "tp":
            return [config.num_experts] * self.world_size
        return [
            len(local_experts(config.num_experts, rank, self.world_size))
            for rank in range(self.world_size)
        ]

    def rows(self, step: Step, batch: int) -> list[int]:
        """The rows that each rank runs through attention; TP ranks have the same."""
        lengths = _blocks(step, batch, self.cp_size)[1]
        return np.repeat(lengths.sum((1, 2)), self.tp_size).tolist()

    def shares(self, step: Step, batch: int) -> list[int]:
        """The rows that each rank sends in an all_to_all exchange: TP ranks divide theirs."""
        shares = []
        for rank, rows in enumerate(self.rows(step, batch)):
            size = -(-rows // self.tp_size)
            shares.append(max(0, min(size, rows - rank % self.tp_size * size)))
        return shares

    def expected_rows(self, config: Qwen3MoeConfig, step: Step, batch: int) -> list[list[int]]:
        """The rows that each rank is expected to send to each in an all_to_all exchange."""
        shares = self.shares(step, batch)
        return expected_rows(shares, self.experts(config), config.num_experts_per_tok)

    def attention_pairs(self, step: Step, batch: int) -> list[int]:
        """(query, key) pairs of each rank and query head."""
        starts, lengths = _blocks(step, batch, self.cp_size)
        pairs = np.zeros(starts.shape, np.int64)
        for index, (start, length) in enumerate(zip(starts.flat, lengths.flat, strict=True)):
            first = step.start + int(start)
            pairs.flat[index] = visible_pairs(int(length), first + int(length), -int(length), first)
        return np.repeat(pairs.sum((1, 2)), self.tp_size).tolist()

    def alike(self, config: Qwen3MoeConfig, workload: Workload) -> list[tuple[int, ...]]:
        """The ranks, those that do the same work together.

        Two do if they run the same blocks of every sequence in every forward, hold as many experts
        and as many rows of the vocabulary, and are expected to exchange as many rows.
        """
        kinds: dict[tuple, list[int]] = defaultdict(list)
        prefills = {x.new_tokens: x for x in workload.steps if x.phase is ForwardPhase.PREFILL}
        blocks = [_blocks(step, workload.batch, self.cp_size) for step in prefills.values()]
        exchanged: list[np.ndarray] = []
        if self.moe == "ep" and self.world_size > 1:
            for step in prefills.values():
                matrix = np.array(self.expected_rows(config, step, workload.batch))
                exchanged.append(np.stack((matrix.sum(0), matrix.sum(1), matrix.diagonal()), 1))
        experts = self.experts(config)
        for rank in range(self.world_size):
            cp_rank, tp_rank = divmod(rank, self.tp_size)
            runs = tuple(
                (starts[cp_rank].tobytes(), lengths[cp_rank].tobytes())
                if lengths[cp_rank].any()
                else None
                for starts, lengths in blocks
            )
            vocabulary = len(local_vocabulary(config, self.rank(rank)))
            rows = tuple(of_ranks[rank].tobytes() for of_ranks in exchanged)
            has_bias = config.attention_bias and tp_rank == 0
            kinds[runs, experts[rank], vocabulary, rows, has_bias].append(rank)
        return [tuple(ranks) for ranks in kinds.values()]

    def busiest(self, config: Qwen3MoeConfig, workload: Workload) -> tuple[int, ...]:
        """Of `alike`, those that have most to do: pairs, then rows, experts and vocabulary."""
        pairs = np.zeros(self.world_size, np.int64)
        rows = np.zeros(self.world_size, np.int64)
        for step in workload.steps:
            pairs += self.attention_pairs(step, workload.batch)
            rows += self.rows(step, workload.batch)
        experts = self.experts(config)

        def work(ranks: Seq[int]) -> tuple[int, ...]:
            rank = ranks[0]
            vocabulary = len(local_vocabulary(config, self.rank(rank)))
            return int(pairs[rank]), int(rows[rank]), experts[rank], vocabulary

        return max(self.alike(config, workload), key=work)


def why_illegal(config: Qwen3MoeConfig, topology: Topology) -> str | None:
    """The limit that keeps a model from running on a topology, None if nothing does.

    Raises:
        UnsupportedConfigError: the model runs on none.
    """
    try:
        check_supported(config, topology.rank(0))
    except ParallelConfigError as error:
        return str(error)
    return None


def expected_rows(shares: Seq[int], experts_of_ranks: Seq[int], top_k: int) -> list[list[int]]:
    """Rows that each rank sends to each if every row goes once to each rank with one of its
    experts, which are drawn without repetition: [from][to].

    A rank with e of E experts gets a row with the probability 1 - C(E - e, k) / C(E, k). Rounded so
    that the sums of a rank are, too.
    """
    num_experts = sum(experts_of_ranks)
    draws = math.comb(num_experts, top_k)
    chances = [1 - math.comb(num_experts - e, top_k) / draws for e in experts_of_ranks]
    rows = []
    for rank, share in enumerate(shares):
        # from its own on, so that ranks that are alike send and get as many in sum
        ends = np.rint(share * np.cumsum(np.roll(chances, -rank)))
        rows.append(np.roll(np.diff(ends, prepend=0), rank).astype(int).tolist())
    return rows


def _blocks(step: Step, batch: int, cp_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`zigzag_blocks` of a step. In DECODE every CP rank runs all rows."""
    new = np.full(batch, step.new_tokens, np.int64)
    if step.phase is ForwardPhase.PREFILL:
        return zigzag_blocks(new, cp_size)
    starts, lengths = zigzag_blocks(new, 1)
    return np.repeat(starts, cp_size, 0), np.repeat(lengths, cp_size, 0)

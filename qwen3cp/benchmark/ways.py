"""What is measured: the ways to run a model, and the workloads that all of them run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

from transformers import Qwen3MoeConfig

from qwen3cp.config import check_supported, max_length_of
from qwen3cp.errors import InputError, ParallelConfigError
from qwen3cp.parallel import CommConfig, ParallelContext

__all__ = ["Settings", "Way", "Workload", "ways_of"]

Engine = Literal["qwen3cp", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a workload."""

    dtype: str
    engine: Engine = "qwen3cp"
    cp: int = 1
    tp: int = 1
    moe: Literal["tp", "ep"] = "tp"
    comm: CommConfig = field(default_factory=CommConfig)
    chunk_tokens: int = 0
    """Tokens of each sequence in one call of a prefill; 0 is all of them."""
    float32_scores: bool = False
    """Attention scores of the CPU kernel in float32, which is nothing new in float32."""
    copies: int = 1
    """Replicas that run it at the same time, each on ranks of its own. More than one only where a
    copy has one rank."""

    @property
    def num_ranks(self) -> int:
        """Of one copy."""
        return self.cp * self.tp

    @property
    def name(self) -> str:
        """What tells it from the other ways of a run."""
        if self.engine == "transformers":
            return f"transformers {self.dtype}"
        comm = self.comm
        parts = [
            f"cp={self.cp} tp={self.tp} {self.dtype}",
            f"moe={self.moe}" * (self.moe != "tp"),
            f"int8={comm.all_reduce.removeprefix('int8_')}" * (comm.all_reduce != "exact"),
            f"kv_gather={comm.kv_gather}" * (comm.kv_gather != "exact"),
            f"exchange={comm.exchange}" * (comm.exchange != "auto"),
            f"chunks of {self.chunk_tokens}" * (self.chunk_tokens > 0),
            "float32 scores" * self.float32_scores,
            f"{self.copies} copies" * (self.copies > 1),
        ]
        return ", ".join(filter(None, parts))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts of one length, and the tokens that follow them."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    """Decode steps after the prefill, which gives the first token."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run of the benchmark. The same on every rank."""

    model: str
    ways: tuple[Way, ...]
    workloads: tuple[Workload, ...]
    repeats: int
    threads: int
    """CPU threads of a rank."""
    seed: int
    parts: bool
    """Whether to take the time of each part, in runs of their own after the timed ones."""
    timeout: float | None

    @property
    def num_ranks(self) -> int:
        """The fewest ranks that all ways fit into."""
        multiple = math.lcm(*(way.num_ranks for way in self.ways))
        return multiple * -(-max(way.copies for way in self.ways) // multiple)

    def check_world(self, world_size: int) -> None:
        """Raises ParallelConfigError unless the ways fit into so many ranks."""
        for way in self.ways:
            if world_size % way.num_ranks or way.num_ranks * way.copies > world_size:
                raise ParallelConfigError(
                    f"{way.name}: this does not fit into a world of {world_size} ranks: start "
                    f"{self.num_ranks}, or change the sizes"
                )

    def check_model(self, config: Qwen3MoeConfig) -> None:
        """Raises InputError, ParallelConfigError or UnsupportedConfigError for what the model
        cannot run."""
        longest = max(w.prompt_tokens for w in self.workloads)
        if longest > max_length_of(config):
            raise InputError(
                f"--prompt-tokens {longest}: the model was made for {max_length_of(config)} "
                "tokens; pass shorter prompts"
            )
        for way in self.ways:
            ctx = ParallelContext.describe(0, cp_size=way.cp, tp_size=way.tp, moe=way.moe)
            with ctx.communication(way.comm):
                check_supported(config, ctx)


def ways_of(
    *,
    dtypes: list[str],
    cp: list[int],
    tp: list[int],
    moe: list[Literal["tp", "ep"]],
    comm: list[CommConfig],
    chunk_tokens: list[int],
    float32_scores: list[bool],
    copies: int,
    transformers: bool,
) -> tuple[Way, ...]:
    """Every combination, in the order of the lists, without those that differ from an earlier one
    only by what has no effect; transformers after the others of its dtype.

    Copies are added to each way that has neither chunks nor float32 scores.
    """
    ways: dict[Way, None] = {}  # an ordered set
    for dtype in dtypes:
        for c, t, m, settings, chunk, scores in product(
            cp, tp, moe, comm, chunk_tokens, float32_scores
        ):
            way = Way(
                dtype=dtype,
                cp=c,
                tp=t,
                moe=m if c * t > 1 else "tp",
                comm=_effective(settings, c, t, m),
                chunk_tokens=chunk,
                float32_scores=scores and dtype != "float32",
            )
            ways[way] = None
            if copies > 1 and not chunk and not scores and way.num_ranks == 1:
                ways[Way(**{**vars(way), "copies": copies})] = None
        if transformers:
            ways[Way(dtype=dtype, engine="transformers")] = None
    return tuple(ways)


def _effective(comm: CommConfig, cp: int, tp: int, moe: str) -> CommConfig:
    """The settings that have an effect on a topology; the others as by default."""
    default = CommConfig()
    reduces = tp > 1 and comm.all_reduce != "exact"
    gathers = cp > 1 and comm.kv_gather != "exact"
    exchanges = moe == "ep" and cp > 1
    return CommConfig(
        all_reduce=comm.all_reduce if reduces else default.all_reduce,
        group_size=comm.group_size if reduces else None,
        min_bytes=comm.min_bytes if reduces else None,
        kv_gather=comm.kv_gather if gathers else default.kv_gather,
        skip_layers=comm.skip_layers if reduces or gathers else (),
        exchange=comm.exchange if exchanges else default.exchange,
    )

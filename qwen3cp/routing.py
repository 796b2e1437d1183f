"""How many rows go to each expert, and which rank has which expert.

Letters: L layers, E experts of a layer, W ranks of the replica.
"""

from __future__ import annotations

import heapq
import io
import json
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig

from qwen3cp import collectives
from qwen3cp.config import is_sparse, local_experts
from qwen3cp.errors import InputError
from qwen3cp.parallel import ForwardPhase, ParallelContext
from qwen3cp.plots import new_figure, save_figure

if TYPE_CHECKING:
    from qwen3cp.model import CPQwen3MoeForCausalLM

__all__ = ["ExpertPlacement", "Placement", "RoutingLog", "RoutingReport", "record_routing"]


@dataclass(frozen=True)
class ExpertPlacement:
    """Which expert each slot of a layer holds; the slots are divided over the ranks in order.

    Rank r of W has the slots `local_experts(E, r, W)`. Without a placement slot i holds expert i.
    """

    layers: tuple[tuple[int, ...], ...]
    """layers[l][slot] is an expert: for each layer, also a dense one, a permutation of 0..E-1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(tuple(layer) for layer in self.layers))
        for index, layer in enumerate(self.layers):
            integers = all(isinstance(e, int) and not isinstance(e, bool) for e in layer)
            if not integers or sorted(layer) != list(range(len(layer))):
                raise InputError(
                    f"the expert placement of layer {index} must be a permutation of "
                    f"0..{len(layer) - 1}, got {list(layer)[:16]}"
                )

    @classmethod
    def of(
        cls,
        placement: Placement,
        config: Qwen3MoeConfig,
    ) -> ExpertPlacement | None:
        """A placement from itself, from one permutation for all layers, from one for each layer, or
        from the JSON file that `save` wrote.

        Raises:
            InputError: it is none, or of another number of layers or experts.
        """
        if placement is None:
            return None
        num_layers, num_experts = config.num_hidden_layers, config.num_experts
        if isinstance(placement, str | Path):
            placement = cls.load(placement)
        elif not isinstance(placement, ExpertPlacement):
            given: Any = placement
            try:
                nested = len(given) > 0 and isinstance(given[0], Seq)
                placement = cls(tuple(given) if nested else (tuple(given),) * num_layers)
            except TypeError as error:
                raise InputError(f"expert_placement is no permutation: {error}") from error
        sizes = {len(layer) for layer in placement.layers}
        if len(placement.layers) != num_layers or sizes != {num_experts}:
            raise InputError(
                f"the expert placement is of {len(placement.layers)} layers with {sorted(sizes)} "
                f"experts; the model has {num_layers} with {num_experts}"
            )
        return placement

    def save(self, path: str | Path) -> None:
        """As JSON: {"layers": [[expert of slot 0, ...], ...]}."""
        Path(path).write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> ExpertPlacement:
        """What `save` wrote. Raises InputError if it is something else."""
        try:
            return cls(tuple(json.loads(Path(path).read_text())["layers"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is no expert placement: {error}") from error

    @classmethod
    def balanced(cls, rows: Seq[Seq[int]], world_size: int) -> ExpertPlacement:
        """Spreads hot experts: each, the hottest first, goes to the rank with the fewest rows that
        has a free slot (longest-processing-time rule).

        Args:
            rows: [L, E], rows of each expert, as of `RoutingReport.rows_per_expert`.
        """
        return cls(tuple(_spread(layer, world_size) for layer in rows))


Placement = ExpertPlacement | Seq[int] | Seq[Seq[int]] | str | Path | None
"""What `ExpertPlacement.of` takes."""


def _spread(rows: Seq[int], world_size: int) -> tuple[int, ...]:
    slots = [local_experts(len(rows), rank, world_size) for rank in range(world_size)]
    experts: list[list[int]] = [[] for _ in slots]
    ranks = [(0, rank) for rank in range(world_size) if len(slots[rank])]
    for expert in sorted(range(len(rows)), key=lambda e: -rows[e]):
        load, rank = heapq.heappop(ranks)
        experts[rank].append(expert)
        if len(experts[rank]) < len(slots[rank]):
            heapq.heappush(ranks, (load + rows[expert], rank))
    return tuple(expert for of_rank in experts for expert in sorted(of_rank))


class RoutingLog:
    """Rows that the experts of this rank were given. Stays on the device until it is asked for."""

    def __init__(self) -> None:
        self._slots: dict[int | None, torch.Tensor] = {}

    def add(self, counts: torch.Tensor, slots: range, num_experts: int, layer: int | None) -> None:
        """Adds the rows of each of some slots of a layer."""
        if layer not in self._slots:
            self._slots[layer] = counts.new_zeros(num_experts)
        self._slots[layer][slots.start : slots.stop] += counts

    def report(self, model: CPQwen3MoeForCausalLM) -> RoutingReport:
        """Of all ranks. Collective over world_group: every rank must call it."""
        ctx, config, placement = model.parallel_context, model.config, model.expert_placement
        mine = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.int64)
        for layer, slots in self._slots.items():
            assert layer is not None, "a layer of a model has an index"
            experts = placement.layers[layer] if placement else range(config.num_experts)
            mine[layer, list(experts)] = slots.cpu()
        ranks = collectives.gather_ranks(mine.to(model.device), ctx).view(-1, *mine.shape).cpu()
        sparse = [i for i in range(config.num_hidden_layers) if is_sparse(config, i)]
        return RoutingReport(
            layers=sparse,
            rows_per_expert=ranks.sum(0)[sparse].tolist(),
            rows_per_rank=ranks.sum(2).T[sparse].tolist(),
            moe=ctx.moe,
        )


_open_logs: ContextVar[tuple[RoutingLog, ...]] = ContextVar("open_routing_logs", default=())


def is_recording() -> bool:
    """Whether a `record_routing` block is open. Compiled code does not see it: run eagerly then."""
    return bool(_open_logs.get())


@contextmanager
def record_routing() -> Iterator[RoutingLog]:
    """Counts the rows that go to each expert in the block, on this rank. Blocks may nest.

    Every (row, expert) pair of a replica is counted once, on one rank: with moe="ep" on the rank
    that has the expert; with "tp", where all do, on TP rank 0 of the rows.
    """
    log = RoutingLog()
    token = _open_logs.set((*_open_logs.get(), log))
    try:
        yield log
    finally:
        _open_logs.reset(token)


def count_rows(
    counts: torch.Tensor, slots: range, num_experts: int, layer: int | None, ctx: ParallelContext
) -> None:
    """Adds the rows of some slots to the logs that are open; in compiled code nothing."""
    if torch.compiler.is_compiling():
        return
    replicated = ctx.moe == "tp" and (
        ctx.tp_rank != 0 or (ctx.phase is ForwardPhase.DECODE and ctx.cp_rank != 0)
    )
    if not replicated:
        for log in _open_logs.get():
            log.add(counts, slots, num_experts, layer)


@dataclass(frozen=True)
class RoutingReport:
    """Rows of each expert and of each rank. The same on every rank."""

    layers: list[int]
    """The layers that have experts."""
    rows_per_expert: list[list[int]]
    """[layers, E]"""
    rows_per_rank: list[list[int]]
    """[layers, W]: with moe="tp" the rows of a CP rank are counted on its first TP rank."""
    moe: str

    @property
    def expert_imbalance(self) -> list[float]:
        """Of each layer: rows of the busiest expert / mean."""
        return [_imbalance(rows) for rows in self.rows_per_expert]

    @property
    def rank_imbalance(self) -> list[float]:
        """Of each layer: rows of the busiest rank / mean. That much longer its experts take."""
        return [_imbalance(rows) for rows in self.rows_per_rank]

    def balanced_placement(self, num_layers: int, world_size: int) -> ExpertPlacement:
        """`ExpertPlacement.balanced` of these rows; layers without experts keep their order."""
        num_experts = len(self.rows_per_expert[0])
        rows = [[0] * num_experts for _ in range(num_layers)]
        for layer, counts in zip(self.layers, self.rows_per_expert, strict=True):
            rows[layer] = counts
        return ExpertPlacement.balanced(rows, world_size)

    def to_json(self) -> str:
        document: dict[str, Any] = asdict(self)
        document["expert_imbalance"] = self.expert_imbalance
        document["rank_imbalance"] = self.rank_imbalance
        return json.dumps(document, indent=2)

    def to_table(self) -> str:
        """As text, a row for each layer."""
        table = Table("layer", "rows", "busiest expert / mean", "busiest rank / mean")
        for layer, rows, expert, rank in zip(
            self.layers,
            self.rows_per_expert,
            self.expert_imbalance,
            self.rank_imbalance,
            strict=True,
        ):
            table.add_row(str(layer), f"{sum(rows):,}", f"{expert:.2f}", f"{rank:.2f}")
        console = Console(file=io.StringIO(), width=100, highlight=False)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip()

    def plot(self, path: str | Path) -> None:
        """Draws the rows of every expert, and the imbalance of the layers: svg, png or pdf.

        Raises:
            InputError: matplotlib is not installed, or cannot write such a file.
        """
        figure = new_figure(10, 3.5)
        map_axes, axes = figure.subplots(1, 2)
        rows = np.asarray(self.rows_per_expert, float)
        shares = rows / rows.mean(1, keepdims=True).clip(1e-9)
        image = map_axes.imshow(shares, aspect="auto", interpolation="nearest")
        map_axes.set(xlabel="expert", ylabel="layer", title="rows / mean")
        map_axes.set_yticks(range(len(self.layers)), [str(layer) for layer in self.layers])
        figure.colorbar(image, ax=map_axes)
        axes.plot(self.layers, self.expert_imbalance, marker="o", label="experts")
        axes.plot(self.layers, self.rank_imbalance, marker="o", label="ranks")
        axes.set(xlabel="layer", title="busiest / mean", ylim=(0, None))
        axes.legend(frameon=False)
        save_figure(figure, path)


def _imbalance(rows: Seq[int]) -> float:
    return max(rows) * len(rows) / sum(rows) if sum(rows) else 1.0

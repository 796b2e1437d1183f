"""From counts to seconds: what a dry run is expected to take on a machine. Predicted, not measured.

An operator takes the larger of its products' time, FLOPs / (peak * share), and its memory's,
bytes / (bandwidth * share), and its launch. A collective takes the bytes that a rank receives over
the rate of the slowest link of its group, and its launch. Everything runs one after another but the
gather of keys and values, which hides behind the operators that run beside it. A step takes as long
as its slowest rank.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from qwen3cp.planner.counts import CollectiveCount, DryRun, OperatorCount, RankCounts, StepCounts
from qwen3cp.planner.hardware import Efficiencies, Hardware, LinkKind

__all__ = ["SPLIT", "Fit", "Prediction", "StepTime", "fit", "group_links", "predict"]

SPLIT = ("attention", "linear", "vector", "packing", "collectives", "launch", "host")
"""What a time is made of:

attention: the attention operator. linear: all other products. vector: operators without products,
such as norms and sorting by expert. packing: copies, rounding and sums for the collectives; int8
costs these. collectives: links, as far as they are not hidden. launch: of operators and
collectives. host: waiting for values of the device, and the comparison of the ranks' plans.
"""

HEAVY = ("attention", "linear")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One forward."""

    phase: str
    start: int
    new_tokens: int
    seconds: float
    """Of the slowest rank."""
    slowest_rank: int
    split: dict[str, float]
    """Seconds of each of `SPLIT` on that rank; their sum is `seconds`."""
    hidden_seconds: float
    """Of collectives, behind operators; not a part of `seconds`."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a dry run is expected to take."""

    hardware: str
    links: dict[str, str]
    """The slowest link of each group: cp, tp and world."""
    steps: tuple[StepTime, ...]
    efficiencies: dict[str, float]

    @property
    def ttft_seconds(self) -> float:
        """Time to first token: all chunks of the prefill, one after another."""
        return sum(step.seconds for step in self.steps if step.phase == "prefill")

    @property
    def tpot_seconds(self) -> float | None:
        """Time of a token after the prompt; None if no decode step was counted."""
        decode = [step.seconds for step in self.steps if step.phase == "decode"]
        return sum(decode) / len(decode) if decode else None

    def split(self, phase: str = "prefill") -> dict[str, float]:
        """Seconds of each of `SPLIT`: of the whole prefill, or of a decode step."""
        steps = [step for step in self.steps if step.phase == phase]
        share = 1 if phase == "prefill" else max(1, len(steps))
        return {name: sum(step.split[name] for step in steps) / share for name in SPLIT}

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self)
        document["ttft_seconds"] = self.ttft_seconds
        document["tpot_seconds"] = self.tpot_seconds
        document["ttft_split"] = self.split("prefill")
        document["tpot_split"] = self.split("decode")
        document["predicted"] = True
        return document

    def to_table(self) -> Table:
        table = Table(title=f"predicted for {self.hardware}, not measured", title_justify="left")
        table.add_column("")
        table.add_column("prefill, s", justify="right")
        table.add_column("a token, ms", justify="right")
        prefill, decode = self.split("prefill"), self.split("decode")
        tpot = self.tpot_seconds
        for name in SPLIT:
            after = "" if tpot is None else f"{decode[name] * 1e3:.2f}"
            table.add_row(name, f"{prefill[name]:.3f}", after)
        last = "" if tpot is None else f"{tpot * 1e3:.2f}"
        table.add_row("all", f"{self.ttft_seconds:.3f}", last, style="bold")
        return table


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The memory of the fullest rank against the hardware."""

    fits: bool
    needed_bytes: int
    usable_bytes: int
    hbm_bytes: int
    parameter_bytes: int
    constant_bytes: int
    kv_bytes: int
    peak_activation_bytes: int
    rank: int

    @property
    def reason(self) -> str:
        """What is needed and what there is, in GiB."""
        parts = (
            f"{_gib(self.parameter_bytes)} parameters, {_gib(self.kv_bytes)} KV cache, "
            f"{_gib(self.peak_activation_bytes)} activations"
        )
        return (
            f"rank {self.rank} needs {_gib(self.needed_bytes)} GiB ({parts}); "
            f"{_gib(self.usable_bytes)} of {_gib(self.hbm_bytes)} GiB are usable"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reason": self.reason}


def fit(run: DryRun, hardware: Hardware) -> Fit:
    """Whether the fullest rank fits into what is usable of a device's memory."""
    rank = run.fullest
    return Fit(
        fits=rank.memory_bytes <= hardware.usable_bytes,
        needed_bytes=rank.memory_bytes,
        usable_bytes=hardware.usable_bytes,
        hbm_bytes=hardware.hbm_bytes,
        parameter_bytes=rank.parameter_bytes,
        constant_bytes=rank.constant_bytes,
        kv_bytes=rank.kv_bytes,
        peak_activation_bytes=rank.peak_activation_bytes,
        rank=rank.ranks[0],
    )


def group_links(hardware: Hardware, cp_size: int, tp_size: int) -> dict[str, LinkKind]:
    """The slowest kind of link that the groups cp, tp and world use, where they have several
    ranks. Rank cp_rank * tp_size + tp_rank is on the device of that number."""
    groups: dict[str, list[range]] = {
        "cp": [range(t, cp_size * tp_size, tp_size) for t in range(tp_size)],
        "tp": [range(c * tp_size, (c + 1) * tp_size) for c in range(cp_size)],
        "world": [range(cp_size * tp_size)],
    }
    order: list[LinkKind] = ["package", "node", "network"]
    return {
        name: max((hardware.link_of(ranks) for ranks in all_ranks), key=order.index)
        for name, all_ranks in groups.items()
        if len(all_ranks[0]) > 1
    }


def predict(
    run: DryRun,
    hardware: Hardware,
    efficiencies: Efficiencies | None = None,
    *,
    matmul_dtype: str | None = None,
) -> Prediction:
    """What the run is expected to take.

    Args:
        matmul_dtype: "int8" extrapolates to a checkpoint in W8A8, which this package does not run:
            all products but attention and the router at the int8 peak, and half of the bytes that
            they read. Quantising activations is not counted.

    Raises:
        InputError: the hardware has no peak for the dtype.
    """
    efficiencies = efficiencies or Efficiencies()
    clock = _Clock(run, hardware, efficiencies, matmul_dtype)
    steps = []
    for i, step in enumerate(run.ranks[0].steps):
        times = [(clock.time(rank.steps[i]), rank) for rank in run.ranks]
        (split, hidden), slowest = max(times, key=lambda x: sum(x[0][0].values()))
        steps.append(_step_time(step, slowest, split, hidden))
    return Prediction(
        hardware=hardware.name,
        links=dict(group_links(hardware, run.cp_size, run.tp_size)),
        steps=tuple(steps),
        efficiencies=efficiencies.to_dict(),
    )


def _step_time(
    step: StepCounts, rank: RankCounts, split: dict[str, float], hidden: float
) -> StepTime:
    return StepTime(
        phase=step.phase,
        start=step.start,
        new_tokens=step.new_tokens,
        seconds=sum(split.values()),
        slowest_rank=rank.ranks[0],
        split=split,
        hidden_seconds=hidden,
    )


class _Clock:
    """Seconds of operators and collectives of one run."""

    def __init__(
        self,
        run: DryRun,
        hardware: Hardware,
        efficiencies: Efficiencies,
        matmul_dtype: str | None,
    ) -> None:
        self.hardware, self.efficiencies = hardware, efficiencies
        self.peak = hardware.peak(run.dtype)
        self.matmul_peak = hardware.peak(matmul_dtype or run.dtype)
        self.weight_bytes = 1.0 if matmul_dtype is None else 0.5
        self.memory = hardware.hbm_bytes_per_second * efficiencies.memory
        self.links = group_links(hardware, run.cp_size, run.tp_size)
        divided = run.moe == "ep" and run.world_size > 1
        self.imbalance = efficiencies.expert_imbalance if divided else 1.0

    def time(self, step: StepCounts) -> tuple[dict[str, float], float]:
        """Seconds of each of `SPLIT` on this rank, and those that are hidden."""
        split: dict[str, float] = dict.fromkeys(SPLIT, 0.0)
        beside: dict[tuple[str, int], float] = defaultdict(float)
        for operator in step.operators:
            category, work, launch = self.operator(operator)
            split[category] += work * operator.total_calls
            split["launch"] += launch * operator.total_calls
            if operator.overlaps is not None:
                for layer in operator.layers:
                    beside[operator.overlaps, layer] += (work + launch) * operator.calls
        in_flight: dict[tuple[str, int], float] = defaultdict(float)
        for collective in step.collectives:
            category, transfer, launch = self.collective(collective)
            split[category] += transfer * collective.total_calls
            split["launch"] += launch * collective.total_calls
            if collective.asynchronous:
                for layer in collective.layers:
                    in_flight[collective.kind, layer] += transfer * collective.calls
        hidden = self.efficiencies.overlap * sum(
            min(seconds, beside[place]) for place, seconds in in_flight.items()
        )
        split["collectives"] -= hidden
        split["host"] += step.host_reads * self.efficiencies.host_sync_us * 1e-6
        return split, hidden

    def operator(self, count: OperatorCount) -> tuple[str, float, float]:
        """What it is a part of, seconds of one call, and of its launch."""
        shares = self.efficiencies
        num_bytes, peak, share = count.bytes_read + count.bytes_written, self.peak, shares.matmul
        if count.part == "attention" and count.flops:
            category, share = "attention", shares.attention
        elif count.flops:
            category = "linear"
            if count.part != "router":
                peak = self.matmul_peak
                num_bytes = self.weight_bytes * count.bytes_read + count.bytes_written
        else:
            category = "packing" if count.part == "communication" else "vector"
        seconds = max(count.flops / (peak * share), num_bytes / self.memory)
        if count.part == "experts":
            seconds *= self.imbalance
        launch = shares.launch_matmul_us if category in HEAVY else shares.launch_vector_us
        return category, seconds, launch * 1e-6

    def collective(self, count: CollectiveCount) -> tuple[str, float, float]:
        """What it is a part of, seconds on the link, and of its launch, of one call."""
        if count.group == "host":
            return "host", self.efficiencies.host_sync_us * 1e-6, 0.0
        kind = self.links[count.group]
        link = self.hardware.links[kind]
        rate = link.rate(count.group_size) * self.efficiencies.link(kind)
        seconds = count.bytes / rate + link.latency_seconds
        return "collectives", seconds, self.efficiencies.launch_collective_us * 1e-6


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"

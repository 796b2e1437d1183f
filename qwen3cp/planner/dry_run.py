"""A forward of every kind of rank on tensors without values: what it would need and move.

The model is the real one, built on the meta device, on a process group that moves nothing. So no
weights are read, nothing of the model's size is allocated, and no count is written down here: all
of them come from the operators and collectives that are called.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from transformers import Qwen3MoeConfig

from qwen3cp.config import check_supported, is_sparse, max_length_of
from qwen3cp.errors import InputError, ParallelConfigError, Qwen3CPError
from qwen3cp.kv_cache import DEFAULT_PAGE_SIZE as PAGE
from qwen3cp.kv_cache import PagedKVCache, Sequence
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.parallel import CommConfig, ForwardPhase, ParallelContext
from qwen3cp.planner.counter import OperatorCounter, RoutedRows
from qwen3cp.planner.counts import (
    CollectiveCount,
    DryRun,
    OperatorCount,
    RankCounts,
    StepCounts,
)
from qwen3cp.planner.interpolation import fill
from qwen3cp.planner.topology import Step, Topology, Workload
from qwen3cp.weights.loader import build_empty

__all__ = ["UniformRouting", "dry_run"]

META = torch.device("meta")
ATTENTION = "npu.npu_fused_infer_attention_score"


def dry_run(
    config: Qwen3MoeConfig,
    *,
    prompt: int,
    model: str = "",
    cp_size: int = 1,
    tp_size: int = 1,
    moe: Literal["tp", "ep"] = "tp",
    comm: CommConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    chunk: int | None = None,
    new_tokens: int = 1,
    decode: bool = True,
    ranks: Literal["distinct", "busiest"] = "distinct",
    layers: Literal["all", "distinct"] = "all",
    chunks: Literal["all", "ends"] = "all",
    models: dict[Hashable, CPQwen3MoeForCausalLM] | None = None,
) -> DryRun:
    """Runs a prefill and a decode step of a topology on meta tensors, one rank after another.

    Not collective; starts and ends a process group of its own, if there is more than one rank.

    Args:
        prompt: tokens of each of the `batch` sequences.
        model: a name for the report.
        chunk: most new tokens of a sequence in one forward of the prefill; None is all.
        new_tokens: tokens after the prompt that the cache has room for.
        decode: count one decode step after the prefill, too.
        ranks: one rank of each kind, or only of the kind with most to do.
        layers: "distinct" runs one layer of each kind, and counts it for all that are like it.
        chunks: "ends" runs the first and the last of equal chunks, and interpolates between them.
        models: keeps what was built for the next dry runs of the same config.

    Raises:
        ParallelConfigError: the model cannot run on this topology. Or there is a process group in
            this process already, which this would have to replace.
        UnsupportedConfigError: it runs on none.
        InputError: a number below 1, or a call that an NPU would refuse.
    """
    topology = Topology(cp_size=cp_size, tp_size=tp_size, moe=moe, comm=comm or CommConfig())
    workload = Workload(
        prompt=prompt, batch=batch, chunk=chunk, new_tokens=new_tokens, decode=decode
    )
    check_supported(config, topology.rank(0))
    if topology.world_size > 1 and dist.is_initialized():
        raise ParallelConfigError(
            "there is a process group in this process, and a dry run starts one of its own: run it "
            "before init_process_group, or in another process (`qwen3cp plan`)"
        )
    kinds = _kinds_of_layers(config, topology.comm, layers)
    if ranks == "busiest":
        alike = [topology.busiest(config, workload)]
    else:
        alike = topology.alike(config, workload)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        counted = [
            _run_rank(config, topology, workload, same, kinds, dtype, chunks == "ends", models)
            for same in alike
        ]
        whole = _empty_model(config, ParallelContext.single(), kinds, dtype, models)
    return DryRun(
        model=model,
        num_layers=config.num_hidden_layers,
        num_parameters=_bytes_of(whole.named_parameters(), kinds) // dtype.itemsize,
        max_positions=max_length_of(config),
        dtype=str(dtype).removeprefix("torch."),
        cp_size=cp_size,
        tp_size=tp_size,
        moe=moe,
        comm=asdict(topology.comm),
        prompt=prompt,
        batch=batch,
        chunk=min(chunk or prompt, prompt),
        new_tokens=new_tokens,
        ranks=tuple(counted),
        warnings=(
            *_warnings(config, topology, workload, dtype),
            *dict.fromkeys(str(warning.message) for warning in caught),
        ),
        assumptions=_assumptions(config, topology),
    )


class UniformRouting:
    """What an expert exchange expects where no row has values: every choice of k experts is as
    likely as any other.

    Args:
        topology: whose ranks hold the experts.
        rank: the rank that is run.
    """

    def __init__(self, config: Qwen3MoeConfig, topology: Topology, rank: int) -> None:
        self._config, self._topology, self._rank = config, topology, rank
        self._matrix: list[list[int]] = []
        self._tokens = 0

    def begin(self, step: Step, batch: int) -> None:
        """Says which forward is next."""
        self._tokens = step.new_tokens * batch
        if self._topology.moe == "ep":
            self._matrix = self._topology.expected_rows(self._config, step, batch)

    def counts(self) -> list[list[int]]:
        """How many rows each rank sends to each, in an all_to_all exchange."""
        return self._matrix

    def sent_rows(self) -> int:
        """The rows that this rank sends there, to itself too."""
        return sum(self._matrix[self._rank])

    def routed_rows(self, rows: int, experts: range, num_experts: int) -> RoutedRows:
        """Of a sorting of rows for some experts. With moe="ep" each row of the replica meets the
        experts of this rank once, whatever rows of padding come with it. Rounded up: of a few rows
        some rank has that many."""
        rows = self._tokens if self._topology.moe == "ep" else rows
        top_k = self._config.num_experts_per_tok
        pairs = -(-rows * top_k * len(experts) // num_experts)
        chosen = 1 - (1 - top_k / num_experts) ** rows
        return RoutedRows(pairs, min(pairs, math.ceil(len(experts) * chosen)))


def _run_rank(
    config: Qwen3MoeConfig,
    topology: Topology,
    workload: Workload,
    same: tuple[int, ...],
    kinds: list[list[int]],
    dtype: torch.dtype,
    ends: bool,
    models: dict[Hashable, CPQwen3MoeForCausalLM] | None,
) -> RankCounts:
    """All steps of the first of some ranks that are alike; with `ends`, see `_count_all`."""
    comm = _comm_of(topology.comm, kinds)
    with _fake_rank(same[0], replace(topology, comm=comm)) as ctx:
        model = _empty_model(config, ctx, kinds, dtype, models)
        length = workload.prompt + workload.new_tokens
        model.max_sequence_length = max(model.max_sequence_length, length)
        cache = model.new_kv_cache(num_pages=1 - workload.batch * (-length // PAGE))
        sequences = [cache.new_sequence() for _ in range(workload.batch)]
        layers = [cache.layer(i) for i in range(cache.num_layers)]
        rows = [layer.rows for layer in layers]
        held = [*model.parameters(), *model.buffers(), layers[0].causal_mask, *rows]
        routing = UniformRouting(config, topology, ctx.rank)

        def count(step: Step) -> StepCounts:
            _move_to(cache, sequences, step.start)
            routing.begin(step, workload.batch)
            counter = OperatorCounter(model, held, routing)
            with _as_an_npu_would(step), counter:
                if step.phase is ForwardPhase.PREFILL:
                    ids = [torch.zeros(step.new_tokens, dtype=torch.int64)] * workload.batch
                    model.prefill(cache, sequences, ids)
                else:
                    model.decode(cache, sequences, [0] * workload.batch)
            operators = tuple(_in_all_layers(x, kinds) for x in counter.operator_counts())
            rows = topology.rows(step, workload.batch)[ctx.rank]
            return StepCounts(
                phase=step.phase.value,
                start=step.start,
                new_tokens=step.new_tokens,
                batch=workload.batch,
                rows=rows,
                attention_calls=sum(
                    x.calls for x in operators if x.name == ATTENTION and 0 in x.layers
                ),
                operators=operators,
                collectives=tuple(_in_all_layers(x, kinds) for x in counter.collective_counts()),
                host_reads=sum(
                    reads * len(kinds[layer]) for layer, reads in counter.host_reads.items()
                ),
                peak_activation_bytes=counter.peak_bytes,
                peak_operator=counter.peak_operator,
                peak_layer=None if counter.peak_layer is None else kinds[counter.peak_layer][0],
            )

        steps = _count_all(workload.steps, count, ends)
        return RankCounts(
            ranks=same,
            cp_rank=ctx.cp_rank,
            tp_rank=ctx.tp_rank,
            parameter_bytes=_bytes_of(model.named_parameters(), kinds),
            constant_bytes=_bytes_of(model.named_buffers(), kinds)
            + layers[0].causal_mask.untyped_storage().nbytes(),
            kv_bytes=cache.num_bytes // len(kinds) * config.num_hidden_layers,
            steps=tuple(steps),
        )


def _count_all(
    steps: list[Step], count: Callable[[Step], StepCounts], ends: bool
) -> list[StepCounts]:
    """Of every step; with `ends`, of equal chunks as few are run as can be."""
    if not ends:
        return [count(step) for step in steps]
    chunks = [step for step in steps if step.new_tokens == steps[0].new_tokens]
    chunks = [step for step in chunks if step.phase is ForwardPhase.PREFILL]
    counted = fill(
        [step.start for step in chunks], lambda start: count(replace(steps[0], start=start))
    )
    return [*counted, *(count(step) for step in steps[len(chunks) :])]


def _move_to(cache: PagedKVCache, sequences: list[Sequence], length: int) -> None:
    """Leaves so many tokens in the cache, as a prefill of them would."""
    for sequence in sequences:
        cache.truncate(sequence, min(length, sequence.length))
        missing = [length - sequence.length]
        cache.reserve([sequence], missing)
        cache.commit([sequence], missing)


@contextmanager
def _fake_rank(rank: int, topology: Topology) -> Iterator[ParallelContext]:
    """A rank whose collectives give tensors of the right shape, and move nothing."""
    if topology.world_size == 1:
        yield ParallelContext(moe=topology.moe, comm=topology.comm)
        return
    # here, since importing it registers a backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world_size)
    try:
        yield ParallelContext.from_world(
            topology.cp_size, topology.tp_size, moe=topology.moe, comm=topology.comm
        )
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_an_npu_would(step: Step) -> Iterator[None]:
    """What our operators refuse, as a mistake of the user."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, Qwen3CPError) or not str(error).startswith("npu_"):
            raise
        raise InputError(
            f"an NPU would refuse the {step.phase.value} of {step.new_tokens} tokens after "
            f"{step.start}: {error}"
        ) from error


def _empty_model(
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    kinds: list[list[int]],
    dtype: torch.dtype,
    models: dict[Hashable, CPQwen3MoeForCausalLM] | None,
) -> CPQwen3MoeForCausalLM:
    """A model of one layer of each kind on the meta device, which is left in `models`."""
    models = {} if models is None else models
    key = ctx.rank, ctx.cp_size, ctx.tp_size, ctx.moe, dtype, str(kinds)
    if key in models:  # its modules share one context, which gets the new groups
        vars(models[key].parallel_context).update(vars(ctx))
        return models[key]
    config = copy.deepcopy(config)
    config.mlp_only_layers = [
        index for index, layers in enumerate(kinds) if not is_sparse(config, layers[0])
    ]
    config.decoder_sparse_step = 1
    config.num_hidden_layers = len(kinds)
    model = build_empty(CPQwen3MoeForCausalLM, config, ctx, dtype, META)
    model.tie_weights()
    nn.Module.to(model, META)  # buffers, in place
    models[key] = model
    return model


def _kinds_of_layers(
    config: Qwen3MoeConfig, comm: CommConfig, layers: Literal["all", "distinct"]
) -> list[list[int]]:
    """The layers, those that are alike together, by their first: with or without experts, exact or
    not; the first has no residual to add."""
    if layers == "all":
        return [[layer] for layer in range(config.num_hidden_layers)]
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for layer in range(config.num_hidden_layers):
        key = layer == 0, is_sparse(config, layer), layer in comm.skip_layers
        kinds.setdefault(key, []).append(layer)
    return list(kinds.values())


def _comm_of(comm: CommConfig, kinds: list[list[int]]) -> CommConfig:
    """For a model of one layer of each kind."""
    skipped = [index for index, layers in enumerate(kinds) if layers[0] in comm.skip_layers]
    return replace(comm, skip_layers=skipped)


Count = TypeVar("Count", OperatorCount, CollectiveCount)


def _in_all_layers(count: Count, kinds: list[list[int]]) -> Count:
    """A count of one layer of each kind as that of all layers."""
    return replace(count, layers=tuple(sorted(sum((kinds[index] for index in count.layers), []))))


def _bytes_of(tensors: Iterable[tuple[str, torch.Tensor]], kinds: list[list[int]]) -> int:
    """Of named tensors of all layers; what is tied or shared counts once."""
    storages: dict[int, int] = {}
    for name, tensor in tensors:
        _, _, after = name.partition("model.layers.")
        times = len(kinds[int(after.partition(".")[0])]) if after else 1
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes() * times
    return sum(storages.values())


def _warnings(
    config: Qwen3MoeConfig, topology: Topology, workload: Workload, dtype: torch.dtype
) -> list[str]:
    found = []
    length, positions = workload.prompt + workload.new_tokens, max_length_of(config)
    if length > positions:
        found.append(
            f"{length} tokens are beyond the {positions} positions that the config was made for; "
            "it needs a rope_scaling such as yarn, or another checkpoint"
        )
    if dtype != torch.bfloat16:
        found.append(f"an NPU runs bfloat16 only, not {dtype}")
    if topology.tp_size > config.num_key_value_heads:
        found.append(
            f"tp_size={topology.tp_size} is more than the {config.num_key_value_heads} KV heads: "
            f"{topology.tp_size // config.num_key_value_heads} TP ranks hold each of them"
        )
    empty = [rank for rank, experts in enumerate(topology.experts(config)) if not experts]
    if topology.moe == "ep" and empty and config.num_experts:
        found.append(
            f"{topology.world_size} ranks share {config.num_experts} experts: {len(empty)} of them "
            "have none"
        )
    without = sorted(
        {
            rank // topology.tp_size
            for step in workload.steps
            for rank, rows in enumerate(topology.rows(step, workload.batch))
            if rows == 0
        }
    )
    if without:
        found.append(f"the CP ranks {without} have no rows in some of the prefill")
    return found


def _assumptions(config: Qwen3MoeConfig, topology: Topology) -> tuple[str, ...]:
    found = ["kernels' workspace, the collectives' buffers and the allocator's loss not included"]
    if topology.moe == "ep":
        found.append(
            f"every choice of {config.num_experts_per_tok} of {config.num_experts} experts is "
            "equally likely, and every rank gets the rows that it expects"
        )
    else:
        found.append(
            f"every choice of {config.num_experts_per_tok} of {config.num_experts} experts is "
            "equally likely (for the weights that a step reads)"
        )
    return tuple(found)

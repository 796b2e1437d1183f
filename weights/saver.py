"""Saving a model that lies in pieces on several ranks, as one checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from contextlib import ExitStack, suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qwen3cp import collectives
from qwen3cp.errors import CheckpointError, ParallelConfigError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.folder import replaced_folder
from qwen3cp.weights.index import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE
from qwen3cp.weights.layout import Piece, parameter_layout
from qwen3cp.weights.manifest import MANIFEST_FILE
from qwen3cp.weights.safetensors_file import SafetensorsWriter
from qwen3cp.weights.shards import describe_all
from qwen3cp.weights.whole import WholeCheckpoint

if TYPE_CHECKING:
    from qwen3cp.model import CPQwen3MoeForCausalLM

__all__ = ["save_pretrained"]

ROUND_BYTES = 256 << 20
"""Bytes after which the ranks tell one another whether they failed."""
STALE = (
    SINGLE_FILE,
    INDEX_FILE,
    "model-*-of-*.safetensors",
    "shard-*-of-*.safetensors",
    CONFIG_FILE,
    GENERATION_FILE,
    MANIFEST_FILE,
)
"""What an older checkpoint in the folder consists of."""


class Part(NamedTuple):
    """A piece of a parameter on one rank."""

    rank: int
    parameter: str
    piece: Piece


def save_pretrained(model: CPQwen3MoeForCausalLM, folder: Path, max_shard_size: int | str) -> None:
    """`CPQwen3MoeForCausalLM.save_pretrained`. Collective over the replica."""
    ctx = model.parallel_context
    if ctx.detached and ctx.world_size > 1:
        raise ParallelConfigError(
            f"this model is rank {ctx.rank} of {ctx.world_size} without the other ranks, and "
            "cannot be saved as a whole"
        )
    is_first = ctx.rank == 0 and ctx.dp_rank == 0
    plan = error = temporary = None
    digest = bytes(16)
    with ExitStack() as stack:
        try:
            plan = WholeCheckpoint.plan(model.config, model.dtype, max_shard_size)
            digest = hashlib.blake2b(repr(plan.files).encode(), digest_size=16).digest()
            if is_first:
                replaced = replaced_folder(folder, plan.num_bytes, stale=STALE)
                temporary = stack.enter_context(replaced)
        except Exception as caught:  # the other ranks have to hear of it, whatever it is
            error = caught
        collectives.fail_together(ctx, error, digest, "values of max_shard_size, or another model,")
        assert plan is not None
        if ctx.dp_rank == 0:  # other replicas hold the same
            _write_tensors(model, plan, temporary)
        try:
            if temporary is not None:
                plan.write_rest(temporary, model.generation_config)
            stack.close()  # the folder takes its place
        except (OSError, CheckpointError) as caught:
            error = _named(caught, folder)
        collectives.fail_together(ctx, error)


def _write_tensors(
    model: CPQwen3MoeForCausalLM, plan: WholeCheckpoint, temporary: Path | None
) -> None:
    """Collective over the replica; rank 0 writes. Holds one rank's part of a tensor at a time.

    A failure is told to all ranks after each round, until when the tensors are gathered still.
    """
    ctx, parameters = model.parallel_context, dict(model.named_parameters())
    parts = _parts_by_source(ctx, model)
    output, done = _Output(temporary), 0
    with output:
        for file, header in plan.headers():
            output.start(file, header)
            for tensor, (dtype, shape) in header.items():
                for _, block in groupby(parts[tensor], lambda part: part.piece.rows.start):
                    output.write(_gather(list(block), parameters, ctx))
                done += math.prod(shape) * dtype.itemsize
                if done >= ROUND_BYTES:
                    collectives.fail_together(ctx, output.error)
                    done = 0
            output.finish()
        collectives.fail_together(ctx, output.error)


class _Output:
    """The files that rank 0 writes. Does nothing on other ranks, and nothing after an error."""

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._stack = folder, ExitStack()
        self._writer: SafetensorsWriter | None = None
        self.error: CheckpointError | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def start(self, name: str, header: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        if self._folder is not None and self.error is None:
            try:
                writer = SafetensorsWriter(self._folder / name, header)
                self._writer = self._stack.enter_context(writer)
            except OSError as error:
                self._fail(error)

    def write(self, values: torch.Tensor | None) -> None:
        if self._writer is not None and values is not None:
            try:
                self._writer.write(values)
            except OSError as error:
                self._fail(error)

    def finish(self) -> None:
        if self._writer is not None:
            try:
                self._stack.close()
            except OSError as error:
                self._fail(error)
            self._writer = None

    def _fail(self, error: OSError) -> None:
        assert self._folder is not None
        self.error = _named(error, self._folder)
        self._writer = None
        with suppress(OSError):  # of closing a file that could not be written
            self._stack.__exit__(type(self.error), self.error, None)


def _named(error: Exception, folder: Path) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    return CheckpointError(f"{folder} cannot be written: {error}")


def _gather(
    block: list[Part], parameters: dict[str, torch.nn.Parameter], ctx: ParallelContext
) -> torch.Tensor | None:
    """Some rows of a tensor on disk, put together on rank 0's host. Collective over world_group,
    of which only the ranks that hold a part take part."""
    columns = []
    for part in block:
        flat = parameters[part.parameter].detach().view(-1)
        shape = (part.piece.num_rows, part.piece.num_columns)
        if part.rank == ctx.rank:
            values = flat[part.piece.start : part.piece.start + part.piece.numel].view(shape)
            if ctx.rank != 0:
                collectives.send_to_first(values, ctx)
                continue
        elif ctx.rank == 0:
            values = collectives.receive(flat.new_empty(shape), ctx, part.rank)
        else:
            continue
        columns.append(values.cpu())
    if ctx.rank != 0:
        return None
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _parts_by_source(ctx: ParallelContext, model: CPQwen3MoeForCausalLM) -> dict[str, list[Part]]:
    """For each tensor on disk the pieces that it is put together of, in the order of its rows.

    The same on every rank. Of ranks that hold the same piece the first gives it.
    """
    found: dict[str, dict[tuple[int, int], Part]] = defaultdict(dict)
    for each in describe_all(ctx.cp_size, ctx.tp_size, ctx.moe):
        layout = parameter_layout(model.config, each, placement=model.expert_placement)
        for parameter in layout:
            for piece in parameter.pieces:
                if piece.numel:
                    place = (piece.rows.start, piece.columns.start)
                    found[piece.source].setdefault(place, Part(each.rank, parameter.name, piece))
    return {source: [parts[at] for at in sorted(parts)] for source, parts in found.items()}

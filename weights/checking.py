"""`qwen3cp check`: whether a checkpoint is whole, and what each rank would read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qwen3cp.weights.index import find_checkpoint
from qwen3cp.weights.layout import parameter_layout
from qwen3cp.weights.loader import Checkpoint, resolve_dtype
from qwen3cp.weights.reader import bytes_to_read
from qwen3cp.weights.shards import describe_all

__all__ = ["CheckReport", "RankReport", "check"]


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank would do."""

    rank: int
    cp_rank: int
    tp_rank: int
    num_files: int
    bytes_to_read: int
    bytes_spanned: int
    """With what lies between the columns that it reads: storage delivers whole pages."""
    num_parameters: int
    parameter_bytes: int
    """In memory. A tied head is rows of the embedding and takes none."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """A checkpoint that is whole."""

    form: str
    num_tensors: int
    num_files: int
    num_bytes: int
    dtypes: list[str]
    dtype: str
    """Of the parameters in memory."""
    ranks: list[RankReport]


def check(
    name_or_path: str,
    *,
    cp_size: int = 1,
    tp_size: int = 1,
    moe: Literal["tp", "ep"] = "tp",
    dtype: torch.dtype | str = "auto",
) -> CheckReport:
    """Reads config, index and headers; no tensor. A hub id must be in the local cache.

    Raises:
        CheckpointError, UnsupportedConfigError, ParallelConfigError: what loading would raise.
    """
    contexts = describe_all(cp_size, tp_size, moe)
    folder = find_checkpoint(name_or_path, {"local_files_only": True})
    checkpoint = Checkpoint.read(folder, contexts[0])
    dtype = resolve_dtype(dtype, checkpoint.config)
    ranks, stored = [], set()
    for ctx in contexts:
        if checkpoint.manifest is not None:  # every rank has files of its own
            checkpoint = Checkpoint.read(folder, ctx)
        tensors, layout = checkpoint.index.tensors, checkpoint.layout
        if checkpoint.manifest is None:
            layout = parameter_layout(checkpoint.config, ctx, tensors)
        stored |= set(tensors.values())
        wanted, spanned = bytes_to_read(layout, tensors, checkpoint.block)
        count = sum(parameter.numel for parameter in layout)
        files = {tensors[x.source].file for p in layout for x in p.pieces if x.numel}
        ranks.append(
            RankReport(
                rank=ctx.rank,
                cp_rank=ctx.cp_rank,
                tp_rank=ctx.tp_rank,
                num_files=len(files),
                bytes_to_read=wanted,
                bytes_spanned=spanned,
                num_parameters=count,
                parameter_bytes=count * dtype.itemsize,
            )
        )
    return CheckReport(
        form=_form(checkpoint),
        num_tensors=len(stored),
        num_files=len({tensor.file for tensor in stored}),
        num_bytes=sum(tensor.num_bytes for tensor in stored),
        dtypes=sorted({_name(tensor.dtype) for tensor in stored}),
        dtype=_name(dtype),
        ranks=ranks,
    )


def _form(checkpoint: Checkpoint) -> str:
    names = checkpoint.index.tensors
    if checkpoint.manifest is not None:
        return f"cut by qwen3cp shard into {len(checkpoint.manifest.files)} files"
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    form = "fused experts" if fused else "one tensor per expert"
    return f"{form}, block-wise FP8" if checkpoint.block else form


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

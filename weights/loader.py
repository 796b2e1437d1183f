"""Building a model and filling its parameters with a rank's slices."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, Qwen3MoeConfig
from transformers.initialization import no_init_weights

from qwen3cp import collectives
from qwen3cp.config import check_dtype, check_supported
from qwen3cp.errors import CheckpointError, InputError, UnsupportedConfigError
from qwen3cp.parallel import ParallelContext
from qwen3cp.routing import ExpertPlacement, Placement
from qwen3cp.weights.index import (
    CONFIG_FILE,
    GENERATION_FILE,
    CheckpointIndex,
    find_checkpoint,
    first_of,
)
from qwen3cp.weights.layout import Parameter, is_ignored, parameter_layout
from qwen3cp.weights.manifest import MANIFEST_FILE, ShardManifest, whole_parameter
from qwen3cp.weights.quantised import FP8, FP8_SCALE, block_size_of, check_forms, check_scale
from qwen3cp.weights.reader import LoadReport, OpenFiles, Task, tasks_of

if TYPE_CHECKING:
    from qwen3cp.model import CPQwen3MoeForCausalLM

__all__ = [
    "Checkpoint",
    "build_empty",
    "config_of",
    "load_pretrained",
    "read_json",
    "resolve_dtype",
]

NUM_ROUNDS = 8
"""Times during reading that the ranks tell one another whether they failed."""
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A folder that can be loaded: its config and its tensors, all accounted for."""

    config: Qwen3MoeConfig
    index: CheckpointIndex
    block: tuple[int, int] | None
    """Of float8 tensors."""
    layout: list[Parameter]
    """What the parameters of one rank are made of."""
    placement: ExpertPlacement | None
    manifest: ShardManifest | None = None
    """Of a folder that `qwen3cp shard` made."""

    @classmethod
    def read(
        cls,
        folder: Path,
        ctx: ParallelContext,
        config: Qwen3MoeConfig | None = None,
        expert_placement: Placement = None,
    ) -> Checkpoint:
        """Reads config, index and headers, and checks that the tensors are those of the config.

        Args:
            ctx: the rank of the layout.
            config: instead of the folder's.
        """
        path = folder / CONFIG_FILE
        values = {} if config is not None and not path.is_file() else read_json(path)
        block = block_size_of(values, path)
        config = config_of(values, path) if config is None else copy.deepcopy(config)
        config.__dict__.pop("quantization_config", None)  # parameters are not quantised
        check_supported(config, ctx)
        placement = ExpertPlacement.of(expert_placement, config)
        if (folder / MANIFEST_FILE).is_file():
            if placement is not None:
                raise InputError(
                    f"{folder} was cut for ranks with the experts in their own order: leave out "
                    "expert_placement, or load the checkpoint that it was cut from"
                )
            manifest = ShardManifest.read(folder)
            index = manifest.index_of(ctx)
            layout = [whole_parameter(p) for p in parameter_layout(config, ctx)]
            checkpoint = cls(config, index, None, layout, None, manifest)
        else:
            index = CheckpointIndex.read(folder)
            layout = parameter_layout(config, ctx, index.tensors, placement)
            checkpoint = cls(config, index, block, layout, placement)
        checkpoint._account(ctx)
        return checkpoint

    def _account(self, ctx: ParallelContext) -> None:
        """Nothing missing, nothing left over, every shape and dtype right.

        In a checkpoint that is not cut for ranks, all tensors count, also those of other ranks.
        """
        index, tensors = self.index, self.index.tensors
        layout = self.layout
        if self.manifest is None and ctx.moe == "ep":
            layout = parameter_layout(self.config, ParallelContext.single(), tensors)
        shapes = {piece.source: piece.shape for p in layout for piece in p.pieces}
        scales = {f"{name}{FP8_SCALE}" for name in shapes if _is_fp8(tensors.get(name))}
        left = sorted(
            name
            for name in tensors
            if name not in shapes and name not in scales and not is_ignored(name, self.config)
        )
        check_forms(left, index.folder)
        missing = sorted(shapes.keys() - tensors.keys())
        if missing:
            raise CheckpointError(
                f"{index.folder} lacks {len(missing)} of {len(shapes)} tensors: {first_of(missing)}"
            )
        if left:
            raise CheckpointError(
                f"{index.folder} has {len(left)} tensors that this config has no place for: "
                f"{first_of(left)}"
            )
        for name, shape in shapes.items():
            stored = tensors[name]
            if stored.shape != shape:
                raise CheckpointError(
                    f"{name} in {index.folder / stored.file} has the shape {stored.shape}, the "
                    f"config says {shape}"
                )
            if stored.dtype == FP8:
                check_scale(name, stored, tensors.get(f"{name}{FP8_SCALE}"), self.block)
            elif stored.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    f"{name} in {index.folder / stored.file} is {stored.dtype}; only bfloat16, "
                    "float16, float32 and float64 tensors load, and block-wise float8_e4m3fn"
                )


def load_pretrained(
    model_class: type[CPQwen3MoeForCausalLM],
    name_or_path: str | Path,
    ctx: ParallelContext,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    config: Qwen3MoeConfig | None,
    expert_placement: Placement,
    share_reads: bool,
    progress: bool | None,
    hub_kwargs: dict[str, Any],
) -> CPQwen3MoeForCausalLM:
    """`CPQwen3MoeForCausalLM.from_pretrained`. Collective over the replica."""
    start = time.perf_counter()
    model = checkpoint = error = None
    digest = bytes(16)
    try:
        folder = find_checkpoint(str(name_or_path), hub_kwargs)
        with _no_garbage_collection():
            checkpoint = Checkpoint.read(folder, ctx, config, expert_placement)
            dtype = resolve_dtype(dtype, checkpoint.config)
            check_dtype(dtype, device)
            model = build_empty(
                model_class, checkpoint.config, ctx, dtype, device, checkpoint.placement
            )
        same = (
            checkpoint.config.to_json_string(),
            checkpoint.placement,
            str(dtype),
            device.type,
            share_reads,
        )
        digest = hashlib.blake2b(repr(same).encode(), digest_size=16).digest()
    except Exception as caught:  # the other ranks have to hear of it, whatever it is
        error = caught
    collectives.fail_together(
        ctx, error, digest, "values of config, dtype, device, expert_placement or share_reads"
    )
    assert model is not None and checkpoint is not None

    targets: dict[str, torch.Tensor] = dict(model.named_parameters())
    layout = checkpoint.layout
    _check_cover(layout, targets)
    owners = _owners(layout, ctx) if share_reads and ctx.cp_size > 1 else {}
    mine = [p for p in layout if owners.get(p.name, ctx.cp_rank) == ctx.cp_rank]
    bytes_read, seconds_reading = _read(checkpoint, mine, targets, ctx, progress)
    error = None
    try:
        if checkpoint.manifest is not None:
            checkpoint.manifest.check_tensors(checkpoint.index, mine, targets)
    except CheckpointError as caught:
        error = caught
    collectives.fail_together(ctx, error)
    bytes_received = 0
    for name, owner in owners.items():
        collectives.pass_on(targets[name], ctx, owner)
        if owner != ctx.cp_rank:
            bytes_received += targets[name].nbytes

    model.name_or_path = str(name_or_path)
    model.tie_weights()
    nn.Module.to(model, device)  # buffers: the rotary frequencies, which stay float32
    generation = checkpoint.index.folder / GENERATION_FILE
    if generation.is_file():
        model.generation_config = GenerationConfig.from_pretrained(generation.parent)
    model.load_report = LoadReport(
        bytes_read=bytes_read,
        bytes_received=bytes_received,
        parameter_bytes=sum(targets[p.name].nbytes for p in layout),
        seconds=time.perf_counter() - start,
        seconds_reading=seconds_reading,
    )
    return model.requires_grad_(False).eval()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The plan of a load is some hundred thousand objects, all of which stay: looking for garbage
    among them, again and again, would take a third of the time of loading many small tensors."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def resolve_dtype(dtype: torch.dtype | str, config: Qwen3MoeConfig) -> torch.dtype:
    """A dtype, its name, or "auto" for the config's."""
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    if isinstance(dtype, str):
        resolved = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(resolved, torch.dtype):
            raise InputError(f"dtype {dtype!r} is unknown; pass 'auto', 'bfloat16' or 'float32'")
        dtype = resolved
    return dtype


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def config_of(values: dict[str, Any], path: Path) -> Qwen3MoeConfig:
    if values.get("model_type") != "qwen3_moe":
        raise UnsupportedConfigError(
            f"{path} is of model_type {values.get('model_type')!r}; only 'qwen3_moe' can be loaded"
        )
    try:
        return Qwen3MoeConfig.from_dict(values)
    except Exception as error:  # transformers checks the values, with errors of several kinds
        raise CheckpointError(f"{path} is no Qwen3-MoE config: {error}") from error


def _is_fp8(stored: Any) -> bool:
    return stored is not None and stored.dtype == FP8


def build_empty(
    model_class: type[CPQwen3MoeForCausalLM],
    config: Qwen3MoeConfig,
    ctx: ParallelContext,
    dtype: torch.dtype,
    device: torch.device,
    expert_placement: ExpertPlacement | None = None,
) -> CPQwen3MoeForCausalLM:
    """The model, with parameters allocated once, where they will stay, and not filled. Buffers
    are on the CPU. Sets the config's dtype."""
    config.dtype = dtype
    # transformers would draw initial values, which takes its time on the meta device, too
    with init_empty_weights(), no_init_weights():
        model = model_class(config, parallel_context=ctx, expert_placement=expert_placement)
    meta: dict[nn.Module, dict[str, nn.Parameter]] = {
        module: dict(module.named_parameters(recurse=False)) for module in model.modules()
    }
    for layer in cast(Any, model.model.layers):  # one storage, so that one product can make both
        key, value = layer.self_attn.k_proj, layer.self_attn.v_proj
        width, hidden = key.weight.shape
        joined = torch.empty(2 * width, hidden, dtype=dtype, device=device)
        for module, half in zip((key, value), joined.chunk(2), strict=True):
            module.weight = nn.Parameter(half, requires_grad=False)
            del meta[module]["weight"]
    for module, parameters in meta.items():
        for name, parameter in parameters.items():
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return model


def _check_cover(layout: list[Parameter], targets: dict[str, torch.Tensor]) -> None:
    """The layout is of this model, and fills every element once. Our own invariant."""
    assert {p.name for p in layout} == targets.keys() - {"lm_head.weight"} | (
        {"lm_head.weight"} & {p.name for p in layout}
    )
    for parameter in layout:
        assert targets[parameter.name].shape == parameter.shape, parameter.name
        assert sum(piece.numel for piece in parameter.pieces) == parameter.numel, parameter.name


def _owners(layout: list[Parameter], ctx: ParallelContext) -> dict[str, int]:
    """The CP rank that reads each parameter that all CP ranks hold, evenly by size."""
    owners, loads = {}, [0] * ctx.cp_size
    for parameter in layout:
        per_rank = parameter.name == "lm_head.weight" or (
            ctx.moe == "ep" and ".experts." in parameter.name
        )
        if not per_rank and parameter.numel:
            owners[parameter.name] = owner = loads.index(min(loads))
            loads[owner] += parameter.numel
    return owners


def _read(
    checkpoint: Checkpoint,
    layout: Iterable[Parameter],
    targets: dict[str, torch.Tensor],
    ctx: ParallelContext,
    progress: bool | None,
) -> tuple[int, float]:
    """Fills this rank's parameters: (bytes read, seconds). Collective over the replica."""
    index, error = checkpoint.index, None
    rounds: list[list[Task]] = [[] for _ in range(NUM_ROUNDS)]
    total, start = 0, time.perf_counter()
    try:
        with _no_garbage_collection():
            tasks = tasks_of(layout, index.tensors, targets)
        total = sum(task.num_bytes for task in tasks)
        done = 0
        for task in tasks:
            rounds[done * NUM_ROUNDS // total].append(task)
            done += task.num_bytes
    except Exception as caught:
        error = caught
    with (
        OpenFiles(index.folder, index.tensors, checkpoint.block) as files,
        tqdm(
            total=total,
            desc="reading weights",
            unit="B",
            unit_scale=True,
            disable=True if ctx.rank or ctx.dp_rank else None if progress is None else not progress,
        ) as bar,
    ):
        for tasks in rounds:
            try:
                if error is None:
                    files.run(tasks, bar.update)
            except Exception as caught:
                error = caught
            collectives.fail_together(ctx, error)
    return files.bytes_read, time.perf_counter() - start

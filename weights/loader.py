"""Building a model and filling its parameters, file by file, with a rank's slices."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, Qwen3MoeConfig

from qwen3cp.config import check_dtype, check_supported
from qwen3cp.errors import CheckpointError, InputError, UnsupportedConfigError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.index import CheckpointIndex, find_checkpoint, open_safetensors
from qwen3cp.weights.layout import Piece, is_ignored, parameter_layout

if TYPE_CHECKING:
    from qwen3cp.model import CPQwen3MoeForCausalLM

__all__ = ["load_pretrained"]


def load_pretrained(
    model_class: type[CPQwen3MoeForCausalLM],
    name_or_path: str | Path,
    ctx: ParallelContext,
    *,
    dtype: torch.dtype | str,
    device: torch.device,
    config: Qwen3MoeConfig | None,
    hub_kwargs: dict[str, Any],
) -> CPQwen3MoeForCausalLM:
    """`CPQwen3MoeForCausalLM.from_pretrained` of one rank. Not collective."""
    folder = find_checkpoint(str(name_or_path), hub_kwargs)
    config = _read_config(folder) if config is None else copy.deepcopy(config)
    check_supported(config, ctx)
    dtype = _resolve_dtype(dtype, config)
    check_dtype(dtype, device)
    index = CheckpointIndex.read(folder)

    config.dtype = dtype
    with init_empty_weights():
        model = model_class(config, parallel_context=ctx)
    layout = list(parameter_layout(config, ctx, model.local_vocabulary, index.file_of))
    _account(layout, index, config)
    _allocate(model, dtype, device)
    _fill(model, layout, index)
    model.tie_weights()
    nn.Module.to(model, device)  # buffers: the rotary frequencies, which stay float32
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def _read_config(folder: Path) -> Qwen3MoeConfig:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "qwen3_moe":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise UnsupportedConfigError(
            f"{path} is of model_type {kind!r}; only 'qwen3_moe' can be loaded"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise UnsupportedConfigError(f"{path} says quantised ({method}); only float tensors load")
    return Qwen3MoeConfig.from_dict(values)


def _resolve_dtype(dtype: torch.dtype | str, config: Qwen3MoeConfig) -> torch.dtype:
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    if isinstance(dtype, str):
        resolved = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(resolved, torch.dtype):
            raise InputError(f"dtype {dtype!r} is unknown; pass 'auto', 'bfloat16' or 'float32'")
        dtype = resolved
    return dtype


def _account(layout: list[Piece], index: CheckpointIndex, config: Qwen3MoeConfig) -> None:
    """Nothing missing, nothing left over."""
    needed = {piece.source for piece in layout}
    missing = sorted(needed - index.file_of.keys())
    if missing:
        raise CheckpointError(
            f"{index.folder} lacks {len(missing)} of {len(needed)} tensors: {_first(missing)}"
        )
    left = (name for name in index.file_of if name not in needed and not is_ignored(name, config))
    unexpected = sorted(left)
    if unexpected:
        raise CheckpointError(
            f"{index.folder} has {len(unexpected)} tensors that this config has no place for: "
            f"{_first(unexpected)}"
        )


def _allocate(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces the meta parameters by uninitialised ones, once, where they will stay."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _fill(model: nn.Module, layout: list[Piece], index: CheckpointIndex) -> None:
    parameters = dict(model.named_parameters())
    by_file: dict[str, list[Piece]] = defaultdict(list)
    for piece in layout:
        by_file[index.file_of[piece.source]].append(piece)
    for name in sorted(by_file):
        path = index.folder / name
        with open_safetensors(path) as file:
            order = {tensor: place for place, tensor in enumerate(file.offset_keys())}
            absent = sorted({p.source for p in by_file[name]} - order.keys())
            if absent:
                raise CheckpointError(f"{path} lacks tensors of the index: {_first(absent)}")
            for piece in sorted(by_file[name], key=lambda piece: order[piece.source]):
                try:
                    _copy(parameters[piece.parameter], piece, file, path)
                except SafetensorError as error:
                    raise CheckpointError(f"{piece.source} in {path}: {error}") from error


def _copy(parameter: torch.Tensor, piece: Piece, file: Any, path: Path) -> None:
    """Reads one slice and copies it into place, casting on the way."""
    source = file.get_slice(piece.source)
    shape = tuple(source.get_shape())
    if shape != piece.source_shape:
        raise CheckpointError(
            f"{piece.source} in {path} has the shape {shape}, the config says {piece.source_shape}"
        )
    values = source[piece.source_slice]
    if not values.is_floating_point() or values.element_size() < 2:
        raise CheckpointError(
            f"{piece.source} in {path} is {values.dtype}; only bfloat16, float16, float32 and "
            "float64 tensors load"
        )
    target = parameter[piece.target]
    target.copy_(values.view(target.shape))


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

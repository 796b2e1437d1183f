"""Quantised checkpoints: block-wise FP8 is dequantised while it is read, others are refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from qwen3cp.errors import CheckpointError, UnsupportedConfigError
from qwen3cp.weights.safetensors_file import StoredTensor

__all__ = ["FP8", "FP8_SCALE", "block_size_of", "check_forms", "dequantise", "scale_shape"]

FP8 = torch.float8_e4m3fn
FP8_SCALE = "_scale_inv"
"""What the name of a scale has after that of its tensor."""
SUPPORTED = (
    "unquantised checkpoints in bfloat16, float16 or float32, and block-wise FP8 "
    "(quant_method 'fp8' with a weight_block_size, such as Qwen's -FP8 releases)"
)
FORM_OF_SUFFIX = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors (W8A8)",
    ".weight_zero_point": "compressed-tensors",
    ".weight_offset": "msModelSlim (W8A8)",
    ".deq_scale": "msModelSlim (W8A8)",
    ".quant_bias": "msModelSlim (W8A8)",
    ".weight_format": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".input_scale": "FP8 with static activation scales",
}
"""Tensors that a quantised form has and an unquantised one has not."""


def block_size_of(values: dict[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale, from config.json; None: not quantised.

    Raises:
        UnsupportedConfigError: another form than block-wise FP8.
    """
    quantised = values.get("quantization_config") or values.get("compression_config")
    if not quantised:
        return None
    if not isinstance(quantised, dict):
        quantised = {"quant_method": quantised}
    method = quantised.get("quant_method")
    if method != "fp8":
        raise UnsupportedConfigError(f"{path} says quantised ({method}); what loads: {SUPPORTED}")
    block, scheme = quantised.get("weight_block_size"), quantised.get("activation_scheme")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise UnsupportedConfigError(
            f"{path} says FP8 with weight_block_size {block}; what loads: {SUPPORTED}"
        )
    if scheme == "static" or quantised.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedConfigError(
            f"{path} says FP8 with activation_scheme {scheme} and fmt {quantised.get('fmt')}; only "
            "dynamic and e4m3 load"
        )
    return sizes[0], sizes[1]


def check_forms(names: Iterable[str], folder: Path) -> None:
    """Refuses by name the quantised forms that a config does not mention."""
    for name in names:
        for suffix, form in FORM_OF_SUFFIX.items():
            if name.endswith(suffix):
                raise UnsupportedConfigError(
                    f"{folder} has {name}: it is quantised ({form}); what loads: {SUPPORTED}"
                )
    if list(folder.glob("quant_model_description*.json")):
        raise UnsupportedConfigError(
            f"{folder} has a quant_model_description: it is quantised (msModelSlim); what loads: "
            f"{SUPPORTED}"
        )


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales of a tensor; blocks at its edges may be cut off."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // block[0]), -(-columns // block[1]))


def check_scale(
    name: str, weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int] | None
) -> None:
    """Raises CheckpointError unless a float8 tensor comes with fitting scales."""
    if block is None:
        raise CheckpointError(
            f"{name} in {weight.file} is float8, but config.json has no quantization_config with "
            "the size of its blocks"
        )
    if len(weight.shape) < 2:
        raise CheckpointError(f"{name} in {weight.file} is a float8 vector, without blocks")
    if scale is None:
        raise CheckpointError(f"{name} in {weight.file} is float8, but has no {name}{FP8_SCALE}")
    expected = scale_shape(weight.shape, block)
    if scale.shape != expected or scale.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(
            f"{name}{FP8_SCALE} in {scale.file} is {scale.dtype} of the shape {scale.shape}, not "
            f"float32 or bfloat16 of the shape {expected}, as blocks of {block} need"
        )


def dequantise(
    values: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    first_row: int,
    first_column: int,
) -> torch.Tensor:
    """values times their blocks' scales, in float32.

    Args:
        values: float8 [R, C], a part of a tensor that starts at (first_row, first_column).
        scales: [ceil(rows / block[0]), ceil(columns / block[1])] of that whole tensor.
    """
    rows, columns = (
        torch.arange(first, first + count) // size
        for first, count, size in zip((first_row, first_column), values.shape, block, strict=True)
    )
    return values.float().mul_(scales.float()[rows][:, columns])

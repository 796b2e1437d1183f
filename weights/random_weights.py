"""Random checkpoints of any config, written without holding the model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig

from qwen3cp.config import check_supported
from qwen3cp.errors import InputError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.folder import new_folder
from qwen3cp.weights.index import CONFIG_FILE, find_config
from qwen3cp.weights.loader import config_of, read_json, resolve_dtype
from qwen3cp.weights.safetensors_file import SafetensorsWriter
from qwen3cp.weights.whole import DEFAULT_SHARD_SIZE, WholeCheckpoint

__all__ = ["make_random", "read_config"]

CHUNK = 4 << 20
"""Elements that are made at a time."""


def read_config(name_or_path: str) -> Qwen3MoeConfig:
    """Of a config.json, a folder that has one, or a hub repository.

    Raises:
        CheckpointError, UnsupportedConfigError
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / CONFIG_FILE
    elif not path.is_file():
        path = find_config(name_or_path)
    return config_of(read_json(path), path)


def make_random(
    config: Qwen3MoeConfig,
    folder: Path,
    *,
    dtype: torch.dtype | str = torch.bfloat16,
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> WholeCheckpoint:
    """Writes a checkpoint that this package and transformers load. Not collective.

    Values are uniform, with the standard deviation `config.initializer_range`; those of norms lie
    around 1. They depend on the seed and the tensor's name, not on the size of the files.

    Raises:
        InputError: the folder exists and is not empty.
        CheckpointError: the disk is full.
    """
    check_supported(config, ParallelContext.single())
    dtype = resolve_dtype(dtype, config)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    plan = WholeCheckpoint.plan(config, dtype, max_shard_size)
    around_zero, around_one = (
        (_UNIFORM * config.initializer_range + mean).to(dtype) for mean in (0, 1)
    )
    with new_folder(folder, plan.num_bytes) as temporary:
        for name, tensors in plan.headers():
            with SafetensorsWriter(temporary / name, tensors) as file:
                for tensor, (_, shape) in tensors.items():
                    table = around_one if "norm" in tensor else around_zero
                    for values in _values(table, tensor, math.prod(shape), seed):
                        file.write(values)
        plan.write_rest(temporary, None)
    return plan


_UNIFORM = (torch.arange(2**16) - (2**16 - 1) / 2).double() * math.sqrt(12) / 2**16
"""65,536 values of a uniform distribution with mean 0 and standard deviation 1."""


def _values(table: torch.Tensor, name: str, count: int, seed: int) -> Iterator[torch.Tensor]:
    """Entries of a table, drawn at random, in chunks."""
    entries = table.view(torch.int16 if table.itemsize == 2 else torch.int32).numpy()
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    for start in range(0, count, CHUNK):
        drawn = np.frombuffer(generator.bytes(2 * min(CHUNK, count - start)), dtype="<u2")
        yield torch.from_numpy(entries[drawn]).view(table.dtype)

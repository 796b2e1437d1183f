"""A whole checkpoint as it is written: which tensors in which files, index and config.

Per expert, as Qwen releases them and transformers writes them.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3MoeConfig

from qwen3cp.errors import InputError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.index import CONFIG_FILE, GENERATION_FILE, INDEX_FILE, SINGLE_FILE
from qwen3cp.weights.layout import parameter_layout

__all__ = ["DEFAULT_SHARD_SIZE", "WholeCheckpoint", "shard_bytes"]

DEFAULT_SHARD_SIZE = "5GB"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def shard_bytes(size: int | str) -> int:
    """Bytes of "5GB" and the like, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", str(size).upper().strip())
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    elif isinstance(size, str) and match and match[2] in UNITS:
        value = int(float(match[1]) * UNITS[match[2]])
    else:
        value = 0
    if value < 1:
        raise InputError(f"max_shard_size must be bytes or such as '5GB', got {size!r}")
    return value


@dataclass(frozen=True)
class WholeCheckpoint:
    """What will be written."""

    config: Qwen3MoeConfig
    dtype: torch.dtype
    files: dict[str, dict[str, tuple[int, ...]]]
    """File name -> tensor name -> shape, in the order of writing."""

    @classmethod
    def plan(
        cls, config: Qwen3MoeConfig, dtype: torch.dtype, max_shard_size: int | str
    ) -> WholeCheckpoint:
        """A file is full when the next tensor would take it above max_shard_size."""
        limit = shard_bytes(max_shard_size)
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        size = 0
        for parameter in parameter_layout(config, ParallelContext.single()):
            for piece in parameter.pieces:
                num_bytes = math.prod(piece.shape) * dtype.itemsize
                if shards[-1] and size + num_bytes > limit:
                    shards.append({})
                    size = 0
                shards[-1][piece.source] = piece.shape
                size += num_bytes
        count = len(shards)
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [SINGLE_FILE]
        config = copy.deepcopy(config)
        config.architectures = ["Qwen3MoeForCausalLM"]  # which transformers looks up
        config.dtype = dtype
        return cls(config, dtype, dict(zip(names, shards, strict=True)))

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for file in self.files.values() for shape in file.values())

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return self.numel * self.dtype.itemsize

    def headers(self) -> Iterator[tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]]:
        """Each file, and what `SafetensorsWriter` takes for it."""
        for name, tensors in self.files.items():
            yield name, {tensor: (self.dtype, shape) for tensor, shape in tensors.items()}

    def write_rest(self, folder: Path, generation: GenerationConfig | None) -> None:
        """Config and index, after the tensors: a folder without them is not a checkpoint."""
        if generation is not None:
            generation.to_json_file(folder / GENERATION_FILE)
        self.config.to_json_file(folder / CONFIG_FILE)
        if len(self.files) > 1:
            metadata = {"total_size": self.num_bytes, "total_parameters": self.numel}
            weight_map = {
                tensor: name for name, tensors in self.files.items() for tensor in tensors
            }
            index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

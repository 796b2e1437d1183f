"""`qwen3cp shard`: a checkpoint cut for the ranks of one topology, so that loading cuts nothing."""

from __future__ import annotations

import shutil
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from qwen3cp.config import check_supported
from qwen3cp.errors import InputError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.folder import new_folder
from qwen3cp.weights.index import CONFIG_FILE, GENERATION_FILE, find_checkpoint
from qwen3cp.weights.layout import Parameter, parameter_layout
from qwen3cp.weights.loader import Checkpoint, resolve_dtype
from qwen3cp.weights.manifest import (
    MANIFEST_FILE,
    ShardFile,
    ShardManifest,
    checksum,
    digest_of,
)
from qwen3cp.weights.reader import OpenFiles, tasks_of
from qwen3cp.weights.safetensors_file import SafetensorsWriter

__all__ = ["describe_all", "shard"]

TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


def describe_all(cp_size: int, tp_size: int, moe: Literal["tp", "ep"]) -> list[ParallelContext]:
    """Every rank of a topology."""
    describe = ParallelContext.describe
    first = describe(0, cp_size=cp_size, tp_size=tp_size, moe=moe)
    return [
        describe(rank, cp_size=cp_size, tp_size=tp_size, moe=moe)
        for rank in range(first.world_size)
    ]


def shard(
    name_or_path: str,
    out: Path,
    *,
    cp_size: int = 1,
    tp_size: int = 1,
    moe: Literal["tp", "ep"] = "tp",
    dtype: torch.dtype | str = "auto",
    progress: bool | None = None,
    **hub_kwargs: Any,
) -> ShardManifest:
    """Writes a folder that `from_pretrained` loads on cp_size x tp_size ranks, with no slicing.

    One process, which holds one parameter at a time. What several ranks hold is written once.

    Raises:
        InputError: `out` exists and is not empty, or the model was cut already.
        CheckpointError, UnsupportedConfigError, ParallelConfigError: as of loading.
    """
    contexts = describe_all(cp_size, tp_size, moe)
    folder = find_checkpoint(name_or_path, hub_kwargs)
    if (folder / MANIFEST_FILE).is_file():
        source = ShardManifest.read(folder).source
        raise InputError(f"{name_or_path} was cut for ranks already: cut {source}, which it is of")
    checkpoint = Checkpoint.read(folder, ParallelContext.single())
    check_supported(checkpoint.config, contexts[0])
    dtype = resolve_dtype(dtype, checkpoint.config)
    if dtype not in (torch.bfloat16, torch.float32):
        raise InputError(f"dtype must be bfloat16 or float32, got {dtype}")

    # for each parameter: its different parts, and the ranks that hold each
    parts: dict[str, dict[Parameter, list[int]]] = defaultdict(lambda: defaultdict(list))
    for ctx in contexts:
        for parameter in parameter_layout(checkpoint.config, ctx, checkpoint.index.tensors):
            parts[parameter.name][parameter].append(ctx.rank)
    by_ranks: dict[tuple[int, ...], dict[str, Parameter]] = defaultdict(dict)
    for name, variants in parts.items():
        for parameter, ranks in variants.items():
            by_ranks[tuple(ranks)][name] = parameter
    groups = sorted(by_ranks)
    names = {
        ranks: f"shard-{number:05}-of-{len(groups):05}.safetensors"
        for number, ranks in enumerate(groups, 1)
    }
    total = dtype.itemsize * sum(p.numel for file in by_ranks.values() for p in file.values())

    checksums: dict[tuple[int, ...], dict[str, str]] = defaultdict(dict)
    with new_folder(out, total) as temporary, ExitStack() as stack:
        writers = {}
        for ranks, file in by_ranks.items():
            header = {name: (dtype, parameter.shape) for name, parameter in file.items()}
            writer = SafetensorsWriter(temporary / names[ranks], header)
            writers[ranks] = stack.enter_context(writer)
        files = stack.enter_context(OpenFiles(folder, checkpoint.index.tensors, checkpoint.block))
        bar = stack.enter_context(
            tqdm(
                total=total,
                desc="cutting weights",
                unit="B",
                unit_scale=True,
                disable=None if progress is None else not progress,
            )
        )
        for name in parts:  # its parts lie side by side on disk
            for parameter, ranks in parts[name].items():
                values = torch.empty(parameter.shape, dtype=dtype)
                tasks = tasks_of([parameter], checkpoint.index.tensors, {name: values})
                files.run(tasks, lambda _: None)
                writers[tuple(ranks)].write(values)
                checksums[tuple(ranks)][name] = checksum(values)
                bar.update(values.nbytes)
        stack.close()  # the files are on disk
        config = checkpoint.config
        config.dtype = dtype
        config.to_json_file(temporary / CONFIG_FILE)
        _copy_small_files(folder, temporary)
        manifest = ShardManifest(
            folder=temporary,
            source=name_or_path,
            cp_size=cp_size,
            tp_size=tp_size,
            moe=moe,
            dtype=str(dtype).removeprefix("torch."),
            config_checksum=digest_of(temporary / CONFIG_FILE),
            files={
                names[ranks]: ShardFile(ranks=list(ranks), checksums=checksums[ranks])
                for ranks in groups
            },
        )
        manifest.write()
    return manifest


def _copy_small_files(source: Path, target: Path) -> None:
    """What a user of the checkpoint needs beside the weights."""
    for pattern in (GENERATION_FILE, *TOKENIZER_FILES):
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)

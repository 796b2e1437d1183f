"""Finding a checkpoint, and which tensors it has, in which file and at which bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from qwen3cp.errors import CheckpointError, InputError
from qwen3cp.weights.safetensors_file import StoredTensor, read_header, unique_keys

__all__ = [
    "CONFIG_FILE",
    "INDEX_FILE",
    "SINGLE_FILE",
    "CheckpointIndex",
    "find_checkpoint",
    "find_config",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.bin.index.json")


def find_checkpoint(name_or_path: str, hub_kwargs: dict[str, Any]) -> Path:
    """The folder of a checkpoint: a local one, or the files of a hub repository, downloaded.

    Raises:
        InputError: an argument that neither needs.
        CheckpointError: no such folder or repository.
    """
    unknown = sorted(set(hub_kwargs) - set(HUB_ARGUMENTS))
    if unknown:
        raise InputError(
            f"from_pretrained does not take {', '.join(unknown)}; beside its named arguments it "
            f"takes {', '.join(HUB_ARGUMENTS)}"
        )
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    with _named(name_or_path):
        return _download(name_or_path, hub_kwargs)


def find_config(repository: str) -> Path:
    """config.json of a hub repository, downloaded."""
    with _named(repository):
        return Path(hf_hub_download(repository, CONFIG_FILE))


@contextmanager
def _named(repository: str) -> Iterator[None]:
    """huggingface_hub's errors as ours."""
    try:
        yield
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{repository!r} is neither a folder nor a hub repository that can be downloaded: "
            f"{error}"
        ) from error


def _download(repository: str, hub_kwargs: dict[str, Any]) -> Path:
    """Small files first, then the weights that the index names: nothing else is downloaded."""
    folder = Path(hf_hub_download(repository, CONFIG_FILE, **hub_kwargs)).parent
    # the folder is named by its commit: all other files come from the same one
    pinned = {**hub_kwargs, "revision": folder.name}
    _download_if_there(repository, GENERATION_FILE, pinned)
    if _download_if_there(repository, INDEX_FILE, pinned):
        files = sorted(set(read_weight_map(folder / INDEX_FILE).values()))
        snapshot_download(repository, allow_patterns=files, **pinned)
    elif not _download_if_there(repository, SINGLE_FILE, pinned):
        raise CheckpointError(
            f"the repository {repository} has neither {INDEX_FILE} nor {SINGLE_FILE}; only "
            "safetensors checkpoints can be loaded"
        )
    return folder


def _download_if_there(repository: str, name: str, hub_kwargs: dict[str, Any]) -> bool:
    try:
        hf_hub_download(repository, name, **hub_kwargs)
    except LocalEntryNotFoundError:
        if not hub_kwargs.get("local_files_only"):
            raise
        return False
    except EntryNotFoundError:
        return False
    return True


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index file. Names of files stay inside the folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        weight_map = index["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map does not map tensors to files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
    for name in sorted(set(weight_map.values())):
        tensor = next(tensor for tensor, file in weight_map.items() if file == name)
        if Path(name).name != name or name == ".." or "\0" in name:
            raise CheckpointError(f"{path} puts {tensor} into {name!r}, not in the folder")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} puts {tensor} into {name!r}; only safetensors files can be loaded"
            )
    return weight_map


@dataclass(frozen=True)
class CheckpointIndex:
    """Place, dtype and shape of every tensor of a checkpoint folder.

    The index file, where there is one, says which files count; others in the folder do not. It is
    held to the headers of the files that it names.
    """

    folder: Path
    tensors: dict[str, StoredTensor]
    """By name; within a file, in the order of their bytes."""

    @cached_property
    def file_of(self) -> dict[str, str]:
        """Tensor name -> file name."""
        return {name: tensor.file for name, tensor in self.tensors.items()}

    @property
    def files(self) -> list[str]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @classmethod
    def read(cls, folder: Path) -> CheckpointIndex:
        """Reads the index and every header; no tensor.

        Raises:
            CheckpointError: there is no index, it names files that are not there, a file is
                damaged, or index and headers disagree.
        """
        folder = Path(folder)
        if (folder / INDEX_FILE).is_file():
            return cls(folder, _read_indexed(folder, read_weight_map(folder / INDEX_FILE)))
        if (folder / SINGLE_FILE).is_file():
            return cls(folder, read_header(folder / SINGLE_FILE))
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        raise CheckpointError(
            f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors "
            "checkpoints can be loaded"
            + (f", not pickles such as {first_of(pickles)}" if pickles else "")
        )


def _read_indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    index_path, files = folder / INDEX_FILE, sorted(set(weight_map.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        lost = [tensor for tensor, name in weight_map.items() if name == missing[0]]
        raise CheckpointError(
            f"{folder} lacks files of its index: {first_of(missing)} (with {first_of(lost)})"
        )
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        header = read_header(folder / name)
        for tensor in header:
            indexed = weight_map.get(tensor)
            if indexed is None:
                raise CheckpointError(
                    f"{folder / name} has {tensor}, which {index_path} does not know"
                )
            if indexed != name:
                raise CheckpointError(
                    f"{folder / name} has {tensor}, which {index_path} puts into {indexed}"
                )
        tensors |= header
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{folder / weight_map[absent[0]]} lacks tensors of the index: {first_of(absent)}"
        )
    return tensors


def first_of(names: list[str]) -> str:
    """The first of a long list of names, for an error message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")

"""Which tensors a checkpoint has, and in which file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from qwen3cp.errors import CheckpointError, InputError

__all__ = ["CheckpointIndex", "find_checkpoint"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only")
HUB_FILES = ("*.safetensors", INDEX_FILE, "config.json", "generation_config.json")


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
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(HUB_FILES), **hub_kwargs))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name_or_path!r} is neither a folder nor a hub repository that can be downloaded: "
            f"{error}"
        ) from error


@dataclass(frozen=True)
class CheckpointIndex:
    """File of every tensor of a checkpoint folder.

    The index file, where there is one, says which files count; others in the folder do not.
    """

    folder: Path
    file_of: dict[str, str]
    """Tensor name -> file name."""

    @classmethod
    def read(cls, folder: Path) -> CheckpointIndex:
        """Raises CheckpointError if there is no index, or it names files that are not there."""
        index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
        if index_path.is_file():
            try:
                file_of = json.loads(index_path.read_text())["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{index_path} is not a safetensors index: {error}"
                ) from error
        elif single.is_file():
            with open_safetensors(single) as file:
                file_of = dict.fromkeys(file.keys(), SINGLE_FILE)
        else:
            raise CheckpointError(
                f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors "
                "checkpoints can be loaded"
            )
        for tensor, name in file_of.items():
            if Path(name).name != name:
                raise CheckpointError(
                    f"{index_path} puts {tensor} into {name!r}, not in the folder"
                )
        missing = sorted({name for name in file_of.values() if not (folder / name).is_file()})
        if missing:
            raise CheckpointError(f"{folder} lacks files of its index: {', '.join(missing[:5])}")
        return cls(folder, file_of)


def open_safetensors(path: Path) -> Any:
    """safe_open with its errors named."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error

"""Checkpoints that were cut for the ranks of one topology: what their manifest says.

Every parameter lies in one file as it will lie in memory, under its name in the model. Parameters
that several ranks hold are in one file that all of them read.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen3cp.errors import CheckpointError
from qwen3cp.parallel import ParallelContext
from qwen3cp.weights.index import CONFIG_FILE, CheckpointIndex
from qwen3cp.weights.layout import Parameter, Piece, row_length
from qwen3cp.weights.reader import NUM_THREADS, FileReader
from qwen3cp.weights.safetensors_file import StoredTensor, bytes_of, read_header

__all__ = ["MANIFEST_FILE", "ShardFile", "ShardManifest", "checksum", "whole_parameter"]

MANIFEST_FILE = "qwen3cp-shards.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A file of parameters, and who holds them."""

    ranks: list[int]
    checksums: dict[str, str]
    """Of each tensor's bytes."""


@dataclass(frozen=True, kw_only=True)
class ShardManifest:
    """qwen3cp-shards.json."""

    folder: Path
    source: str
    """What was cut."""
    cp_size: int
    tp_size: int
    moe: Literal["tp", "ep"]
    dtype: str
    config_checksum: str
    """Of config.json."""
    files: dict[str, ShardFile]

    def write(self) -> None:
        body = asdict(self)
        del body["folder"]
        document = {"format": FORMAT, "checksum": _digest(body), **body}
        (self.folder / MANIFEST_FILE).write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> ShardManifest:
        """Raises CheckpointError if it was changed, or config.json was."""
        path = folder / MANIFEST_FILE
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            version, expected = body.pop("format"), body.pop("checksum")
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a manifest of qwen3cp shard: {error}") from error
        if version != FORMAT:
            raise CheckpointError(f"{path} has the format {version!r}; this version reads {FORMAT}")
        if _digest(body) != expected:
            raise CheckpointError(f"{path} was changed since it was written: its checksum is wrong")
        files = {name: ShardFile(**file) for name, file in body.pop("files").items()}
        manifest = cls(folder=folder, files=files, **body)
        try:
            config_checksum = digest_of(folder / CONFIG_FILE)
        except OSError as error:
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}") from error
        if config_checksum != manifest.config_checksum:
            raise CheckpointError(
                f"{folder / CONFIG_FILE} is not that of these shards; make them again with "
                f"`{manifest._command()}`"
            )
        return manifest

    def _command(self, ctx: ParallelContext | None = None) -> str:
        cp, tp, moe = self.cp_size, self.tp_size, self.moe
        if ctx is not None:
            cp, tp, moe = ctx.cp_size, ctx.tp_size, ctx.moe
        return f"qwen3cp shard {self.source} OUT --tp {tp} --cp {cp} --moe {moe}"

    def index_of(self, ctx: ParallelContext) -> CheckpointIndex:
        """The tensors of one rank.

        Raises:
            CheckpointError: the shards are of another topology; a file is missing or damaged, or
                has other tensors than the manifest says.
        """
        made_for = (self.cp_size, self.tp_size, self.moe)
        if made_for != (ctx.cp_size, ctx.tp_size, ctx.moe):
            raise CheckpointError(
                f"{self.folder} was cut for cp={self.cp_size}, tp={self.tp_size}, moe={self.moe}; "
                f"this is cp={ctx.cp_size}, tp={ctx.tp_size}, moe={ctx.moe}: make the right shards "
                f"with `{self._command(ctx)}`"
            )
        tensors: dict[str, StoredTensor] = {}
        for name, file in self.files.items():
            if ctx.rank not in file.ranks:
                continue
            path = self.folder / name
            if not path.is_file():
                lost = next(iter(file.checksums), "no tensor")
                raise CheckpointError(f"{self.folder} lacks the file {name} (with {lost})")
            header = read_header(path)
            other = sorted(header.keys() ^ file.checksums.keys())
            if other:
                raise CheckpointError(
                    f"{path} does not have the tensors of its manifest: {other[0]} is in one only"
                )
            for tensor, stored in header.items():
                if stored.dtype != getattr(torch, self.dtype):
                    raise CheckpointError(
                        f"{tensor} in {path} is {stored.dtype}, the manifest says {self.dtype}"
                    )
            tensors |= header
        return CheckpointIndex(self.folder, tensors)

    def check_tensors(
        self, index: CheckpointIndex, layout: list[Parameter], targets: dict[str, torch.Tensor]
    ) -> None:
        """Holds parameters that were filled from here to their checksums.

        Raises:
            CheckpointError: naming file and tensor.
        """
        readers = {name: FileReader(self.folder / name) for name in index.files}
        try:

            def actual(name: str) -> str:
                stored, target = index.tensors[name], targets[name]
                if target.device.type == "cpu" and target.dtype == stored.dtype:
                    return checksum(target)
                count = stored.num_bytes // stored.dtype.itemsize
                return checksum(readers[stored.file].elements(stored, stored.offset, count))

            names = [parameter.name for parameter in layout if parameter.numel]
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                for name, found in zip(names, pool.map(actual, names), strict=True):
                    file = index.tensors[name].file
                    if self.files[file].checksums[name] != found:
                        raise CheckpointError(
                            f"{name} in {self.folder / file} was changed since it was written: "
                            "its checksum is wrong"
                        )
        finally:
            for reader in readers.values():
                reader.close()


def whole_parameter(parameter: Parameter) -> Parameter:
    """A parameter that is read as it lies in memory."""
    shape = parameter.shape
    length = row_length(shape)
    rows = parameter.numel // length if length else 0
    piece = Piece(parameter.name, shape, range(rows), range(length), 0)
    return parameter._replace(pieces=(piece,))


def checksum(tensor: torch.Tensor) -> str:
    """Of the bytes of a contiguous tensor on the host: CRC-32, which finds damage, not forgery."""
    return f"{zlib.crc32(bytes_of(tensor)):08x}"


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

"""The safetensors format: headers read and checked, files written tensor by tensor.

A file is 8 bytes (the length of the header, little-endian), the header (JSON: for each tensor its
dtype, shape and first and last byte), and the tensors' bytes with no gaps. The header is parsed
here, not by the safetensors library, because the loader reads byte ranges of many small tensors,
and the writer because it must not hold a file's tensors at once.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from qwen3cp.errors import CheckpointError

__all__ = ["SafetensorsWriter", "StoredTensor", "read_header", "unique_keys"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""As of the safetensors library."""
METADATA = "__metadata__"


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""
    num_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, is cut short or too long, or its header does not
            describe it byte for byte.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise _damaged(path, f"it has {size} bytes, its header should have {length}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise _damaged(path, f"{METADATA} is not a JSON object")
    start = LENGTH_BYTES + length
    tensors = [(name, _stored(path, name, entry, start)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].offset, item[1].num_bytes))
    end = start
    for name, tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "follows a gap"
            raise _damaged(path, f"{name} starts at byte {tensor.offset}, not {end}: it {kind}")
        end += tensor.num_bytes
        if end > size:
            raise _damaged(
                path, f"{name} should end at byte {end}, but the file has {size}: it was cut short"
            )
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}, but the file has {size}")
    return dict(tensors)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads, which would keep the last of several equal keys."""
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _stored(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        dtype_name, shape, (first, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, first, end)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"{name} lacks dtype, shape or data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(path, f"{name} has the shape {shape} and the offsets {[first, end]}")
    dtype = DTYPES.get(dtype_name) if isinstance(dtype_name, str) else None
    if dtype is None:
        raise _damaged(path, f"{name} has the dtype {dtype_name!r}, which cannot be read")
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - first != num_bytes:
        raise _damaged(
            path,
            f"{name} has {end - first} bytes, but {dtype_name} of the shape {shape} has "
            f"{num_bytes}",
        )
    return StoredTensor(path.name, dtype, tuple(shape), start + first, num_bytes)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as safetensors: {why}")


class SafetensorsWriter:
    """Writes a file whose tensors come one after another, in pieces if need be.

    A context manager; the file is on disk, and complete, when the block ends without an error.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            tensors: dtype and shape of every tensor, in the order in which they will be written.
            metadata: None is {"format": "pt"}, without which transformers refuses a file.
        """
        header: dict[str, Any] = {METADATA: dict(metadata or {"format": "pt"})}
        end = 0
        for name, (dtype, shape) in tensors.items():
            first, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [first, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self._left = end
        self._file = path.open("xb")
        try:
            self._file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        except BaseException:
            self._file.close()
            raise

    def write(self, values: torch.Tensor) -> None:
        """The next elements of the next tensor, in their order; on the host, contiguous."""
        data = bytes_of(values)
        self._left -= len(data)
        assert self._left >= 0, "more was written than the header says"
        self._file.write(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                assert self._left == 0, f"{self._left} bytes were not written"
                self._file.flush()
                os.fsync(self._file.fileno())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host, which may be written to."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data

"""Filling parameters from files: in offset order, ahead in threads, straight into place.

What lies on disk as it does in memory is read by one `preadv` into the parameters themselves, many
tensors at a time. Anything else (columns of a matrix, another dtype, float8, another device) is
copied out of a mapping of the file, which touches only the bytes that are wanted.
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from qwen3cp.errors import CheckpointError
from qwen3cp.weights.layout import Parameter, Piece, row_length
from qwen3cp.weights.quantised import FP8, FP8_SCALE, dequantise
from qwen3cp.weights.safetensors_file import StoredTensor, bytes_of

__all__ = [
    "NUM_THREADS",
    "FileReader",
    "LoadReport",
    "OpenFiles",
    "Task",
    "bytes_to_read",
    "tasks_of",
]

NUM_THREADS = 4
TASK_BYTES = 4 << 20
"""What a thread takes at a time. Float8 takes nine times as much memory while it is converted."""
MAX_BUFFERS = 512
"""Of one preadv; the system's limit is 1024."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What one rank's load amounted to: `model.load_report`."""

    bytes_read: int
    """Copied out of files into this process, counted where that happens."""
    bytes_received: int
    """Passed on by other CP ranks."""
    parameter_bytes: int
    """Of the parameters that this rank holds, in their dtype; a tied head is not counted twice."""
    seconds: float
    """From the call to the model."""
    seconds_reading: float

    @property
    def bytes_per_second(self) -> float:
        """While reading."""
        return self.bytes_read / max(self.seconds_reading, 1e-9)


class Copy(NamedTuple):
    """A piece, or some rows of one, and where it goes."""

    name: str
    target: torch.Tensor
    """The flattened parameter."""
    piece: Piece
    stored: StoredTensor
    offset: int
    """Of the piece's first element in the file."""
    num_bytes: int
    """Of its elements on disk."""
    memory: memoryview | None
    """The parameter's bytes, if the piece is the same bytes in a row on disk and in memory."""


class Task(NamedTuple):
    """What one thread reads at a time: neighbours in one file."""

    file: str
    copies: list[Copy]
    num_bytes: int


def bytes_to_read(
    parameters: Iterable[Parameter],
    tensors: dict[str, StoredTensor],
    block: tuple[int, int] | None,
) -> tuple[int, int]:
    """(bytes of the pieces on disk, bytes from the first to the last of each piece).

    They differ for columns of a matrix, of which storage delivers whole pages.
    """
    wanted = spanned = 0
    for parameter in parameters:
        for piece in parameter.pieces:
            dtype, extra = tensors[piece.source].dtype, 0
            if dtype == FP8 and piece.numel:
                assert block is not None, "float8 tensors were checked"
                extra = _scale_bytes(piece, tensors, block)
            wanted += piece.numel * dtype.itemsize + extra
            spanned += _span(piece) * dtype.itemsize + extra
    return wanted, spanned


def _span(piece: Piece) -> int:
    """Elements from the first of a piece to its last, on disk."""
    if piece.numel == 0:
        return 0
    return (piece.num_rows - 1) * row_length(piece.shape) + piece.num_columns


def tasks_of(
    parameters: Iterable[Parameter],
    tensors: dict[str, StoredTensor],
    targets: dict[str, torch.Tensor],
) -> list[Task]:
    """All the reading that fills `targets`, by file and offset."""
    by_file: dict[str, list[Copy]] = defaultdict(list)
    for parameter in parameters:
        target = targets[parameter.name].detach().view(-1)
        memory = bytes_of(target) if target.device.type == "cpu" else None
        for piece in parameter.pieces:
            if piece.numel:
                stored = tensors[piece.source]
                size = stored.dtype.itemsize
                first = piece.rows.start * row_length(piece.shape) + piece.columns.start
                is_same = stored.dtype == target.dtype and piece.is_contiguous
                by_file[stored.file].append(
                    Copy(
                        parameter.name,
                        target,
                        piece,
                        stored,
                        stored.offset + first * size,
                        piece.numel * size,
                        memory if is_same else None,
                    )
                )
    tasks = []
    for file in sorted(by_file):
        copies, num_bytes = [], 0
        for copy in sorted(by_file[file], key=lambda copy: copy.offset):
            for part in _cut(copy) if copy.num_bytes > TASK_BYTES else (copy,):
                if copies and num_bytes + part.num_bytes > TASK_BYTES:
                    tasks.append(Task(file, copies, num_bytes))
                    copies, num_bytes = [], 0
                copies.append(part)
                num_bytes += part.num_bytes
        tasks.append(Task(file, copies, num_bytes))
    return tasks


def _cut(copy: Copy) -> Iterator[Copy]:
    """Rows of a large piece, so that threads share it and none needs much memory."""
    piece, size = copy.piece, copy.stored.dtype.itemsize
    step = max(1, TASK_BYTES // (piece.num_columns * size))
    for first in range(0, piece.num_rows, step):
        rows = range(
            piece.rows.start + first, min(piece.rows.start + first + step, piece.rows.stop)
        )
        start = piece.start + first * piece.num_columns
        part = piece._replace(rows=rows, start=start)
        offset = copy.offset + first * row_length(piece.shape) * size
        yield copy._replace(piece=part, offset=offset, num_bytes=part.numel * size)


class FileReader:
    """One file, open for several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error

    def close(self) -> None:
        self._file.close()

    @cached_property
    def _mapping(self) -> mmap.mmap:
        # a private mapping, since torch warns of memory that cannot be written to
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def read_into(self, copies: Sequence[Copy]) -> int:
        """Reads copies that follow one another in the file, in place. Returns the bytes read."""
        buffers = []
        for copy in copies:
            assert copy.memory is not None
            start = copy.piece.start * copy.target.element_size()
            buffers.append(copy.memory[start : start + copy.num_bytes])
        offset, total = copies[0].offset, 0
        while buffers:
            count, why = 0, "the file was cut short"
            try:
                count = os.preadv(self._file.fileno(), buffers[:MAX_BUFFERS], offset + total)
            except OSError as error:
                why = str(error)
            if count == 0:
                lost = next(c for c in copies if c.offset + c.num_bytes > offset + total)
                raise CheckpointError(f"{lost.piece.source} in {self._path} cannot be read: {why}")
            total += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                buffers[0] = buffers[0][count:]
        return total

    def elements(self, stored: StoredTensor, offset: int, count: int) -> torch.Tensor:
        """[count] elements of a tensor from a byte on, in the mapping of the file."""
        return torch.frombuffer(self._mapping, dtype=stored.dtype, count=count, offset=offset)


@dataclass
class OpenFiles:
    """The files of a checkpoint, opened as they are needed. A context manager."""

    folder: Path
    tensors: dict[str, StoredTensor]
    block: tuple[int, int] | None = None
    """Of float8 tensors."""
    bytes_read: int = 0
    """Bytes that were copied out of files into memory."""
    _files: dict[str, FileReader] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(init=False)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> OpenFiles:
        self._pool = self._stack.enter_context(ThreadPoolExecutor(NUM_THREADS, "qwen3cp-read"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open(self, name: str) -> FileReader:
        if name not in self._files:
            self._files[name] = FileReader(self.folder / name)
            self._stack.callback(self._files[name].close)
        return self._files[name]

    def run(self, tasks: Sequence[Task], progress: Callable[[int], object]) -> None:
        """Does the tasks in threads, which read ahead of one another.

        Args:
            progress: is called with the bytes of each task that is done.

        Raises:
            CheckpointError: the first that occurred; tasks that had not started are dropped.
        """
        for task in tasks:
            self.open(task.file)
            for copy in task.copies:
                if copy.stored.dtype == FP8:
                    self.open(self.tensors[copy.piece.source + FP8_SCALE].file)
        pending = [self._pool.submit(self._run, task) for task in tasks]
        try:
            for done in as_completed(pending):
                count = done.result()
                self.bytes_read += count
                progress(count)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}") from error
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def _run(self, task: Task) -> int:
        """In a thread."""
        file, count = self._files[task.file], 0
        run: list[Copy] = []
        for copy in task.copies:
            follows = run and run[-1].offset + run[-1].num_bytes == copy.offset
            if run and (copy.memory is None or not follows):
                count += file.read_into(run)
                run = []
            if copy.memory is None:
                count += self._copy(file, copy)
            else:
                run.append(copy)
        return count + (file.read_into(run) if run else 0)

    def _copy(self, file: FileReader, copy: Copy) -> int:
        """One piece, out of the mapping."""
        piece, stored = copy.piece, copy.stored
        length = row_length(piece.shape)
        # from the first row's first element to the last row's last, seen as rows
        values = file.elements(stored, copy.offset, _span(piece))
        values = values.as_strided((piece.num_rows, piece.num_columns), (length, 1))
        count = copy.num_bytes
        if stored.dtype == FP8:
            assert self.block is not None, "float8 tensors were checked"
            row = piece.rows.start % piece.shape[-2]
            values = dequantise(values, self._scales(piece), self.block, row, piece.columns.start)
            count += _scale_bytes(piece, self.tensors, self.block)
        target = copy.target[piece.start : piece.start + piece.numel]
        target.view(values.shape).copy_(values)
        return count

    def _scales(self, piece: Piece) -> torch.Tensor:
        """Of the matrix that a piece is in."""
        stored = self.tensors[piece.source + FP8_SCALE]
        matrix = piece.rows.start // piece.shape[-2]
        rows, columns = stored.shape[-2:]
        offset = stored.offset + matrix * rows * columns * stored.dtype.itemsize
        scales = self._files[stored.file].elements(stored, offset, rows * columns)
        return scales.view(rows, columns)


def _scale_bytes(piece: Piece, tensors: dict[str, StoredTensor], block: tuple[int, int]) -> int:
    """Of the blocks that a piece touches."""
    row = piece.rows.start % piece.shape[-2]
    rows = -(-(row + piece.num_rows) // block[0]) - row // block[0]
    columns = -(-piece.columns.stop // block[1]) - piece.columns.start // block[1]
    return rows * columns * tensors[piece.source + FP8_SCALE].dtype.itemsize

"""transformers' padded batches, and lists of ids, as checked flat tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3cp.errors import InputError
from qwen3cp.kv_cache import PagedCacheAdapter
from qwen3cp.parallel import ForwardPhase

__all__ = ["PaddedBatch", "device_ids", "host_ids"]


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """New columns of a batch, [B, S], and the flat tokens among their cells."""

    ids: torch.Tensor
    """int64 [T]: the tokens, row by row; on the host in PREFILL."""
    rows: list[int]
    """The batch rows that have new tokens."""
    lengths: list[int]
    """How many new tokens each of them has."""
    token_of_cell: torch.Tensor
    """int64 [B, S], on the host: which token each cell is, -1 for padding."""
    closed: set[int]
    """Rows with padding after their tokens."""

    @classmethod
    def read(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past: PagedCacheAdapter,
        phase: ForwardPhase,
        vocab_size: int,
    ) -> PaddedBatch:
        """Checks and unpads a batch.

        In PREFILL ids, mask and position_ids are read on the host, once. In DECODE nothing is
        read back from a device: all cells are tokens, and of the mask only the shape is checked.

        Args:
            input_ids: int [B, S].
            attention_mask: [B, past columns + S], 1 for tokens; each row's tokens are one run.
            position_ids: [B or 1, S], which must number each row's tokens from 0, or be columns.

        Raises:
            InputError
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise InputError("input_ids must be a tensor of shape [batch, columns]")
        batch_size, columns = input_ids.shape
        if batch_size == 0 or columns == 0:
            raise InputError(f"input_ids is empty: its shape is {tuple(input_ids.shape)}")
        _check_integers("input_ids", input_ids)
        full_shape = (batch_size, past.columns + columns)
        if attention_mask is not None and tuple(attention_mask.shape) != full_shape:
            raise InputError(
                f"attention_mask has the shape {tuple(attention_mask.shape)}, expected "
                f"{full_shape}: [batch, cached columns + new columns]"
            )
        if past.closed_rows:
            raise InputError(
                f"rows {sorted(past.closed_rows)} ended with padding, so nothing can follow them; "
                "pad on the left"
            )
        cached = torch.tensor([s.length for s in past.rows(batch_size)])
        if phase is ForwardPhase.DECODE:
            if position_ids is not None:
                raise InputError("position_ids is not taken in DECODE; they follow from the cache")
            if input_ids.device.type == "cpu":
                _check_range(input_ids, vocab_size)
            cells = torch.arange(batch_size * columns).view(batch_size, columns)
            return cls(
                ids=input_ids.reshape(-1).long(),
                rows=list(range(batch_size)),
                lengths=[columns] * batch_size,
                token_of_cell=cells,
                closed=set(),
            )

        if attention_mask is None:
            real = torch.ones(batch_size, columns, dtype=torch.bool)
            padding = past.columns - cached
        else:
            mask = attention_mask.cpu()
            if not ((mask == 0) | (mask == 1)).all():
                raise InputError("attention_mask may hold only 0 (padding) and 1 (token)")
            mask = mask.bool()
            _check_mask(mask, past.columns, cached.tolist())
            real = mask[:, past.columns :]
            padding = mask.long().argmax(1)
        counts = real.sum(1)
        if not past.allow_empty_rows or not counts.any():
            empty = (counts == 0).nonzero().flatten().tolist()
            if empty:
                raise InputError(f"rows {empty} have no tokens: the mask is 0 everywhere")
        ids = input_ids.cpu()[real].long()
        _check_range(ids, vocab_size)
        if position_ids is not None:
            _check_positions(position_ids.cpu(), real, padding, past.columns)
        token_of_cell = torch.full(real.shape, -1, dtype=torch.int64)
        token_of_cell[real] = torch.arange(len(ids))
        rows = counts.nonzero().flatten().tolist()
        return cls(
            ids=ids,
            rows=rows,
            lengths=counts[rows].tolist(),
            token_of_cell=token_of_cell,
            closed=set((~real[:, -1] & (cached + counts > 0)).nonzero().flatten().tolist()),
        )

    def cells_to_keep(self, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """int64 [B, kept]: the token of each cell whose logits are asked for, -1 for padding."""
        batch_size, columns = self.token_of_cell.shape
        if isinstance(logits_to_keep, int):
            if logits_to_keep < 0:
                raise InputError(f"logits_to_keep must not be negative, got {logits_to_keep}")
            return self.token_of_cell[:, -logits_to_keep:]
        index = logits_to_keep.cpu()
        if index.dtype not in (torch.int64, torch.int32) or index.dim() not in (1, 2):
            raise InputError("logits_to_keep must be an int or an integer tensor of 1 or 2 axes")
        if index.dim() == 2 and len(index) not in (1, batch_size):
            raise InputError(f"logits_to_keep has {len(index)} rows, the batch has {batch_size}")
        index = index.expand(batch_size, -1)
        if index.numel() and not (-columns <= index.min() and index.max() < columns):
            raise InputError(f"logits_to_keep points outside the {columns} new columns")
        return self.token_of_cell.gather(1, index.long() % columns)

    def pad(self, rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Puts [number of tokens among cells, ...] rows into their cells: [*cells.shape, ...].

        Cells of padding become zeros.
        """
        real = cells >= 0
        if real.all():
            return rows.view(*cells.shape, *rows.shape[1:])
        out = rows.new_zeros(*cells.shape, *rows.shape[1:])
        out[real.to(rows.device)] = rows
        return out


def host_ids(ids: object, what: str, vocab_size: int) -> torch.Tensor:
    """int64 [n] on the host from a list or 1-D tensor of token ids, checked."""
    try:
        tensor = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what} cannot be read as token ids: {error}") from error
    if tensor.dim() != 1:
        raise InputError(f"{what} must have one axis, got the shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise InputError(f"{what} is empty; a sequence needs at least one token")
    _check_integers(what, tensor)
    _check_range(tensor, vocab_size, what)
    return tensor.long()


def device_ids(ids: torch.Tensor, what: str) -> torch.Tensor:
    """int64 [n] where it is, its values not looked at."""
    if ids.dim() != 1:
        raise InputError(f"{what} must have one axis, got the shape {tuple(ids.shape)}")
    _check_integers(what, ids)
    return ids.long()


def _check_integers(what: str, ids: torch.Tensor) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"{what} must be int64 or int32, got {ids.dtype}")


def _check_range(ids: torch.Tensor, vocab_size: int, what: str = "input_ids") -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{what} holds the id {low if low < 0 else high}, outside the vocabulary "
            f"0..{vocab_size - 1}"
        )


def _check_mask(mask: torch.Tensor, past_columns: int, held: list[int]) -> None:
    """Each row's tokens are one run, and agree with what the cache holds."""
    runs = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    holes = (runs > 1).nonzero().flatten().tolist()
    if holes:
        raise InputError(
            f"attention_mask rows {holes} have padding between tokens; only padding before "
            "(or after) them can be run"
        )
    cached = mask[:, :past_columns].sum(1).tolist()
    if cached != held:
        raise InputError(
            f"attention_mask counts {cached} cached tokens in its rows, the cache holds {held}"
        )


def _check_positions(
    positions: torch.Tensor, real: torch.Tensor, padding: torch.Tensor, past_columns: int
) -> None:
    """Positions count a row's tokens from 0, or its columns, which differ by a shift alone."""
    try:
        positions = positions.expand(real.shape)
    except RuntimeError as error:
        raise InputError(
            f"position_ids has the shape {tuple(positions.shape)}, expected {tuple(real.shape)}"
        ) from error
    columns = past_columns + torch.arange(real.shape[1]).expand(real.shape)
    from_zero = columns - padding[:, None]
    for expected in (from_zero, columns):
        if torch.equal(positions[real], expected[real]):
            return
    raise InputError(
        "position_ids must number each row's tokens from 0 without gaps; leave them out"
    )

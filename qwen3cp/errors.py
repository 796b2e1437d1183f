"""The errors this package raises: one base class, one class per kind of mistake."""

__all__ = [
    "CheckpointError",
    "CommunicationError",
    "InputError",
    "KVCacheFullError",
    "ParallelConfigError",
    "Qwen3CPError",
    "UnsupportedConfigError",
]


class Qwen3CPError(Exception):
    """Base class of every error that this package raises on purpose."""


class ParallelConfigError(Qwen3CPError, ValueError):
    """The parallel topology does not fit the world, the groups or the model."""


class InputError(Qwen3CPError, ValueError):
    """The arguments of a call are wrong: ids, lengths, masks, sequences, options."""


class UnsupportedConfigError(Qwen3CPError, ValueError):
    """The model configuration, dtype or device cannot run here."""


class CheckpointError(Qwen3CPError, ValueError):
    """The checkpoint on disk is incomplete, damaged or of another shape than its config says."""


class KVCacheFullError(Qwen3CPError, RuntimeError):
    """The KV cache has fewer free pages than the call needs. No sequence was changed."""


class CommunicationError(Qwen3CPError, RuntimeError):
    """A collective failed or timed out, usually because another rank has ended."""

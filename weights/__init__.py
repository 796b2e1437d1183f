"""Loading sharded safetensors checkpoints: each rank reads only its own slices."""

from qwen3cp.weights.index import CheckpointIndex
from qwen3cp.weights.layout import Parameter, Piece, parameter_layout
from qwen3cp.weights.loader import load_pretrained
from qwen3cp.weights.reader import LoadReport

__all__ = [
    "CheckpointIndex",
    "LoadReport",
    "Parameter",
    "Piece",
    "load_pretrained",
    "parameter_layout",
]

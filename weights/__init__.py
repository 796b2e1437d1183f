"""Loading sharded safetensors checkpoints: each rank reads only its own slices."""

from qwen3cp.weights.index import CheckpointIndex
from qwen3cp.weights.layout import Piece, parameter_layout
from qwen3cp.weights.loader import load_pretrained

__all__ = ["CheckpointIndex", "Piece", "load_pretrained", "parameter_layout"]

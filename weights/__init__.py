"""Loading, saving, cutting and checking safetensors checkpoints: each rank only its own slices."""

from qwen3cp.weights.checking import check
from qwen3cp.weights.index import CheckpointIndex
from qwen3cp.weights.layout import Parameter, Piece, parameter_layout
from qwen3cp.weights.loader import load_pretrained
from qwen3cp.weights.random_weights import make_random, read_config
from qwen3cp.weights.reader import LoadReport
from qwen3cp.weights.saver import save_pretrained
from qwen3cp.weights.shards import shard

__all__ = [
    "CheckpointIndex",
    "LoadReport",
    "Parameter",
    "Piece",
    "check",
    "load_pretrained",
    "make_random",
    "parameter_layout",
    "read_config",
    "save_pretrained",
    "shard",
]

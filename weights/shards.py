"""Checkpoints cut for the ranks of one topology: `qwen3cp shard`."""

from qwen3cp.weights.layout import Parameter

MANIFEST_FILE = "qwen3cp-shards.json"


class ShardManifest:
    @classmethod
    def read(cls, folder):
        raise NotImplementedError

    def check(self, folder, ctx): ...
    def index_of(self, folder, rank): ...
    @staticmethod
    def whole(parameter: Parameter) -> Parameter: ...

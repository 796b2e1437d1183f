"""Configs of models to plan; those of the released ones come with this package."""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import Qwen3MoeConfig

__all__ = ["KNOWN_MODELS", "known_config", "read_model"]


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("qwen3cp.planner").joinpath("models.json").read_text())


KNOWN_MODELS = tuple(_configs())
"""Their hub ids; `known_config` takes them without the part before the slash too."""


def known_config(name: str) -> Qwen3MoeConfig | None:
    """The config of a released model, None if it is not one of `KNOWN_MODELS`."""
    for hub_id, values in _configs().items():
        if name in (hub_id, hub_id.split("/")[1]):
            return Qwen3MoeConfig(**values)
    return None


def read_model(name: str) -> tuple[Qwen3MoeConfig, str]:
    """The config of a folder, a file, a known model or a hub repository, and where it is from.

    The released models need no network: their configs are a part of this package.
    """
    from qwen3cp.weights import read_config

    config = None if Path(name).exists() else known_config(name)
    if config is not None:
        return config, "the config that comes with this package"
    return read_config(name), "its config.json"

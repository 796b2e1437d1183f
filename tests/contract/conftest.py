"""Once a session: the recorded calls, and what they come to under the real torch_npu."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from qwen3cp import CommConfig
from tests.contract.mutants import mutated_calls, write_packages
from tests.contract.record import record_steps, unique
from tests.contract.torch_npu import ROOT, Unavailable, environment, prepare
from tests.models import save_random
from tests.ranks import run


def comm_settings(moe: str) -> Iterator[dict[str, Any]]:
    """Every value of every setting that chooses an operator, from the settings' own types."""
    hints = get_type_hints(CommConfig)
    choices = {name: get_args(hint) for name, hint in hints.items() if "Literal" in str(hint)}
    of_experts = {name: choices.pop(name) for name in list(choices) if name.startswith("exchange")}
    yield {}
    if moe == "ep":
        for form, rows in itertools.product(*(of_experts[name] for name in sorted(of_experts))):
            yield dict(zip(sorted(of_experts), (form, rows), strict=True))
        return
    for name, values in choices.items():
        for value in values:
            sizes = (None, 128) if name == "all_reduce" and value != "exact" else (None,)
            for size in sizes:
                yield {name: value, "group_size": size, "min_bytes": 0}


def scenarios() -> Iterator[tuple[int, int, torch.dtype, str, dict[str, Any]]]:
    for moe in ("tp", "ep"):
        for cp, tp in ((1, 1), (2, 1), (1, 2), (2, 2)):
            yield cp, tp, torch.bfloat16, moe, {}
        cp, tp = 2, 2
        for comm in comm_settings(moe):
            if comm:
                yield cp, tp, torch.bfloat16, moe, comm
    yield 1, 1, torch.float32, "tp", {}


@pytest.fixture(scope="session")
def recorded(ranks, checkpoint, tmp_path_factory) -> dict[str, list[dict[str, list[str]]]]:
    """By scenario, for each rank and step, the calls as JSON."""
    dense = save_random(
        tmp_path_factory.mktemp("contract") / "dense",
        mlp_only_layers=[1],
        attention_bias=True,
        head_dim=128,
        vocab_size=640,
    )
    found = {}
    for cp, tp, dtype, moe, comm in scenarios():
        name = f"cp {cp}, tp {tp}, {dtype}, moe {moe}, {comm}"
        found[name] = run(ranks, (cp, tp), record_steps, checkpoint, dtype, moe, comm)
    for cp, tp in ((1, 1), (2, 2)):
        name = f"dense layer and biases, cp {cp}, tp {tp}, {{}}"
        found[name] = run(ranks, (cp, tp), record_steps, dense, torch.bfloat16, "tp", {})
    return found


@pytest.fixture(scope="session")
def calls(recorded) -> list[dict[str, Any]]:
    return unique(rank for of_ranks in recorded.values() for rank in of_ranks)


def require() -> Path:
    """The folder of the real torch_npu; skips the test, or fails it where CI is set."""
    try:
        return prepare()
    except Unavailable as error:
        reason = f"the contract with torch_npu is not tested: {error}"
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def torch_npu() -> Path:
    return require()


@pytest.fixture(scope="session")
def report(torch_npu, calls, checkpoint, tmp_path_factory) -> dict[str, Any]:
    """What the one process with the real torch_npu found."""
    folder = tmp_path_factory.mktemp("contract")
    task = {
        "calls": calls,
        "checkpoint": str(checkpoint),
        "packages": write_packages(folder),
        "mutated_calls": mutated_calls(calls),
    }
    (folder / "task.json").write_text(json.dumps(task))
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.child", "task.json", "report.json"],
        cwd=folder,
        env=environment(torch_npu, ROOT),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())

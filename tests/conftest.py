"""Fixtures: the trained checkpoint, and ranks that are started once a session."""

import os

os.environ["QWEN3CP_DEBUG_OPS"] = "1"  # before qwen3cp is imported anywhere

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.ranks import Ranks

CHECKPOINT = Path(__file__).parent / "assets" / "tiny-qwen3-moe"

settings.register_profile("tests", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("tests")
torch.set_num_threads(1)  # ranks share the machine's cores


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("npu", "the tests on Ascend NPUs (-m npu)")
    group.addoption("--npu-report", metavar="FILE", help="JSON file for what they find")
    group.addoption("--npu-model", metavar="DIR", help="folder with Qwen3-30B-A3B")
    group.addoption("--npu-gsm8k", metavar="DIR", help="folder with GSM8K's jsonl files")
    group.addoption(
        "--npu-device",
        choices=("npu", "cpu"),
        default="npu",
        help="cpu: CPU ranks stand in for NPUs, to test these tests",
    )


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """ranks(n): the n processes of this session."""
    started: dict[int, Ranks] = {}

    def get(size: int) -> Ranks:
        if size not in started or not all(p.is_alive() for p in started[size].processes):
            if size in started:
                started.pop(size).close()
            started[size] = Ranks(size)
        return started[size]

    yield get
    for each in started.values():
        each.close()

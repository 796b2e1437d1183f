"""The device that these tests run on, and the one file that they report to."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qwen3cp.parallel import default_device


@dataclass
class Machine:
    """Where the tests run: NPUs, or CPU ranks that stand in for them to test the tests."""

    device: torch.device
    num_devices: int

    def run(self, *arguments: str, ranks: int = 1, timeout: float = 7200) -> str:
        """`qwen3cp ARGUMENTS` on so many of the devices: its standard output."""
        if ranks > self.num_devices:
            pytest.skip(f"{ranks} NPUs are needed, and this machine has {self.num_devices}")
        done = subprocess.run(
            [sys.executable, "-m", "qwen3cp.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def machine(request) -> Machine:
    if request.config.getoption("--npu-device") == "cpu":
        return Machine(torch.device("cpu"), 4)
    device = default_device()
    return Machine(device, torch.get_device_module(device).device_count())


@pytest.fixture
def npu_model(request) -> Path:
    return _folder(request, "--npu-model", "a folder with Qwen3-30B-A3B")


@pytest.fixture
def gsm8k_data(request) -> Path:
    return _folder(request, "--npu-gsm8k", "a folder with GSM8K's train.jsonl and test.jsonl")


def _folder(request, option: str, what: str) -> Path:
    value = request.config.getoption(option)
    if value is None:
        pytest.skip(f"needs {what}: pass {option} DIR")
    return Path(value)


def pytest_collection_modifyitems(config, items) -> None:
    here = Path(__file__).parent
    if config.getoption("--npu-device") == "cpu" or default_device().type == "npu":
        return
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.skip(reason=f"{item.name}: no Ascend NPU is available"))


class Report:
    """Every outcome, and what the tests found out, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: list[dict[str, object]] = []

    def pytest_runtest_logreport(self, report) -> None:
        if "/npu/" not in report.nodeid or (report.when != "call" and report.passed):
            return
        reason = str(report.longrepr[2]) if report.skipped else report.longreprtext
        self.tests.append(
            {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "found": dict(report.user_properties),
                "reason": reason or None,
            }
        )

    def pytest_sessionfinish(self) -> None:
        command = [sys.executable, "-m", "qwen3cp.cli", "doctor", "--json"]
        doctor = subprocess.run(command, capture_output=True, text=True)
        document = {"machine": json.loads(doctor.stdout), "tests": self.tests}
        self.path.write_text(json.dumps(document, indent=2) + "\n")


def pytest_configure(config) -> None:
    path = config.getoption("--npu-report")
    if path is not None:
        config.pluginmanager.register(Report(Path(path)))

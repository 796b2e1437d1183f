"""The tests for devices, run on CPU ranks in their place: they work, and report what they find."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3cp import cli
from qwen3cp.ops import SCHEMAS

ROOT = Path(__file__).parents[1]


def run_suite(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-m", "npu", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_on_cpu_ranks(tmp_path):
    report = tmp_path / "report.json"
    some = "operators or open_questions or logits_are or (answers and 2-1-exact)"
    done = run_suite("tests/npu", "--npu-device", "cpu", "--npu-report", report, "-k", some)
    assert done.returncode == 0, done.stdout
    document = json.loads(report.read_text())
    assert {check["name"] for check in document["machine"]} >= {"import torch", "operators"}
    tests = {test["test"].partition("::")[2]: test for test in document["tests"]}
    assert {test["outcome"] for test in tests.values()} == {"passed"}
    for operator in {name.partition(".")[0] for name in SCHEMAS}:
        found = tests[f"test_operator_agrees_with_its_reference[{operator}]"]["found"]
        assert found["calls"] > 0 and found["worst relative L2 error"] < 1e-6
    assert "refused" in tests["test_question[float16 in TND]"]["found"]["answer"]
    assert "[-56, 56, 2]" in str(tests["test_int8_sum_over_two_devices"]["found"])


def test_without_a_device_all_are_skipped_by_name():
    done = run_suite("tests/npu")
    assert done.returncode == 0, done.stdout
    assert "passed" not in done.stdout and "failed" not in done.stdout
    for name in (
        "test_gsm8k",
        "test_question[order of ties in the gating]",
        "test_answers[2-2-int8]",
    ):
        assert f"{name}: no Ascend NPU is available" in done.stdout


def test_options_of_the_acceptance_exist(monkeypatch, capsys):
    """Its commands take hours on NPUs: a wrong option should not be found there."""
    text = (ROOT / "tests" / "npu" / "test_acceptance.py").read_text()
    options = set(re.findall(r'"(--[a-z][a-z0-9_-]+)"', text))
    assert {"--data-dir", "--prompt-tokens", "--log_samples"} <= options
    shown = ""
    for command in ("eval", "bench", "compare"):
        monkeypatch.setattr(sys, "argv", ["qwen3cp", command, "--help"])
        with pytest.raises(SystemExit):
            cli.main()
        shown += capsys.readouterr().out
    harness = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", "--help"], capture_output=True, text=True
    )
    shown += harness.stdout
    assert [option for option in sorted(options) if f"{option} " not in shown] == []

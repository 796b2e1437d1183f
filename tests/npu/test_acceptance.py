"""Acceptance on hardware: Qwen3-30B-A3B solves GSM8K on cp 2 x tp 2, exact and with int8 sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.npu, pytest.mark.slow]

QUESTIONS = 100
LEAST_ACCURACY = 0.92
"""Of the first 100 questions, 5-shot: the gate that others set for this model."""
LONG_PROMPT = 262_144


def evaluate(machine, model: Path, data: Path, out: Path, *options: str) -> float:
    machine.run(
        *("eval", "--model", str(model), "--tasks", "gsm8k", "--data-dir", str(data)),
        *("--num_fewshot", "5", "--limit", str(QUESTIONS), "--dtype", "bfloat16"),
        *("--cp", "2", "--tp", "2", "--output_path", str(out), "--log_samples", *options),
        ranks=4,
    )
    (results,) = out.rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["gsm8k"]
    return scores["exact_match,flexible-extract"]


def test_gsm8k(machine, npu_model, gsm8k_data, tmp_path, record_property):
    exact = evaluate(machine, npu_model, gsm8k_data, tmp_path / "exact")
    record_property("accuracy", exact)
    assert exact >= LEAST_ACCURACY

    int8 = evaluate(machine, npu_model, gsm8k_data, tmp_path / "int8", "--int8", "auto")
    record_property("accuracy with int8 sums", int8)
    compared = machine.run("compare", str(tmp_path / "exact"), str(tmp_path / "int8"), "--json")
    record_property("paired", json.loads(compared))
    assert int8 >= LEAST_ACCURACY


@pytest.mark.parametrize(("cp", "tp"), [(1, 4), (2, 2)])
def test_time_to_first_token_of_a_long_prompt(machine, npu_model, cp, tp, record_property):
    report: dict[str, Any] = json.loads(
        machine.run(
            *("bench", str(npu_model), "--cp", str(cp), "--tp", str(tp), "--dtype", "bfloat16"),
            *(
                "--prompt-tokens",
                str(LONG_PROMPT),
                "--new-tokens",
                "16",
                "--repeats",
                "1",
                "--json",
            ),
            ranks=cp * tp,
        )
    )
    record_property("bench", report)
    (result,) = report["results"]
    assert result["prompt_tokens"] == LONG_PROMPT

"""Every operator on the device against its reference kernel, with arguments of real forwards."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from qwen3cp.ops import SCHEMAS, settings
from tests.models import save_random
from tests.npu.recording import Call, record
from tests.ranks import run

pytestmark = pytest.mark.npu

OPERATORS = sorted({name.partition(".")[0] for name in SCHEMAS})
RUNS = {
    "one rank": (1, 1, "tp", {}),
    "experts cut, int8 one-shot": (1, 2, "tp", {"all_reduce": "int8_one_shot"}),
    "int8 two-step and gather": (2, 1, "tp", {"kv_gather": "int8"}),
    "experts divided, all-gather": (2, 1, "ep", {"exchange": "all_gather"}),
    "experts divided, all-to-all": (
        2,
        1,
        "ep",
        {"exchange": "all_to_all", "exchange_rows": "int8"},
    ),
}
BFLOAT16_STEPS = 2e-2
"""Relative L2 of an output: one rounding of bfloat16 is 2e-3, and sums are in another order."""
FLOAT32_ERROR = 1e-3
"""Of float32 outputs of bfloat16 inputs, such as scales and 1/RMS."""


@pytest.fixture(scope="module")
def calls(machine, ranks, tmp_path_factory) -> dict[str, list[Call]]:
    """By operator, what forwards on the CPU called it with and got."""
    path = tmp_path_factory.mktemp("model")
    save_random(path, head_dim=128, num_hidden_layers=2, hidden_size=128)
    found: dict[str, list[Call]] = {operator: [] for operator in OPERATORS}
    for cp, tp, *forms in RUNS.values():
        for by_rank in run(ranks, (cp, tp), record, path, *forms):
            for call in by_rank:
                found[call.operator].append(call)
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_agrees_with_its_reference(machine, calls, operator, record_property):
    assert calls[operator], f"no forward calls {operator}"
    worst = 0.0
    for call in calls[operator]:
        with settings.override(float32_scores=True):  # as recorded, where a CPU stands in
            result = call.run_on(machine.device)
        for found, expected in zip(tree_leaves(result), tree_leaves(call.result), strict=True):
            if isinstance(expected, torch.Tensor):
                worst = max(worst, compare(operator, found.cpu(), expected))
    record_property("calls", len(calls[operator]))
    record_property("worst relative L2 error", worst)


def compare(operator: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """Asserts that they agree where the operator defines its output; the relative L2 error."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if expected.dtype.is_floating_point:
        defined = expected.isfinite()  # the tests fill what the NPU leaves unwritten with NaN
        found, exact = found[defined].double(), expected[defined].double()
        error = float((found - exact).norm() / exact.norm().clamp_min(1e-30))
        limit = BFLOAT16_STEPS if expected.dtype == torch.bfloat16 else FLOAT32_ERROR
        assert error <= limit, f"{operator}: relative L2 error {error:.2e}, the limit is {limit}"
        return error
    written = torch.ones_like(found, dtype=torch.bool)
    if operator == "npu_moe_init_routing_v2":  # rows of other ranks' experts
        written = expected != _poison(expected.dtype)
    apart = (found[written].long() - expected[written].long()).abs()
    # a value half way between two integers may be rounded to either
    allowed = 1 if operator == "npu_dynamic_quant" else 0
    assert apart.numel() == 0 or int(apart.max()) <= allowed, operator
    return 0.0


def _poison(dtype: torch.dtype) -> int:
    """Integers that a CPU kernel leaves unwritten have 0x7F in every byte."""
    return int.from_bytes(b"\x7f" * torch.tensor([], dtype=dtype).element_size(), "little")

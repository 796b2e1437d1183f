"""What a topology needs and how long it takes, without an NPU and without weights."""

from qwen3cp.planner.counts import CollectiveCount, DryRun, OperatorCount, RankCounts, StepCounts

__all__ = ["CollectiveCount", "DryRun", "OperatorCount", "RankCounts", "StepCounts"]

"""Draws planning_split.svg: what the predicted times of the 235B on 16 dies of an A3 are made of.

    python docs/figures/planning_split.py [OUTPUT]

With the plot functions of `qwen3cp plan --html`.
"""

import sys
from pathlib import Path

import matplotlib

from qwen3cp.planner.cost import predict
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.figures import draw_split
from qwen3cp.planner.hardware import HARDWARE
from qwen3cp.planner.models import known_config


def main(output: Path) -> None:
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({"svg.hashsalt": "planning_split", "svg.fonttype": "none"})
    config = known_config("Qwen/Qwen3-235B-A22B")
    assert config is not None
    predictions = {}
    for cp, tp in ((1, 16), (2, 8), (4, 4), (8, 2)):
        run = dry_run(
            config,
            prompt=131072,
            chunk=32768,
            cp_size=cp,
            tp_size=tp,
            moe="ep",
            layers="distinct",
            ranks="busiest",
        )
        predictions[f"CP {cp} x TP {tp}"] = predict(run, HARDWARE["a3"])
    figure = draw_split(predictions)
    figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))

"""Draws planning_curves.svg: predicted times of the 30B on 8 dies of an A3, by prompt length.

    python docs/figures/planning_curves.py [OUTPUT]

With the plot functions of `qwen3cp plan --html`.
"""

import sys
from pathlib import Path

import matplotlib

from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.figures import draw_curves
from qwen3cp.planner.hardware import HARDWARE
from qwen3cp.planner.models import known_config
from qwen3cp.planner.search import compare

LENGTHS = [2**n for n in range(10, 21, 2)]


def main(output: Path) -> None:
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({"svg.hashsalt": "planning_curves", "svg.fonttype": "none"})
    config = known_config("Qwen/Qwen3-30B-A3B")
    assert config is not None
    run = dry_run(config, prompt=LENGTHS[-2], tp_size=8, layers="distinct", ranks="busiest")
    curves, crossovers = compare(config, HARDWARE["a3"], run=run, lengths=LENGTHS)
    figure = draw_curves(curves, crossovers)
    figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))

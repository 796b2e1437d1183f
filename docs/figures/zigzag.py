"""Draws zigzag.svg: who runs which new tokens, and how much causal work that is.

    python docs/figures/zigzag.py [OUTPUT]

The blocks are those that `ForwardPlan` plans.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

from qwen3cp import ForwardPhase, ForwardPlan

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

NEW, CACHED, NUM_RANKS = [13, 9], [0, 5], 2
COLORS = ["#4878a8", "#e0a030", "#5a9a68", "#b05a5a"]
WORK_TOKENS, WORK_RANKS = 1024, 4


def rank_of_token(new: list[int], cached: list[int], num_ranks: int) -> np.ndarray:
    """The rank of each new token, sequence by sequence."""
    ranks = np.empty(sum(new), int)
    for rank in range(num_ranks):
        plan = ForwardPlan.build(
            new,
            cached_lengths=cached,
            block_tables=[[i] * 100 for i in range(1, len(new) + 1)],
            num_pages=200,
            phase=ForwardPhase.PREFILL,
            cp_rank=rank,
            cp_size=num_ranks,
        )
        ranks[plan.local_indices.numpy()] = rank
    return ranks


def draw_tokens(axes) -> None:
    owner = rank_of_token(NEW, CACHED, NUM_RANKS)
    first = 0
    for row, (new, cached) in enumerate(zip(NEW, CACHED, strict=True)):
        for position in range(cached + new):
            rank = None if position < cached else owner[first + position - cached]
            color = "#dddddd" if rank is None else COLORS[rank]
            axes.add_patch(plt.Rectangle((position, -row), 0.94, 0.6, color=color))
            axes.text(position + 0.47, -row + 0.3, str(position), ha="center", va="center", size=8)
        axes.text(-0.3, -row + 0.3, f"sequence {row}", ha="right", va="center")
        first += new
    for rank in range(NUM_RANKS):
        axes.add_patch(plt.Rectangle((4 * rank, -2.1), 0.6, 0.4, color=COLORS[rank]))
        axes.text(4 * rank + 0.8, -1.9, f"rank {rank}", va="center")
    axes.add_patch(plt.Rectangle((8, -2.1), 0.6, 0.4, color="#dddddd"))
    axes.text(8.8, -1.9, "cached before", va="center")
    axes.set(xlim=(-4, 14.5), ylim=(-2.3, 0.8), title="New tokens and the rank that runs them")
    axes.axis("off")


def draw_work(axes) -> None:
    """Keys seen by the tokens of each rank, in shares of the whole."""
    zigzag = rank_of_token([WORK_TOKENS], [0], WORK_RANKS)
    contiguous = np.arange(WORK_TOKENS) * WORK_RANKS // WORK_TOKENS
    seen = np.arange(1, WORK_TOKENS + 1)
    for shift, name, owner in ((-0.2, "contiguous", contiguous), (0.2, "zigzag", zigzag)):
        shares = np.bincount(owner, seen) / seen.sum() * 100
        alpha = 0.45 if name == "contiguous" else 1.0
        axes.bar(
            np.arange(WORK_RANKS) + shift, shares, 0.36, color=COLORS[0], alpha=alpha, label=name
        )
    axes.set(
        xticks=range(WORK_RANKS),
        xticklabels=[f"rank {rank}" for rank in range(WORK_RANKS)],
        ylabel="% of the causal work",
        title=f"One prompt of {WORK_TOKENS} tokens on {WORK_RANKS} ranks",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main(output: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "zigzag", "svg.fonttype": "none", "font.size": 10})
    figure, axes = plt.subplots(1, 2, figsize=(11, 3), width_ratios=[3, 2], layout="constrained")
    draw_tokens(axes[0])
    draw_work(axes[1])
    figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))

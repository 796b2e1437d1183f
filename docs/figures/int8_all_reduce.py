"""Draws int8_all_reduce.svg: what travels, how much of it, and up to which link it pays.

    python docs/figures/int8_all_reduce.py [OUTPUT]

Bytes are those that `collectives.all_reduce_bytes` gives.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

from qwen3cp.collectives import all_reduce_bytes

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

COLORS = ["#4878a8", "#e0a030", "#5a9a68", "#b05a5a"]
HIDDEN, ROWS = 2048, 5040  # rows that 2 to 10 ranks divide
HBM = 1.6 * 2**40 * 0.6 / 1e9  # GB/s
LINKS = {"A3 package": 224, "A3 node, A2 node of 8": 196, "A2 pair": 28, "RoCE": 25}
SHARE_OF_LINK = 0.7


def break_even(num_ranks: np.ndarray) -> np.ndarray:
    """GB/s of a link below which two steps take less time than a bfloat16 ring."""
    return (num_ranks - 1) / num_ranks * HBM / (3.5 + 2.5 / num_ranks)


def boxes(axes, left: float, top: float, colors: list[str], texts: list[str]) -> None:
    """A row of blocks."""
    for i, (color, text) in enumerate(zip(colors, texts, strict=True)):
        axes.add_patch(plt.Rectangle((left + i, top), 0.92, 0.62, color=color))
        axes.text(left + i + 0.46, top + 0.31, text, ha="center", va="center", size=7)


def draw_algorithms(axes) -> None:
    """Two ranks, four blocks of rows: a0 is rank 0's partial sum of the first, and so on."""
    light = ["#a8c4e0", "#f0d090"]
    for rank, name in enumerate("ab"):
        top = 6.4 - 0.8 * rank
        axes.text(-0.2, top + 0.3, f"rank {rank}", ha="right", va="center", size=8)
        boxes(axes, 0, top, [light[rank]] * 2, [f"{name}0", f"{name}1"])
    axes.text(0, 7.25, "partial sums", size=8)

    axes.text(0, 4.75, "one-shot: all-gather of int8, every rank adds all", size=8)
    axes.text(0, 2.35, "two-step: all-to-all of int8, each adds its share", size=8)
    axes.text(0, -0.05, "then: all-gather of the sums, int8 again", size=8)
    for rank in range(2):
        top = 3.9 - 0.8 * rank
        axes.text(-0.2, top + 0.3, f"rank {rank}", ha="right", va="center", size=8)
        boxes(axes, 0, top, [light[0], light[0], light[1], light[1]], ["a0", "a1", "b0", "b1"])
        axes.text(4.1, top + 0.3, "→ a0+b0, a1+b1", va="center", size=8)
        top = 1.5 - 0.8 * rank
        axes.text(-0.2, top + 0.3, f"rank {rank}", ha="right", va="center", size=8)
        boxes(axes, 0, top, light, [f"a{rank}", f"b{rank}"])
        axes.text(2.1, top + 0.3, f"→ a{rank}+b{rank}", va="center", size=8)
        top = -0.9 - 0.8 * rank
        axes.text(-0.2, top + 0.3, f"rank {rank}", ha="right", va="center", size=8)
        boxes(axes, 0, top, ["#b8d8b8"] * 2, ["a0+b0", "a1+b1"])
    axes.set(xlim=(-1.6, 7.2), ylim=(-1.9, 7.7), title="Two ranks, two shares of the rows")
    axes.axis("off")


def draw_bytes(axes) -> None:
    ranks = range(2, 11)
    values = ROWS * HIDDEN
    for color, form, name in zip(
        COLORS[:3],
        ("exact", "int8_one_shot", "int8_two_step"),
        ("bfloat16 ring", "one-shot, 128", "two-step, 128"),
        strict=True,
    ):
        sent = [all_reduce_bytes(form, values // 128, 128, 2, n) / values for n in ranks]
        axes.plot(ranks, sent, marker="o", color=color, label=name)
    axes.set(
        xlabel="ranks of the TP group",
        title="Bytes that a rank receives, for each value",
        ylim=(0, 7),
    )
    axes.legend(frameon=False)


def draw_links(axes) -> None:
    ranks = np.arange(2, 17)
    axes.plot(ranks, break_even(ranks), color=COLORS[2])
    axes.fill_between(ranks, break_even(ranks), color=COLORS[2], alpha=0.15)
    axes.text(8, 85, "two steps take less time", ha="center", size=9)
    for name, link in LINKS.items():
        rate = SHARE_OF_LINK * link
        axes.axhline(rate, color="#888888", linewidth=0.8, linestyle=":")
        axes.text(16, rate, name, va="top" if name == "RoCE" else "bottom", ha="right", size=7)
    axes.set(
        xlabel="ranks of the TP group",
        title="GB/s of a link below which int8 pays",
        ylim=(0, 300),
    )
    axes.spines[["top", "right"]].set_visible(False)


def main(output: Path) -> None:
    plt.rcParams.update({"svg.hashsalt": "int8_all_reduce", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    draw_algorithms(axes[0])
    draw_bytes(axes[1])
    draw_links(axes[2])
    figure.savefig(output, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))

"""Draw losses.svg: which rank computes which pairs in which step, and what goes round the ring.

python docs/images/draw_losses.py
"""

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Rectangle

RANKS, TILES = 4, 3
STEPS = ("#2f6fb2", "#6a9fd0", "#a5c6e5", "#dbe8f5")  # step 0, 1, ...
GREEN, RED, INK = "#12805c", "#c0392b", "#1d1f23"


def draw_matrix(axes) -> None:
    for rank in range(RANKS):
        for block in range(RANKS):
            step = (block - rank) % RANKS
            axes.add_patch(Rectangle((block, rank), 1, 1, color=STEPS[step], linewidth=0))
            place = (block + 0.5, rank + 0.5) if step else (block + 0.78, rank + 0.25)
            axes.text(*place, f"step {step}", ha="center", va="center", color="white" if step < 2 else INK)
    for at in np.arange(1, RANKS * TILES) / TILES:
        axes.plot([at, at], [0, RANKS], [0, RANKS], [at, at], color="white", linewidth=0.4)
    for at in range(1, RANKS):
        axes.plot([at, at], [0, RANKS], [0, RANKS], [at, at], color="white", linewidth=2)
    axes.plot([0, RANKS], [0, RANKS], color=GREEN, linewidth=2.5)
    axes.add_patch(Rectangle((0, 1), RANKS, 1, fill=False, edgecolor=INK, linewidth=1.8, zorder=5))
    names = [f"rank {rank}" for rank in range(RANKS)]
    axes.set(xlim=(-0.05, RANKS + 0.05), ylim=(RANKS + 0.05, -0.05), aspect="equal")
    axes.set_xticks(np.arange(RANKS) + 0.5, names)
    axes.set_yticks(np.arange(RANKS) + 0.5, names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set(xlabel="texts of the global batch", ylabel="images of the global batch")
    axes.tick_params(length=0)
    axes.set_title("B × B logits, a tile at a time; green: the matching pairs", fontsize=9, pad=12)


def draw_ring(axes) -> None:
    angles = [np.pi / 2 - 2 * np.pi * rank / RANKS for rank in range(RANKS)]
    places = [np.array([np.cos(angle), np.sin(angle)]) for angle in angles]
    for rank, place in enumerate(places):
        axes.add_patch(Circle(place, 0.27, facecolor="white", edgecolor=INK, linewidth=1.4, zorder=3))
        axes.text(*place, f"rank {rank}\nholds texts\nof {(rank + 1) % RANKS}", ha="center", va="center", zorder=4)
        before = places[rank - 1]
        for colour, radius, bend in ((STEPS[0], 1.0, 0.22), (RED, 0.86, 0.05)):
            ends = dict(posA=radius * place, posB=radius * before, shrinkA=24, shrinkB=24)
            style = dict(arrowstyle="-|>", mutation_scale=12, connectionstyle=f"arc3,rad={bend}")
            axes.add_patch(FancyArrowPatch(**ends, **style, color=colour, linewidth=1.8))
    axes.text(0, 0.13, "blocks of texts, (B/W, E)", ha="center", color=STEPS[0])
    axes.text(0, -0.02, "their gradients so far,", ha="center", color=RED)
    axes.text(0, -0.14, "one step behind", ha="center", color=RED)
    axes.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    axes.set_axis_off()
    axes.set_title("step 1: both travel while the next block is computed on", fontsize=9)


def main() -> None:
    with rc_context({"font.size": 7.5, "svg.hashsalt": "losses", "axes.linewidth": 0, "text.color": INK}):
        figure = Figure(figsize=(8.6, 4.1), facecolor="white", layout="constrained")
        matrix, ring = figure.subplots(1, 2)
        draw_matrix(matrix)
        draw_ring(ring)
        figure.savefig(Path(__file__).with_name("losses.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

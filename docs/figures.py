"""Drawings of the documentation: `python docs/figures.py` writes docs/images/*.svg anew."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

import asvit_fast as af

IMAGES = Path(__file__).parent / "images"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
BLUE, ORANGE, GREEN, GREY = "#3f51b5", "#ef6c00", "#2e7d32", "#9e9e9e"
plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "asvit_fast", "font.size": 9})


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def milliseconds(file: str, case: str, key: str = "case") -> dict[str, float]:
    with open(RESULTS / file, newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row[key] == case and row["milliseconds"]]
    return {row["provider"]: float(row["milliseconds"]) for row in rows if row.get("mode") in (None, "", "inference")}


def speed() -> None:
    """The landing page's picture: measured speeds, one line each."""
    swin = milliseconds("zen4/models.csv", "swin_tiny_patch4_window7_224", "network")
    monai = milliseconds("zen4/families.csv", "MONAI SwinUNETR 3-D, encoder", "network")
    asvit = milliseconds("zen4/models.csv", "asvit_small", "network")
    jvp = milliseconds("zen4/scores.csv", "order 1, 10 thetas, 224 px")
    bars = {
        "Swin-T of timm, inference": min(swin["source"], swin["sdpa"]) / swin["ours"],
        "As-ViT-S on our ops, inference": asvit["source"] / asvit["ours"],
        "MONAI SwinUNETR 3-D, encoder": monai["source"] / monai["ours"],
        "length distortion, against compiled torch.func": jvp["torch.func.jvp, compiled"] / jvp["ours"],
    }
    figure, axes = plt.subplots(figsize=(6.4, 1.9))
    axes.barh(list(bars), list(bars.values()), color=BLUE, height=0.6)
    axes.axvline(1, color=GREY, linewidth=1)
    for place, value in enumerate(bars.values()):
        axes.text(value + 0.15, place, f"{value:.1f} x", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the same network without us (AMD Zen 4, two cores, float32)")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "speed")


def circle() -> None:
    """A circle of inputs, and where two untrained networks send it."""
    figure, panels = plt.subplots(1, 3, figsize=(7, 2.4))
    theta = 2 * math.pi * torch.arange(400, dtype=torch.float64) / 400  # [n]
    panels[0].plot(theta.cos(), theta.sin(), color=GREY)
    panels[0].set_title("circle of images")
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(3 * 32 * 32, 2, generator=generator, dtype=torch.float64)).Q.T  # [2, pixels]
    for panel, text, color in (
        (panels[1], "4,2,2|2,1,2|2,1,2|2,1,2|16", ORANGE), (panels[2], "8,4,6|8,2,6|8,1,6|8,1,6|64", BLUE),
    ):  # fmt: skip
        torch.manual_seed(0)
        network = af.create_model(text, img_size=32, norm="identity").double()
        with torch.no_grad():
            c = af.curve(network.score_features, theta, *u.view(2, 3, 32, 32), scale=math.sqrt(3 * 32 * 32), order=1)
        plane = torch.pca_lowrank(c.output, 2, niter=8)[2]  # [F, 2]
        flat = (c.output - c.output.mean(0)) @ plane  # [n, 2]
        panel.plot(*torch.cat([flat, flat[:1]]).T, color=color)
        panel.set_title(f"{text}\nlength {af.length_distortion(c):.3g}", fontsize=7)
    panels[1].sharex(panels[2])
    panels[1].sharey(panels[2])
    for panel in panels:
        panel.set_aspect("equal", adjustable="box")
        panel.set_xticks([])
        panel.set_yticks([])
    save(figure, "circle")


def grid(axes: Axes, rows: int, columns: int, x: float = 0, y: float = 0, **style: object) -> None:
    for row in range(rows):
        for column in range(columns):
            axes.add_patch(Rectangle((x + column, y + row), 1, 1, **{"fill": False, "ec": GREY, "lw": 0.6, **style}))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="black", lw=1))
    axes.text((start[0] + end[0]) / 2, start[1] + 0.35, text, ha="center", fontsize=7)


def canvas(width: float, height: float, right: float, top: float) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_xlim(-0.3, right)
    axes.set_ylim(-0.8, top)
    axes.set_aspect("equal")
    axes.axis("off")
    return figure, axes


def tokens() -> None:
    """The same image in three grids of tokens, by the same weights."""
    figure, panels = plt.subplots(1, 3, figsize=(6.4, 2.4))
    for panel, reduction in zip(panels, (4, 2, 1), strict=True):
        panel.set_xlim(-0.2, 16.2)
        panel.set_ylim(-0.2, 16.2)
        panel.set_aspect("equal")
        panel.axis("off")
        for row in range(0, 16, reduction):
            for column in range(0, 16, reduction):
                panel.add_patch(Rectangle((column, row), reduction, reduction, fill=False, ec=GREY, lw=0.6))
        step = (reduction - 1) * 4 / 3 + 1
        taps = [(0.125 + step * i / 4, 15.875 - step * j / 4) for i in range(4) for j in range(4)]
        panel.scatter(*zip(*taps, strict=True), s=6, color=BLUE, zorder=3)
        panel.set_title(f"reduction {reduction}: {16 // reduction} x {16 // reduction} tokens", fontsize=8)
    save(figure, "tokens")


def window_attention() -> None:
    figure, axes = canvas(6.8, 2.4, 27, 8.6)
    grid(axes, 8, 8)
    axes.add_patch(Rectangle((4, 4), 4, 4, fill=False, ec=BLUE, lw=2))
    axes.add_patch(Rectangle((4, 5), 4, 1, color=BLUE, alpha=0.35))
    axes.text(4, 8.2, "map of q, k, v: read where it lies", ha="center", fontsize=7)
    arrow(axes, (8.3, 6), (12.7, 6), "q, k, v")
    for place, (title, color) in enumerate((("scores: one tile", ORANGE), ("softmax: on the way", ORANGE))):
        grid(axes, 3, 3, 13, 4.5 - 4.2 * place, ec=color)
        axes.text(14.5, 7.7 - 4.2 * place, title, ha="center", fontsize=7)
    arrow(axes, (16.3, 6), (18.7, 6))
    grid(axes, 8, 8, 19)
    axes.add_patch(Rectangle((23, 4), 4, 4, fill=False, ec=GREEN, lw=2))
    axes.text(23, 8.2, "output: written where it belongs", ha="center", fontsize=7)
    axes.text(14, -0.6, "never in memory: cut windows, rolled maps, scores", ha="center", fontsize=7, style="italic")
    save(figure, "window_attention")


def patch_embed() -> None:
    figure, axes = canvas(6.4, 2.0, 22, 7.4)
    grid(axes, 7, 7)
    for row in range(3):
        for column in range(3):
            axes.add_patch(Rectangle((1 + 2 * column, 1 + 2 * row), 1, 1, color=BLUE, alpha=0.5))
    axes.text(3.5, 7.1, "image; kernel 3, dilation 2", ha="center", fontsize=7)
    arrow(axes, (7.3, 3.5), (9.7, 3.5), "products")
    axes.add_patch(Rectangle((10, 1), 1.5, 5, color=ORANGE, alpha=0.5))
    axes.text(10.75, 6.9, "all channels of a token", ha="center", fontsize=7)
    arrow(axes, (11.8, 3.5), (16.7, 3.5), "mean, variance")
    grid(axes, 4, 4, 17, 1.5, ec=GREEN)
    axes.text(19, 5.8, "tokens, channels last, normalised", ha="center", fontsize=7)
    save(figure, "patch_embed")


def patch_merge() -> None:
    figure, axes = canvas(6.4, 2.0, 22, 7.4)
    grid(axes, 6, 6, 0, 0.5)
    axes.add_patch(Rectangle((1, 2.5), 3, 3, color=BLUE, alpha=0.35))
    axes.text(3, 7.0, "tokens; a 3 x 3 neighbourhood", ha="center", fontsize=7)
    arrow(axes, (6.3, 4.6), (10.2, 4.6), "product")
    arrow(axes, (6.3, 2.2), (10.2, 2.2), "sums")
    axes.add_patch(Rectangle((10.5, 3.9), 3.2, 1.4, color=ORANGE, alpha=0.4))
    axes.add_patch(Rectangle((10.5, 1.5), 3.2, 1.4, color=ORANGE, alpha=0.4))
    axes.text(12.1, 4.6, "projection", ha="center", va="center", fontsize=7)
    axes.text(12.1, 2.2, "statistics", ha="center", va="center", fontsize=7)
    arrow(axes, (14, 3.4), (17.7, 3.4), "scale, shift")
    grid(axes, 3, 3, 18, 2, ec=GREEN)
    axes.text(19.5, 5.4, "merged tokens", ha="center", fontsize=7)
    save(figure, "patch_merge")


def linear() -> None:
    figure, axes = canvas(6.4, 1.9, 22, 6.6)
    grid(axes, 5, 3, 0, 0.5, ec=BLUE)
    axes.text(1.5, 5.8, "x", ha="center", fontsize=8)
    axes.text(4, 3, "x", ha="center", va="center", fontsize=9)
    for panel in range(3):
        axes.add_patch(Rectangle((5 + 1.6 * panel, 1.5), 1.3, 3, color=BLUE, alpha=0.25 + 0.15 * panel))
    axes.text(7.3, 5.0, "weight in panels, packed once", ha="center", fontsize=7)
    arrow(axes, (10, 3), (12.2, 3))
    axes.add_patch(Rectangle((12.5, 2), 3.6, 2, color=ORANGE, alpha=0.4))
    axes.text(14.3, 3, "+ bias, GELU,\n+ residual", ha="center", va="center", fontsize=7)
    arrow(axes, (16.4, 3), (18.2, 3))
    grid(axes, 5, 3, 18.5, 0.5, ec=GREEN)
    axes.text(20, 5.8, "y, written once", ha="center", fontsize=7)
    save(figure, "linear")


def taylor() -> None:
    figure, axes = canvas(6.4, 1.9, 22, 6.6)
    names = ("value", "velocity", "acceleration")
    for place, (name, color) in enumerate(zip(names, (BLUE, ORANGE, GREEN), strict=True)):
        y = 4.5 - 2 * place
        axes.add_patch(Rectangle((0, y), 4, 1.3, color=color, alpha=0.4))
        axes.text(2, y + 0.65, name, ha="center", va="center", fontsize=7)
        axes.add_patch(Rectangle((18, y), 4, 1.3, color=color, alpha=0.4))
        axes.text(20, y + 0.65, name, ha="center", va="center", fontsize=7)
    arrow(axes, (4.3, 3.1), (6.2, 3.1))
    axes.add_patch(Rectangle((6.5, 1), 4, 4.2, fill=False, ec="black"))
    axes.text(8.5, 3.1, "linear layers:\none product\nof all rows", ha="center", va="center", fontsize=7)
    arrow(axes, (10.8, 3.1), (11.7, 3.1))
    axes.add_patch(Rectangle((12, 1), 4, 4.2, fill=False, ec="black"))
    axes.text(14, 3.1, "GELU, softmax:\nall derivatives\nin one pass", ha="center", va="center", fontsize=7)
    arrow(axes, (16.3, 3.1), (17.7, 3.1))
    save(figure, "taylor")


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for draw in (speed, circle, tokens, window_attention, patch_embed, patch_merge, linear, taylor):
        draw()

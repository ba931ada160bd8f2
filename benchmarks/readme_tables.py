"""Tables of README and the documentation, made from the rows in benchmarks/results: no figure is copied by hand.

    python benchmarks/readme_tables.py [--write]

prints them, or puts them between the comments of the files. Of rows that were measured again the last count. A test
compares the files with this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

from tables.gpus import gpus
from tables.networks import families, networks, runtimes
from tables.ops import cases, ops, scores, speed
from tables.rows import OURS, PROCESSORS, RESULTS, ZEN4, ZEN5, fastest, markdown, milliseconds, read, span, times
from tables.study import TASKS
from tables.trainings import detection, detection_speed, trainings

ROOT = RESULTS.parent.parent
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "docs/results.md",
        "docs/reference/families.md",
        "docs/guides/detect.md",
        "benchmarks/results/study/README.md",
    )
]


def summary() -> str:
    """One line for each thing that is made faster: README's table."""
    lines = []
    for title, peer, file, name in (
        ("Swin-T of timm, inference", "timm, its faster way", "models", "swin_tiny_patch4_window7_224"),
        ("As-ViT-S, inference", "plain PyTorch operations", "models", "asvit_small"),
        ("Video Swin-T, inference", "its source", "families", "Video Swin-T"),
        ("MONAI's SwinUNETR 3-D, encoder", "its source", "families", "MONAI SwinUNETR 3-D, encoder"),
    ):
        rows = [row for row in read(ZEN4, file) if row["network"] == name and row["mode"] == "inference"]
        providers = {row["provider"]: row for row in rows if row["milliseconds"]}
        factor = milliseconds(fastest(providers, False)) / milliseconds(providers[OURS])
        lines.append([title, peer, times(factor), f"CPU, {PROCESSORS[ZEN4]}"])
    for title, case in (("length distortion of a network", "order 1, 10 thetas, 224 px"),):
        found = {row["provider"]: milliseconds(row) for row in read(ZEN4, "scores") if row["case"] == case}
        peer = found["torch.func.jvp, compiled"]
        lines.append([title, "torch.func.jvp, compiled", times(peer / found[OURS]), f"CPU, {PROCESSORS[ZEN4]}"])
    attention = cases("h100", "window_attention", lambda case: True)
    for title, mode in (("window attention", "forward"), ("and backward", "both")):
        speeds = [speed(rows) for (_, found), rows in attention.items() if found == mode]
        lines.append([title, "the fastest of SDPA, cuDNN, eager", span(speeds), "H100, bfloat16"])
    swin = [row for row in read("h100", "models") if row["mode"] == "inference" and "swin_tiny" in row["network"]]
    batches = dict.fromkeys(row["batch"] for row in swin)
    speeds = [speed([row for row in swin if row["batch"] == batch]) for batch in batches]
    lines.append([f"Swin-T of timm, batches of {' and '.join(batches)}", "timm", span(speeds), "H100, bfloat16"])
    rows = [row for row in read(ZEN5, "retokenization") if row["schedule"] == "table6-120"]
    saved = median(float(row["time_saved"]) for row in rows)
    lines.append(
        ["training with coarse tokens first", "full tokens", times(1 / (1 - saved)), f"CPU, {PROCESSORS[ZEN5]}"]
    )
    return markdown(["what", "against", "speed", "on"], lines)


def known() -> str:
    """What ``accelerate`` knows."""
    from asvit_fast.acceleration import families_table

    return families_table().rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "summary": summary,
    "known": known,
    "runtimes": runtimes,
    "networks": networks,
    "families": families,
    "ops": ops,
    "trainings": trainings,
    "detection": detection,
    "detection speed": detection_speed,
    "scores": scores,
    "gpus": gpus,
    **TASKS,
}


def filled(text: str) -> str:
    """The text with its tables, each between its comments, <!-- NAME --> and <!-- end of NAME -->."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        if not found:
            continue
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{start.strip()} has no {end}")
        text = f"{before}{start}\n{table()}\n\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the files")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page.read_text()))
    else:
        print("\n\n".join(table() for table in TABLES.values()))


if __name__ == "__main__":
    main()

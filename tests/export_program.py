"""Runs a .pt2 file with torch alone: export_program.py FILE IMAGES; writes IMAGES.outputs."""

from __future__ import annotations

import sys

import torch


def main(path: str, images: str) -> None:
    model = torch.export.load(path).module()
    given = torch.load(images, weights_only=True)  # [B, C, H, W]
    with torch.no_grad():
        outputs = [model(given), model(given[:1])]  # [B, classes], [1, classes]
    assert not {"asvit_fast", "timm"} & set(sys.modules)
    torch.save(outputs, f"{images}.outputs")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Networks of other libraries and repositories through ``accelerate``, against themselves.

    ASVIT_FAST_SOURCES=DIR python benchmarks/bench_families.py [--case NAME ...] [--dtype bf16] [--csv FILE]

Rows are those of ``asvit-fast bench``: inference, training step, memory. Needs the extra [integrations]; DIR holds
checkouts as owner/name, and networks of those that are missing are left out. Sizes are those of
the papers, or smaller where a step would take too long.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from asvit_fast.bench.networks import measure
from asvit_fast.bench.rows import read_rows, table_lines, write_rows
from asvit_fast.bench.sources import open_source
from asvit_fast.cli.common import table
from asvit_fast.models.foreign import create_foreign
from asvit_fast.settings import BenchSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from source_modules import OfSize, load

SOURCES = os.environ.get("ASVIT_FAST_SOURCES", "")
RESTORES = {"upscale": 2, "img_size": 64, "img_range": 1.0, "depths": [6] * 6, "embed_dim": 180, "num_heads": [6] * 6}
RESTORES |= {"mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv"}


def of_checkout(repository: str, file: str, name: str, **options: Any) -> nn.Module:
    path = Path(SOURCES, repository, file)
    if not SOURCES or not path.is_file():
        raise FileNotFoundError(f"no checkout of {repository}")
    return getattr(load(path), name)(**options)


def of_torchvision(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models.video, name)()


class Encoder(nn.Module):
    """That of a SwinUNETR, the part with windows."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.swin: nn.Module = network.swinViT

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.swin(x)


def swin_unetr(axes: int, encoder: bool = False, **options: Any) -> nn.Module:
    from monai.networks.nets import SwinUNETR

    network = SwinUNETR(in_channels=1, out_channels=14, feature_size=24, spatial_dims=axes, **options)
    return Encoder(network) if encoder else network


def shifted(repository: str, file: str) -> nn.Module:
    options = {"embed_dims": 96, "num_heads": 3, "window_size": 7, "shift_size": 3}
    return OfSize(of_checkout(repository, file, "ShiftWindowMSA", **options))


@dataclass(frozen=True)
class Case:
    """A network: how it is made, the shape of an image, and how many there are."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 1
    modes: tuple[str, ...] = ("inference", "train")


def hugging_face(name: str, size: int = 224, batch: int = 2) -> Case:
    return Case(partial(create_foreign, f"hf:{name}", size), (3, size, size), batch)


MICROSOFT, DETECTION = "models/swin_transformer", "SwinTransformer/Swin-Transformer-Object-Detection"
SWIN_UNETR = "SwinUNETR 3-D"
CASES = {
    "transformers Swin-T": hugging_face("SwinForImageClassification", batch=8),
    "transformers SwinV2-T": hugging_face("Swinv2ForImageClassification", batch=8),
    "transformers DonutSwin": hugging_face("DonutSwinModel"),
    "transformers MaskFormerSwin": hugging_face("MaskFormerSwinModel"),
    "transformers Swin2SR": hugging_face("Swin2SRForImageSuperResolution", 64, 1),
    "transformers SegFormer-B0": hugging_face("SegformerForImageClassification"),
    "transformers PVT v2": hugging_face("PvtV2ForImageClassification"),
    "transformers Hiera-T": hugging_face("HieraForImageClassification"),
    "torchvision swin3d_t": Case(partial(of_torchvision, "swin3d_t"), (3, 16, 224, 224)),
    f"MONAI {SWIN_UNETR}": Case(partial(swin_unetr, 3), (1, 96, 96, 96)),
    f"MONAI {SWIN_UNETR}, encoder": Case(partial(swin_unetr, 3, True), (1, 96, 96, 96)),
    f"MONAI {SWIN_UNETR}, encoder, use_flash_attention": Case(
        partial(swin_unetr, 3, True, use_flash_attention=True), (1, 96, 96, 96)
    ),
    f"MONAI {SWIN_UNETR}, encoder at 128": Case(
        partial(swin_unetr, 3, True), (1, 128, 128, 128), modes=("inference",)
    ),
    "MONAI SwinUNETR 2-D": Case(partial(swin_unetr, 2), (1, 256, 256), 2),
    "Microsoft's Swin-T": Case(
        partial(of_checkout, "microsoft/Swin-Transformer", f"{MICROSOFT}.py", "SwinTransformer"), (3, 224, 224), 2
    ),
    "Microsoft's SwinV2-T": Case(
        partial(
            of_checkout, "microsoft/Swin-Transformer", f"{MICROSOFT}_v2.py", "SwinTransformerV2", img_size=256,
            window_size=8,
        ),
        (3, 256, 256), 2,
    ),
    "Microsoft's Swin-T for detection": Case(
        partial(of_checkout, DETECTION, "mmdet/models/backbones/swin_transformer.py", "SwinTransformer"),
        (3, 320, 448),
    ),
    "Video Swin-T": Case(
        partial(
            of_checkout, "SwinTransformer/Video-Swin-Transformer", "mmaction/models/backbones/swin_transformer.py",
            "SwinTransformer3D", pretrained=None, patch_size=(2, 4, 4), window_size=(8, 7, 7), patch_norm=True,
        ),
        (3, 16, 224, 224),
    ),
    "SwinIR-M": Case(
        partial(of_checkout, "JingyunLiang/SwinIR", "models/network_swinir.py", "SwinIR", window_size=8, **RESTORES),
        (3, 64, 64),
    ),
    "SwinIR-M at 256": Case(
        partial(of_checkout, "JingyunLiang/SwinIR", "models/network_swinir.py", "SwinIR", window_size=8, **RESTORES),
        (3, 256, 256), modes=("inference",),
    ),
    "SwinFIR": Case(
        partial(of_checkout, "Zdafeng/SwinFIR", "swinfir/archs/swinfir_arch.py", "SwinFIR", window_size=8,
                **{**RESTORES, "resi_connection": "SFB"}),
        (3, 64, 64),
    ),
    "HAT": Case(
        partial(of_checkout, "XPixelGroup/HAT", "hat/archs/hat_arch.py", "HAT", window_size=16, overlap_ratio=0.5,
                compress_ratio=3, squeeze_factor=30, conv_scale=0.01, **RESTORES),
        (3, 64, 64),
    ),
    "mmpretrain ShiftWindowMSA": Case(
        partial(shifted, "open-mmlab/mmpretrain", "mmpretrain/models/utils/attention.py"), (56, 56, 96), 8
    ),
}  # fmt: skip


def run(name: str, case: Case, settings: BenchSettings, path: Path | None) -> None:
    torch.manual_seed(0)
    sample = torch.randn(min(case.batch, 8), *case.shape)
    source = replace(open_source(case.make(), sample, seed=settings.seed), name=name)
    modes = [mode for mode in settings.modes if mode in case.modes]
    for rows in measure(source, replace(settings, batch_sizes=(case.batch,), modes=modes), tqdm.write):
        tqdm.write(f"\n{rows[0].title}\n{table(table_lines(rows))}")
        for row in rows:
            if row.note:
                tqdm.write(f"  {row.provider}: {row.status}, {row.note}")
        if path is not None:
            write_rows(path, [*(read_rows(path) if path.exists() else []), *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=[""], help="parts of names; without it all")
    parser.add_argument("--modes", default="inference,train")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default=None)
    parser.add_argument("--csv", type=Path, default=None)
    chosen = parser.parse_args(arguments)
    settings = BenchSettings(
        against=("source",), dtype=chosen.dtype, rounds=chosen.rounds, device=chosen.device,
        modes=chosen.modes.split(","),
    )  # fmt: skip
    for name, case in CASES.items():
        if not any(part in name for part in chosen.case):
            continue
        try:
            run(name, case, settings, chosen.csv)
        except (ImportError, FileNotFoundError) as error:
            tqdm.write(f"{name} left out: {error}")


if __name__ == "__main__":
    main()

"""``asvit-fast detect train``: train a detector."""

from __future__ import annotations

from types import SimpleNamespace

from ..detection import DetectionResult, train
from ..recipe import DetectionRecipe
from .common import check_output_folder, print_on_main
from .train import shared_arguments


def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    own = ("detector", "out_channels", "windows", "norm", "frozen_stages", "detector_kwargs")
    result = train(**{name: getattr(values, name) for name in own}, **shared_arguments(values, DetectionRecipe))
    conclude(values, result)
    return 0


def conclude(values: SimpleNamespace, result: DetectionResult) -> None:
    best = result.best
    if best is not None:
        masks = "" if best.get("mask_ap") is None else f", {best['mask_ap']:.2f} % of masks"
        print_on_main(f"Best AP {best['ap']:.2f} % of boxes{masks}, after epoch {best['epoch']}.", values.quiet)
    print_on_main(f"look at it:   asvit-fast report {values.out}", values.quiet)
    print_on_main(f"draw:         asvit-fast detect show {values.out} IMAGE...", values.quiet)
    print_on_main(f"validate:     asvit-fast detect eval {values.out} --data {values.data}", values.quiet)

"""``asvit-fast detect train``: train a detector."""

from __future__ import annotations

from types import SimpleNamespace

from ..detection import DetectionResult, train
from ..recipe import DetectionRecipe
from .common import check_output_folder, print_on_main
from .options import chosen
from .train import network, trackers


def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    print_on_main(f"Writing to {values.out}; stop at any time, the same command continues.", values.quiet)
    result = train(
        data=values.data,
        detector=values.detector,
        schedule=values.schedule,
        epochs=values.epochs,
        out=values.out,
        img_size=values.img_size,
        out_channels=values.out_channels,
        windows=values.windows,
        norm=values.norm,
        frozen_stages=values.frozen_stages,
        detector_kwargs=values.detector_kwargs,
        **{"initial_checkpoint": values.initial_checkpoint, **network(values)},
        device=values.device,
        progress=not values.quiet,
        callbacks=trackers(values),
        **chosen(values, DetectionRecipe),
    )
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

"""``asvit-fast train``: train a network, coarse tokens first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..errors import InputError
from ..recipe import DetectionRecipe, Recipe
from ..training import Callback, MlflowTracker, TrainResult, WandbTracker, train
from ..what import resolve
from .common import check_output_folder, is_main_process, print_on_main
from .options import chosen


def run(values: SimpleNamespace) -> int:
    check_output_folder(values.out)
    result = train(num_classes=values.num_classes, resume=values.resume, **shared_arguments(values, Recipe))
    conclude(values, result)
    return 0


def shared_arguments(values: SimpleNamespace, recipe: type[Recipe | DetectionRecipe]) -> dict[str, Any]:
    """The arguments that the trainings of classifiers and of detectors share."""
    plain = ("data", "schedule", "epochs", "out", "img_size", "device")
    return {
        **{name: getattr(values, name) for name in plain},
        "initial_checkpoint": values.initial_checkpoint,
        **_network(values),
        "progress": not values.quiet,
        "callbacks": _trackers(values),
        **chosen(values, recipe),
    }


def _trackers(values: SimpleNamespace) -> list[Callback]:
    """What --log-wandb and --log-mlflow ask for, on the process that reports."""
    if not is_main_process():
        return []
    asked = ((values.log_wandb, WandbTracker), (values.log_mlflow, MlflowTracker))
    return [tracker() for wanted, tracker in asked if wanted]


def _network(values: SimpleNamespace) -> dict[str, Any]:
    """The network's part of the arguments of ``train``: with weights, it starts from these."""
    target = resolve(values.what, to_train=True)
    if target.weights is None:
        return {"model": target.fresh, "model_kwargs": values.model_kwargs}
    if values.initial_checkpoint:
        raise InputError(f"{values.what} has weights of its own: leave out --initial-checkpoint, or give a name")
    built = target.load()
    own = {name: value for name, value in built.options.items() if name not in ("img_size", "num_classes")}
    kwargs = {**own, **(values.model_kwargs or {})}
    return {"model": built.name, "model_kwargs": kwargs, "initial_checkpoint": str(built.path)}


def conclude(values: SimpleNamespace, result: TrainResult) -> None:
    best = result.best
    if best is not None:
        found = "" if best.get("ema_top1") is None else f", {best['ema_top1']:.2f} % of the averaged weights"
        print_on_main(f"Best top-1 {best['top1']:.2f} %{found}, after epoch {best['epoch']}.", values.quiet)
    print_on_main(f"look at it:   asvit-fast report {values.out}", values.quiet)
    print_on_main(f"load in timm: asvit-fast export {values.out} --to model", values.quiet)
    print_on_main(f"validate:     asvit-fast eval {values.out} --data {values.data}", values.quiet)

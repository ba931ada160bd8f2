"""A miniature of timm's train.py: the same calls of timm in the same order; prints what each pass saw as a JSON line.

Run by tests/test_timm_scripts.py, with and without torchrun.
"""

import argparse
import json

import torch
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--model", default="asvit")
parser.add_argument("--model-kwargs", nargs="*", default={}, action=utils.ParseKwargs)
parser.add_argument("--teacher", action="store_true")
parser.add_argument("--torchscript", action="store_true")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--start-epoch", type=int, default=0)
parser.add_argument("--sched", default="cosine")
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--model-ema", default="")
parser.add_argument("--torchcompile", default="")
parser.add_argument("--amp", action="store_true")
parser.add_argument("--metrics", default="", help="of each epoch, to keep checkpoints by")
parser.add_argument("--decreasing", action="store_true")
parser.add_argument("--output", default="")
parser.add_argument("--resume", default="")
parser.add_argument("--stop-epoch", type=int, default=1000)
parser.add_argument("--omit", default="", help="a call that the script leaves out")
SIZE = 64


def tokens(model: nn.Module, images: torch.Tensor) -> list[int]:
    """Rows and columns of tokens after the patch embedding."""
    embedding = utils.unwrap_model(model).patch_embed
    return list(embedding(images).shape[1:3])


def main() -> None:
    args = parser.parse_args()
    args.device = "cpu"
    utils.init_distributed_device(args)
    utils.random_seed(0, args.rank)
    if args.omit == "model":
        return
    model = create_model(args.model, num_classes=2, scriptable=args.torchscript, **args.model_kwargs)
    teacher = create_model(args.model, num_classes=2, **args.model_kwargs) if args.teacher else None
    config = resolve_data_config({"img_size": SIZE}, model=model)
    dataset = create_dataset("", root=args.data, split="train", is_training=True)
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=4,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        distributed=args.distributed,
        persistent_workers=False,
    )
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)
    average = getattr(utils, args.model_ema)(model) if args.model_ema else None
    module = model
    if args.torchcompile:
        module = torch.compile(module, backend=args.torchcompile)
    if args.distributed:
        module = DistributedDataParallel(module)
    if args.omit == "scheduler":
        return
    updates = len(loader)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates,
    )
    if args.start_epoch > 0:
        if args.sched_on_updates:
            scheduler.step_update(args.start_epoch * updates)
        else:
            scheduler.step(args.start_epoch)
    metrics = [float(metric) for metric in args.metrics.split(",") if metric]
    saver = None
    if metrics:
        saver = utils.CheckpointSaver(
            model, optimizer, checkpoint_dir=args.output, decreasing=args.decreasing, max_history=2
        )
        if args.resume and hasattr(saver, "load_state_dict_from_checkpoint"):
            saver.load_state_dict_from_checkpoint(args.resume)
    print(f"scheduler: {type(scheduler).__name__}, by epochs: {scheduler.t_in_epochs}")

    def saw(epoch: int, what: str, images: torch.Tensor) -> None:
        modules = {"model": module, "average": average and average.ema if args.model_ema == "ModelEma" else average}
        if teacher is not None:
            modules["teacher"] = teacher
        seen = {name: tokens(one, images) for name, one in modules.items() if one is not None}
        if args.rank == 0:
            print(json.dumps({"epoch": epoch, "what": what} | seen), flush=True)

    def step(batch: tuple, epoch: int, what: str) -> None:
        images, targets = batch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.amp):
            loss = nn.functional.cross_entropy(module(images), targets)
        if what == "train":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        saw(epoch, what, images)

    for epoch in range(args.start_epoch, min(epochs, args.stop_epoch)):
        for index, batch in enumerate(loader):
            step(batch, epoch, "train")
            if average is not None:
                average.update(model)
            scheduler.step_update(num_updates=epoch * updates + index + 1, metric=0.0)
        with torch.inference_mode():
            step(batch, epoch, "validate")
        if args.omit != "epoch":
            scheduler.step(epoch + 1, 0.0)
        if saver is not None:
            print("best: epoch", saver.save_checkpoint(epoch, metric=metrics[epoch])[1])
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

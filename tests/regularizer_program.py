"""One pass with all terms under DDP or FSDP2, which tests/test_regularizers.py starts; rank 0 prints gradient norms."""

import json
import sys

import torch
import torch.distributed as dist
from test_regularizers import ALL, TOPOLOGY, images
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asvit_fast.models import create_model
from asvit_fast.training.regularizers import Regularization


def gradient_norms(parallel: str) -> list[float]:
    torch.manual_seed(0)
    model = create_model(TOPOLOGY, img_size=32, num_classes=3)
    replica = model
    if parallel == "fsdp":
        for module in (*(block for stage in model.stages for block in stage.blocks), model):
            fully_shard(module)
    else:
        replica = DistributedDataParallel(model)
    regularization = Regularization(model, ALL)
    with regularization:
        logits = replica(images(2, seed=dist.get_rank()))  # [B, classes]
    (logits.square().mean() + regularization.loss()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = [gradient.full_tensor() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    return [gradient.norm().item() for gradient in whole]


def main() -> None:
    dist.init_process_group("gloo")
    for parallel in ("ddp", "fsdp"):
        norms = gradient_norms(parallel)
        if dist.get_rank() == 0:
            sys.stdout.write(json.dumps(norms) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

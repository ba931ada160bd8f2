"""Run by torchrun: every token reduction of a small As-ViT and Swin under DDP and FSDP2, with the gradients of one
process."""

import os
from collections.abc import Callable

# before torch is imported: two processes share the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from timm.models import SwinTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import asvit_fast as af
from asvit_fast.training import token_reduction

TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,4"


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(images).square().mean().backward()
    return {
        name.removeprefix("module."): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in model.named_parameters()
    }


def network() -> nn.Module:
    return af.create_model(TOPOLOGY, img_size=(52, 64), num_classes=5, pos_embed="absolute")


def windowed() -> nn.Module:
    return SwinTransformer((52, 64), 2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), num_classes=5, drop_path_rate=0)


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def agree(kind: str, make: Callable[[], nn.Module]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    single, model = made(make), made(make)
    images = torch.randn(2 * ranks, 3, 52, 64, dtype=torch.float64)
    own = images[2 * rank : 2 * rank + 2]
    if kind == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = init_device_mesh("cpu", (ranks,))
        for part in (model.patch_embed, getattr(model, "stages", None) or model.layers, model):
            fully_shard(part, mesh=mesh)
    retokenizer = af.Retokenizer(model, "1:4,1:2,1:1")
    retokenizer.warmup(own)
    assert all(parameter.grad is None for parameter in model.parameters())
    for epoch, reduction in ((0, 4), (1, 2), (2, 1), (0, 4)):  # full tokens at first
        assert retokenizer.step(epoch)
        assert retokenizer.reduction == token_reduction(model) == reduction
        af.set_token_reduction(single, reduction)
        expected, found = gradients(single, images), gradients(model, own)
        for name, want in expected.items():
            torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: n + text)
    print(f"{make.__name__} {kind} agrees {rank}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind in ("ddp", "fsdp2"):
        for make in (network, windowed):
            agree(kind, make)
    dist.destroy_process_group()

"""Run by torchrun: one step of a small As-ViT under DDP or FSDP2, with its gradients as one process would have them.

parallel_program.py ddp|fsdp [cuda]
"""

import os
import sys

# before torch is imported: two processes share the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import asvit_fast as af

TOPOLOGY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,4"


def gradients(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    model(images).square().mean().backward()
    return {
        name.removeprefix("module."): (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in model.named_parameters()
    }


def main(kind: str, device: str = "cpu") -> None:
    """In float64 with gloo on the CPU, in float32 with NCCL on GPUs."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    dtype = torch.float32 if on_gpu else torch.float64
    model = af.create_model(TOPOLOGY, img_size=64, num_classes=5, attn_scale=True).to(device, dtype)
    images = torch.randn(2 * ranks, 3, 52, 64, dtype=torch.float64).to(device, dtype)
    expected = gradients(model, images)
    model.zero_grad(set_to_none=True)
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device, (ranks,))
        for stage in model.stages:
            fully_shard(stage, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = gradients(model, images[2 * rank : 2 * rank + 2])
    rtol, atol = (1e-3, 1e-5) if on_gpu else (1e-9, 1e-12)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)
    print(f"agree {rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by torchrun: an evaluation over uneven shares, of a plain or a sharded network, is that of one process."""

import os

# before torch is imported: the processes share the machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from asvit_fast.training.evaluate import evaluate

CPU = torch.device("cpu")


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 8), nn.GELU()), nn.Linear(8, 7))
    sets = [(torch.randn(images, 3, 2, 2), torch.arange(images) % 7) for images in (9, 1)]  # 5 and 4; 1 and 0
    alone = [evaluate(model, [images], CPU) for images in sets]
    for sharded in (False, True):
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        for (pixels, targets), expected in zip(sets, alone, strict=True):
            mine = zip(pixels[rank::ranks].split(2), targets[rank::ranks].split(2), strict=True)
            found = evaluate(model, (batch for batch in mine if len(batch[1])), CPU, ranks=ranks)
            assert (found.images, found.top1, found.top5) == (expected.images, expected.top1, expected.top5)
            assert abs(found.loss - expected.loss) < 1e-6
    print(f"agree {rank}", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads, on a loaded machine, may outlive their group and abort the interpreter's end


if __name__ == "__main__":
    main()

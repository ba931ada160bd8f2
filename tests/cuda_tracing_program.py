"""Networks on a GPU that is not there, traced by torch.compile, forward and backward; see test_cuda_tracing.py.

Arguments: dtypes of autocast, separated by commas, then names of networks. Prints one line of JSON: the dtypes of each
one's outputs.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

import fake_cuda
import torch
import torch._dynamo
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node

import asvit_fast as af
from asvit_fast.backends import FallbackWarning

TOPOLOGY = "4,1,2|2,1,2|2,2,2|2,1,2|16"


def make(name: str) -> tuple[nn.Module, int]:
    """A network and the side of its images."""
    if name.startswith("as-vit"):
        model = af.create_model(TOPOLOGY, img_size=64, pos_embed="absolute", attn_scale=True, feat_scale=True)
        model.set_token_reduction(2 if name == "as-vit reduced" else 1)
        return model, 72
    from test_accelerate_families import MODELS

    model, size, expected = MODELS[name]
    accelerated = model()
    replaced = {decision.replacement for decision in af.accelerate(accelerated).swapped}
    assert expected - replaced <= {"FastLinear", "FastMlp", "FastTorchvisionMLP", "FastNormMlp"}, replaced
    return accelerated, size


def fits_a_cuda_graph(graph: torch.fx.GraphModule, _: object) -> object:
    """A compiler that computes as in eager mode, and asks what inductor asks before it records a CUDA graph
    (mode="reduce-overhead"): nothing is on the CPU, or waits for the GPU."""
    assert get_first_incompatible_cudagraph_node(graph) is None
    for node in graph.graph.nodes:
        values = [x for x in torch.utils._pytree.tree_leaves(node.meta.get("val")) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "cuda" for x in values), f"{node.format_node()}: {values}"
        assert node.op != "get_attr", node  # a constant of the trace
    graphs.append(graph)
    return make_boxed_func(graph.forward)


graphs: list[torch.fx.GraphModule] = []
BACKEND = aot_autograd(fw_compiler=fits_a_cuda_graph, bw_compiler=fits_a_cuda_graph)


def trace(name: str, dtype: torch.dtype) -> str:
    """Forward and backward pass of a compiled network: one graph each, for a CUDA graph, every gradient on the GPU."""
    graphs.clear()
    torch._dynamo.reset()
    model, size = make(name)
    with fake_cuda.fake_tensors():
        fake_cuda.to_fake_gpu(model)
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
        with torch.autocast("cuda", dtype):
            output = compiled(torch.randn(2, 3, size, size, device="cuda"))
        output.float().square().sum().backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, missing
        assert all(parameter.grad.device.type == "cuda" for parameter in model.parameters())
    assert len(graphs) == 2, len(graphs)
    return str(output.dtype).removeprefix("torch.")


def main() -> None:
    fake_cuda.install()
    warnings.simplefilter("error", FallbackWarning)
    dtypes = [getattr(torch, dtype) for dtype in sys.argv[1].split(",")]
    found = {name: [trace(name, dtype) for dtype in dtypes] for name in sys.argv[2:]}
    print(json.dumps(found), flush=True)
    os._exit(0)  # autograd's thread of the GPU does not end in order


if __name__ == "__main__":
    main()

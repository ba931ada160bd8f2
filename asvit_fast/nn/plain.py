"""Whether an op may read the weights of a layer instead of calling it."""

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``layer`` is a ``kind`` of torch's and nothing else: no adapter, no quantised or parametrized layer, and
    nobody sees its calls. No layer is plain, too."""
    if layer is None:
        return True
    if type(layer) is not kind or "forward" in vars(layer) or any(getattr(layer, name) for name in HOOKS):
        return False
    if not is_traceable_wrapper_subclass(layer.weight):
        return True
    from torch.distributed.tensor import DTensor  # which takes seconds, and which our ops take

    return isinstance(layer.weight, DTensor)

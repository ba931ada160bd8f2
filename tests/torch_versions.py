"""Features of the torch that is installed, for tests."""

from __future__ import annotations

import torch

# torch 2.11 cannot trace the double backward pass of convolutions, or torch.func.vjp of unfold, with unknown sizes
TRACES_DOUBLE_BACKWARD = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
DYNAMIC_DOUBLE_BACKWARD = ("test_aot_dispatch_dynamic",) if TRACES_DOUBLE_BACKWARD else ()  # of torch.library.opcheck

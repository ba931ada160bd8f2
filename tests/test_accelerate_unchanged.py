"""What a replacement found of its parts at one call holds for the next ones only while nothing of them changes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import asvit_fast as af
from asvit_fast.backends import FallbackWarning

timm = pytest.importorskip("timm")


class Other(nn.Linear):
    """A Linear layer that nobody knows."""


def _replace(block):
    block.attn.proj = Other(32, 32)


def _become(block):
    block.attn.qkv.__class__ = Other


def _subclass(block):
    weight = block.attn.qkv.weight
    block.attn.qkv.weight = type("Special", (nn.Parameter,), {})(weight.detach())


CHANGES = {
    "a hook": lambda block: block.attn.qkv.register_forward_hook(lambda *_: None),
    "a backward hook of a part without children": lambda block: block.attn.proj_drop.register_full_backward_hook(print),
    "another forward": lambda block: setattr(block.attn.softmax, "forward", lambda x: x),
    "another layer": _replace,
    "another class": _become,
    "another class of parameters": _subclass,
    "another dimension": lambda block: setattr(block.attn.softmax, "dim", 1),
    "a scale that is learned": lambda block: setattr(block.attn, "scale", torch.ones(1)),
    "a compiled part": lambda block: setattr(block.attn.proj, "_compiled_call_impl", lambda x: x),
    "an adapter in place of all": lambda block: setattr(block, "attn", nn.Sequential(block.attn)),
}


def block() -> nn.Module:
    model = timm.models.SwinTransformer(32, 4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4).eval()
    af.accelerate(model)
    return model.layers[0].blocks[1]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    module = block()
    for training in (False, True, False):
        module.train(training)
        assert module.can_run() and module.can_run()
    CHANGES[change](module)
    with pytest.warns(FallbackWarning), af.backends.forget_notices():
        assert not module.can_run()
    assert not module.can_run()


def test_changes_that_do_not_matter():
    module = block()
    assert module.can_run()
    module.attn.qkv.note = "mine"
    module.attn.qkv.weight = nn.Parameter(torch.zeros_like(module.attn.qkv.weight))
    assert module.can_run() and module.can_run()
    hook = module.attn.qkv.register_forward_hook(lambda *_: None)
    with pytest.warns(FallbackWarning), af.backends.forget_notices():
        assert not module.can_run()
    hook.remove()
    assert module.can_run()


def test_modules_are_freed():
    module = block()
    assert module.can_run()
    gone = [weakref.ref(module), weakref.ref(module.attn)]
    del module
    gc.collect()
    assert [one() for one in gone] == [None, None]

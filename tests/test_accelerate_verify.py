"""verify: what it compares, that it finds errors, and that it changes nothing."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from tiny_swin import block, classes, images, needs_kernels, swin
from torch import nn

import asvit_fast as af

pytestmark = needs_kernels


def test_verify_leaves_the_model_as_it_is(capsys):
    model = swin(drop_path_rate=0.5, proj_drop_rate=0.2, attn_drop_rate=0.2)
    block(model).eval()
    af.accelerate(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds, flags, random = classes(model), [m.training for m in model.modules()], torch.get_rng_state()
    result = af.verify(model, images())
    assert result.ok, result.table()
    assert classes(model) == kinds and [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "all differences are rounding" in capsys.readouterr().out
    names = {d.name for d in result.differences}
    assert {"output", "gradient of input", "gradient of layers.0.blocks.1.attn.relative_position_bias_table"} <= names
    json.dumps(result.to_dict())


@pytest.mark.parametrize("error", ["padding", "bias", "gradient", "slight"])
def test_verify_finds_errors(error, monkeypatch):
    swin_module = sys.modules["asvit_fast.nn.swin"]
    right = swin_module.window_attention

    def wrong(qkv, heads, window, shift, bias, scale, dropout, layout, padding):
        bias = {"bias": bias.transpose(1, 2), "gradient": bias.detach()}.get(error, bias)
        padding = None if error == "padding" else padding
        scale = scale * (1 + 1e-4) if error == "slight" else scale
        return right(qkv, heads, window, shift, bias, scale, dropout, layout, padding)

    monkeypatch.setattr(swin_module, "window_attention", wrong)
    result = af.verify(swin(), images(), rows=0)
    assert not result.ok
    assert "MORE THAN ROUNDING" in result.table() and "differ by more than rounding" in result.table()
    if error == "gradient":
        assert {d.name.rpartition(".")[2] for d in result.differences if not d.rounding} == {
            "relative_position_bias_table"
        }


def test_verify_takes_losses_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = swin()

        def forward(self, x, factor, flag=True):
            y = self.net(x) * factor
            return {"y": y, "pair": (y + 1, torch.arange(3))} if flag else y

    sample = {"x": images(), "factor": torch.tensor(2.0)}
    result = af.verify(Two(), sample, rows=0, reference=None)
    names = {d.name for d in result.differences}
    assert result.ok and {"output.y", "output.pair.0", "output.pair.1", "gradient of input.factor"} <= names
    result = af.verify(
        Two(), (images(), torch.tensor(2.0), False), loss=lambda y: y.square().mean(), modes=("eval",), rows=0
    )
    assert result.ok and {d.mode for d in result.differences} == {"eval"}
    assert {d.name for d in af.verify(Two(), sample, gradients=False, rows=0).differences} == {
        "output.y",
        "output.pair.0",
        "output.pair.1",
    }
    uncopied = swin()
    uncopied.cache = images().requires_grad_() * 2
    with pytest.raises(af.InputError, match="cannot be copied"):
        af.verify(uncopied, images())
    with pytest.raises(af.InputError, match="modes are"):
        af.verify(Two(), sample, modes=("test",))

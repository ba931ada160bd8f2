"""verify: what it compares, that it finds errors, and that it changes nothing."""

from __future__ import annotations

import importlib
import json

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
    swin_module = importlib.import_module("asvit_fast.acceleration.timm_swin")
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
    with pytest.raises(af.InputError, match="modes are"):
        af.verify(Two(), sample, modes=())


@pytest.mark.parametrize("sample", ["x", None, 3, (), {}, [], {"x": "y"}])
def test_verify_refuses_samples_without_tensors(sample):
    with pytest.raises(af.InputError, match=r"verify: sample must be .* with tensors, got"):
        af.verify(nn.Linear(2, 2), sample)


def test_verify_refuses_outputs_that_cannot_be_compared():
    class Outputs(nn.Linear):
        def forward(self, x, what):
            return {"none": "nothing", "whole": super().forward(x).argmax(-1)}[what]

    x = torch.ones(3, 2)
    with pytest.raises(af.InputError, match="gives a str"):
        af.verify(Outputs(2, 2), (x, "none"))
    with pytest.raises(af.InputError, match="gradients=False"):
        af.verify(Outputs(2, 2), (x, "whole"))
    with pytest.raises(af.InputError, match="no scalar"):
        af.verify(nn.Linear(2, 2), x, loss=lambda y: y)
    assert af.verify(Outputs(2, 2), (x, "whole"), gradients=False, rows=0).ok


def test_verify_takes_one_mode():
    result = af.verify(swin(), images(), modes="eval", rows=0)
    assert result.ok and {d.mode for d in result.differences} == {"eval"}


@pytest.mark.parametrize("gradients", [False, True])
def test_verify_says_that_numbers_are_not_finite(gradients, capsys):
    for bad in (float("nan"), float("inf")):
        model = swin()
        with torch.no_grad():
            model.patch_embed.proj.weight[0] = bad
        result = af.verify(model, images(), modes="eval", gradients=gradients)
        assert not result.ok and not any(d.comparable for d in result.differences if d.name == "output")
        assert "could not be compared" in capsys.readouterr().out or not gradients
        assert "rounding" not in result.table().splitlines()[-1]
    assert "nothing could be compared" in af.verify(model, images(), gradients=False, rows=0).table()


def test_verify_compares_what_is_not_masked():
    """By infinity, which is the same in all of them."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = swin()

        def forward(self, x):
            y = self.net(x)
            return torch.cat([y, torch.full_like(y[:, :1], float("-inf"))], 1)

    result = af.verify(Masked(), images(), gradients=False, rows=0)
    assert result.ok and 0 < result.differences[0].size < float("inf")


def test_what_is_exact_runs_no_kernel(monkeypatch):
    """A network of our ops is held against plain operations, and nobody is warned that no kernel takes float64."""
    backends, ran = importlib.import_module("asvit_fast.backends"), set()
    choose = backends.choose

    def watched(op, device, operands=(), config=None):
        found = choose(op, device, operands, config)
        ran.add((operands[0].dtype, op, found))
        return found

    monkeypatch.setattr(backends, "choose", watched)
    model = af.create_model("4,2,2|2,1,2|2,1,2|2,1,2|8", img_size=44, num_classes=3)
    assert af.verify(model, images(), modes="eval", rows=0).ok
    assert {backend for dtype, _, backend in ran if dtype == torch.float64} == {"reference"}
    assert (torch.float32, "window_attention", "cpu") in ran

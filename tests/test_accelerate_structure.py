"""Code that is no package: recognised by attributes and syntax, whatever its names; unknown attention is reported."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_swin import needs_kernels
from torch import Tensor, nn

import asvit_fast as af
from asvit_fast import backends
from asvit_fast.acceleration import Structural, method_digest, register, registry
from asvit_fast.acceleration.computing import token_major, with_token_major_gradient
from asvit_fast.acceleration.shift_masks import OF_SHIFT, is_of_shift, mask_tensor
from asvit_fast.acceleration.structure import looks_like
from asvit_fast.ops.windows import window_mask

pytestmark = needs_kernels

CODE = '''
import torch
from torch import nn
from torch.nn import functional


def cut(x, side):
    """Windows."""
    b, h, w, c = x.shape
    return x.view(b, h // side, side, w // side, side, c).transpose(2, 3).reshape(-1, side * side, c)


class Mixer(nn.Module):
    def __init__(self, channels=8, heads=2):
        super().__init__()
        self.heads = heads
        self.side = 2
        self.qkv = nn.Linear(channels, 3 * channels)

    def split(self, x):
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x):
        b, h, w, c = x.shape
        q, k, v = self.split(self.qkv(cut(x, self.side)))
        scores = q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5
        out = (functional.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)
        out = out.view(b, h // self.side, w // self.side, self.side, self.side, c)
        return out.transpose(2, 3).reshape(x.shape)
'''


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., types.ModuleType]:
    """A file with the code, changed."""
    numbers = itertools.count()

    def load_changed(*changes: tuple[str, str]) -> types.ModuleType:
        code = CODE
        for old, new in changes:
            assert old in code
            code = code.replace(old, new)
        name = f"mixer_{next(numbers)}"
        path = tmp_path / f"{name}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load_changed


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setattr(backends, "_notified", set())


class FastMixer(Structural):
    """Attention in windows of 2 x 2 tokens of a map [B, H, W, C]."""

    ops = ("window_attention",)
    origin = "someone/mixers mixer.py: Mixer"
    reads = ("heads", "side")
    parts = {"qkv": (nn.Linear,)}  # noqa: RUF012 as users write it

    def forward(self, x: Tensor) -> Tensor:
        if not self.can_run():
            return self.source.forward(self, x)
        qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
        return af.ops.window_attention(qkv, self.heads, (self.side,) * 2)


def known(load: Callable[..., types.ModuleType]) -> types.ModuleType:
    """Registers the replacement for the code as it is."""
    module = load()
    FastMixer.structure = {"": {"forward": (method_digest(module.Mixer, "forward"),)}}
    register(FastMixer)
    return module


def reason(model: nn.Module) -> str | None:
    """Why a single module is not recognised; None if it has the fast class."""
    report = af.accelerate(model)
    if isinstance(model, FastMixer):
        return None
    (unknown,) = report.unknown
    return unknown.reason


LOCALS = [
    ("b, h, w, c", "n, rows, columns, width"),
    ("view(b, h // self.side, w // self.side", "view(n, rows // self.side, columns // self.side"),
    ("self.side, c)\n        return out", "self.side, width)\n        return out"),
    ("(c // self.heads)", "(width // self.heads)"),
    ("view(b, h // side, side, w // side, side, c)", "view(n, rows // side, side, columns // side, side, width)"),
    ("side * side, c)", "side * side, width)"),
    ("scores", "products"),
]
FUNCTIONS = [
    *(("def cut", "def windows_of"), ("(cut(", "(windows_of("), ("class Mixer", "class Thing")),
    *(("def split", "def part"), ("self.split", "self.part")),
]
SAME = {
    "names of locals": LOCALS,
    "names of functions and classes": FUNCTIONS,
    "names of modules": [
        ("from torch.nn import functional", "import torch.nn.functional as F"),
        ("functional.softmax", "F.softmax"),
    ],
    "comments and formatting": [("        q, k, v =", "        # of every window\n        q, k, v  =\\\n           ")],
    "docstrings": [
        ('"""Windows."""', '"""Something else."""'),
        ("    def split(self, x):\n", '    def split(self, x):\n        """Heads."""\n'),
    ],
    "annotations": [
        ("def forward(self, x):", "def forward(self, x: torch.Tensor) -> torch.Tensor:"),
        ("        scores =", "        scores: torch.Tensor ="),
    ],
    "statements that do nothing": [("        q, k, v =", "        pass\n        q, k, v =")],
}
OTHER = {
    "operator": [("* (c // self.heads) ** -0.5", "/ (c // self.heads) ** -0.5")],
    "constant": [("** -0.5", "** -0.25")],
    "attribute": [("w // self.side, self.side, self.side", "w // self.side, self.side, self.heads")],
    "order": [(".transpose(2, 3).reshape(x.shape)", ".transpose(3, 2).reshape(x.shape)")],
    "a function that it calls": [("transpose(2, 3).reshape(-1", "transpose(1, 3).reshape(-1")],
    "a method that it calls": [("permute(2, 0, 3, 1, 4)", "permute(2, 0, 3, 1, 4).contiguous()")],
    "a function of another module": [("from torch.nn import functional", "from torch import special as functional")],
}


def mixer_of(module: types.ModuleType) -> nn.Module:
    torch.manual_seed(0)
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    return kinds[0]()


def test_digests_stay(load):
    """With every version of Python, and of ours: those of the known code are stored."""
    assert method_digest(load().Mixer, "forward") == "9e60784959f9ac39"


@pytest.mark.parametrize("what", SAME)
def test_what_does_not_count(what, load):
    known(load)
    model = mixer_of(load(*SAME[what]))
    assert reason(model) is None
    af.restore(model)
    af.check_replacement(model, [torch.randn(2, 4, 6, 8), torch.randn(1, 2, 2, 8)])


@pytest.mark.parametrize("what", OTHER)
def test_what_counts(what, load):
    known(load)
    model = mixer_of(load(*OTHER[what]))
    assert reason(model) == "its forward is not that of someone/mixers mixer.py: Mixer"


def test_the_name_alone_is_nothing(load):
    known(load)
    model = mixer_of(load(("self.side = 2", "self.step = 2"), ("self.side", "self.step")))
    assert not looks_like(FastMixer, model)
    assert {decision.replacement for decision in af.accelerate(model).decisions} == {"FastLinear"}


def test_a_source_that_cannot_be_read(load):
    known(load)
    space: dict = {"__name__": "nowhere"}
    exec(CODE, space)
    assert reason(space["Mixer"]()) == "its forward has no source that can be read"


def test_methods_that_were_replaced(load):
    module = known(load)
    model, late = mixer_of(module), mixer_of(module)
    af.accelerate(model)
    x = torch.randn(1, 4, 4, 8)
    expected = model(x)
    module.Mixer.forward = lambda self, x: x + 1.0
    with pytest.warns(backends.FallbackWarning, match="forward was replaced"):
        torch.testing.assert_close(model(x), x + 1.0)
    assert not torch.equal(expected, x + 1.0)
    assert reason(late) is not None


def test_subclasses(load):
    """One that adds something is known, one that computes something else is not."""
    module = known(load)
    named = type("Named", (module.Mixer,), {"__module__": module.__name__, "label": "mine"})
    assert reason(named()) is None
    doubled = type("Doubled", (module.Mixer,), {"forward": lambda self, x: 2 * x, "__module__": module.__name__})
    assert reason(doubled()) is not None


def test_copied_pickled_and_restored(load):
    module = known(load)
    model = nn.Sequential(mixer_of(module), nn.LayerNorm(8))
    x = torch.randn(1, 4, 4, 8)
    expected = model(x)
    af.accelerate(model)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert type(twin[0]) is type(model[0]) and torch.equal(twin(x), model(x))
    assert [type(part) for part in af.restore(twin).modules()] == [nn.Sequential, module.Mixer, nn.Linear, nn.LayerNorm]
    assert torch.equal(twin(x), expected)
    assert af.accelerate(model).swapped[0].replacement == "FastMixer"  # again


def test_compiled(load):
    model = mixer_of(known(load))
    x = torch.randn(1, 4, 4, 8)
    expected = model(x)
    af.accelerate(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)


# --------------------------------------------------------------------------- unknown attention


def test_report_of_unknown_attention(load):
    module = load(("self.side", "self.window_size"))
    model = nn.Sequential(*(mixer_of(module) for _ in range(3)), nn.Linear(8, 8))
    report = af.accelerate(model, strict=True)  # it does not count
    (unknown,) = report.unknown
    assert unknown.source == f"{module.__name__}.Mixer" and unknown.modules == ("0", "1", "2")
    assert unknown.file.startswith(module.__file__)
    lines = str(report).splitlines()
    at = lines.index("windowed attention that is not known:")
    assert lines[at + 1] == f"     3 Mixer  {unknown.file}" and "acceleration.register" in lines[at + 2]
    assert report.to_dict()["unknown"][0]["source"] == unknown.source
    assert "not known" in report._repr_html_()


def test_what_is_no_windowed_attention_is_not_named():
    assert af.accelerate(nn.Sequential(nn.Conv2d(3, 3, 3), nn.MultiheadAttention(8, 2))).unknown == ()


def test_containers_are_not_named(load):
    """The innermost class that attends is what to replace."""
    module = load(("self.side", "self.window_size"))

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.window_size = 2
            self.blocks = nn.ModuleList([mixer_of(module)])

    report = af.accelerate(nn.Sequential(Stage()))
    assert [kind.modules for kind in report.unknown] == [("0.blocks.0",)]


# --------------------------------------------------------------------------- masks that are handed in


def test_masks_of_the_shift():
    size, window, shift = (8, 12), (4, 4), (2, 2)
    mask = window_mask(list(size), list(window), list(shift), torch.float32, torch.device("cpu"), "timm")
    assert is_of_shift("A", mask, size, window, shift) and is_of_shift("A", OF_SHIFT, size, window, shift)
    assert is_of_shift("A", None, size, window, (0, 0))
    assert torch.equal(mask_tensor(OF_SHIFT.to("cpu"), size, window, shift, mask), mask)
    assert mask_tensor(mask, size, window, shift, mask) is mask
    with pytest.warns(
        backends.FallbackWarning, match="runs A as its source does: the mask that it is called with is not"
    ):
        assert not is_of_shift("A", mask - 1.0, size, window, shift)
    with pytest.warns(backends.FallbackWarning, match="shift and no"):
        assert not is_of_shift("A", None, size, window, shift)


def test_token_major():
    """Channels lie side by side in tokens and gradients, whatever comes in; of any order, under transforms."""
    x = torch.randn(2, 5, 6, dtype=torch.float64).transpose(1, 2).requires_grad_()  # [B, N, C], as from a convolution
    strided = torch.randn(2, 5, 6, dtype=torch.float64).transpose(1, 2)

    def twice(x: Tensor) -> Tensor:
        return with_token_major_gradient(2 * token_major(x))

    y = twice(x)
    assert y.is_contiguous() and torch.equal(y, 2 * x)
    y.mul_(1.0)  # as a hook of the user's may
    (gradient,) = torch.autograd.grad(y, x, strided)
    assert gradient.is_contiguous() and torch.equal(gradient, 2 * strided)
    assert torch.autograd.gradcheck(twice, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(twice, x)
    _, tangent = torch.func.jvp(twice, (x,), (strided,))
    assert torch.equal(tangent, 2 * strided)
    assert torch.equal(torch.func.vmap(torch.func.grad(lambda x: twice(x).sum()))(x), torch.full_like(x, 2))
    assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), 2 * x)

"""Tests that every Taylor op passes: subclasses of StackedOp say what the op is, and add what only it promises."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from accuracy import TINY
from torch import Tensor
from torch.profiler import ProfilerActivity

from asvit_fast import _extension, backends

EXTENSION = _extension.extension()
needs_extension = pytest.mark.skipif(EXTENSION is None, reason=str(_extension.reason()))
every_isa = pytest.mark.parametrize("isa", EXTENSION.available_isas() if EXTENSION else [], indirect=True)


def rows(orders: int, *shape: int, dtype: torch.dtype = torch.float32, device="cpu", scale: float = 3.0) -> Tensor:
    """Random x [orders + 1, *shape]; `scale` widens the value, so that it reaches both tails."""
    generator = torch.Generator().manual_seed(orders)
    x = torch.randn(orders + 1, *shape, generator=generator, dtype=torch.float64)
    x[0] *= scale
    return x.to(dtype).to(device)


def far_apart(x: Tensor, steps: list[int]) -> Tensor:
    """x with the strides `steps`, in memory that takes place only where there are values."""
    size = 1 + sum((length - 1) * step for length, step in zip(x.shape, steps, strict=True))
    no_reserve = 0x4000  # of Linux; Python's mmap has no name for it before 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = torch.frombuffer(mmap.mmap(-1, size * x.element_size(), flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, steps).copy_(x)


def along_curve(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` and its derivatives along the curve of x [orders + 1, ...], in float64, by torch.func.jvp."""
    x = x.detach().cpu().double()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def at(time: Tensor) -> Tensor:
        return function(sum(row * time**k / max(k, 1) for k, row in enumerate(x)))

    def velocity(time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(at, (time,), (one,))

    (value, first), (_, second) = torch.func.jvp(velocity, (zero,), (one,))
    return torch.stack([value, first, second][: len(x)])


def errors(y: Tensor, truth: Tensor) -> list[float]:
    """The largest deviation of each row."""
    deviation = (y.detach().cpu().double() - truth).abs().flatten(1)
    return deviation.amax(1).tolist() if truth.numel() else []


def assert_as_exact(ours: Tensor, theirs: Tensor, truth: Tensor, tiny: float) -> None:
    """Row by row, error(ours) <= 2 error(theirs) + tiny, the latter relative to the row's largest value if above 1."""
    scale = truth.abs().flatten(1).amax(1).clamp(min=1.0).tolist() if truth.numel() else []
    for mine, other, size in zip(errors(ours, truth), errors(theirs, truth), scale, strict=True):
        assert mine <= 2 * other + tiny * size


def forward_mode(function, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda z: f(z).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f, in_dims=1, out_dims=1)(x),
    "vmap(grad)": lambda f, x: torch.vmap(torch.func.grad(lambda z: f(z).square().sum()), in_dims=1)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "forward mode": lambda f, x: forward_mode(f, x, x.cos()),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda z: f(z).square().sum())(x),
}


class StackedOp:
    """One op y = f(x) on stacks [orders + 1, ..., C]."""

    name: ClassVar[str]
    op: ClassVar[Callable[..., Tensor]]
    reference: ClassVar[Callable[..., Tensor]]
    # trailing sizes on both sides of every vector length, rows empty and single
    shapes: ClassVar[list[tuple[int, ...]]] = [(1, 1), (5, 7), (3, 16), (2, 33), (2, 3, 257), (1, 1024), (0, 4)]

    def function(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """f in plain PyTorch operations on x [..., C], whose nested forward mode torch gets right."""
        raise NotImplementedError

    def parameters(self, channels: int, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, ...]:
        """The op's parameters after x, of C channels."""
        return ()

    def exact(self, x: Tensor, *parameters: Tensor) -> Tensor:
        exact = [parameter.detach().cpu().double() for parameter in parameters]
        return along_curve(lambda value: self.function(value, *exact), x)

    def check(self, x: Tensor, *parameters: Tensor) -> None:
        cls = type(self)
        y = cls.op(x, *parameters)
        assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
        assert_as_exact(y, cls.reference(x, *parameters), self.exact(x, *parameters), TINY[x.dtype])

    @pytest.mark.usefixtures("poison_empty")
    @pytest.mark.parametrize("dtype", list(TINY))
    @pytest.mark.parametrize("orders", [0, 1, 2])
    def test_forward(self, device, orders, dtype):
        for shape in self.shapes:
            self.check(rows(orders, *shape, dtype=dtype, device=device), *self.parameters(shape[-1], dtype, device))

    @needs_extension
    @every_isa
    @pytest.mark.usefixtures("poison_empty")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("orders", [0, 1, 2])
    def test_every_isa(self, isa, orders, dtype):
        with backends.use_backend("cpu"):
            for size in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 49, 64, 100, 1001, 4096):
                self.check(rows(orders, 3, size, dtype=dtype), *self.parameters(size, dtype))

    @needs_extension
    @every_isa
    def test_result_does_not_depend_on_position(self, isa):
        x, parameters = rows(2, 60, 21), self.parameters(21, torch.float32)
        cls = type(self)
        assert torch.equal(cls.op(x[:, 3:42], *parameters), cls.op(x, *parameters)[:, 3:42])

    @needs_extension
    def test_threads_agree(self):
        x, parameters = rows(2, 5003, 19), self.parameters(19, torch.float32)
        before, results = torch.get_num_threads(), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(type(self).op(x, *parameters))
        torch.set_num_threads(before)
        assert all(torch.equal(results[0], other) for other in results[1:])

    def test_more_rows_than_65535(self, device):
        """The most blocks along the second dimension of a grid."""
        self.check(rows(2, 70_000, 4, device=device), *self.parameters(4, torch.float32, device))

    @needs_extension
    @every_isa
    @pytest.mark.parametrize("first", [0, 1], ids=["everything", "derivatives"])
    def test_denormals(self, isa, first):
        """Derivatives too small for a normal number keep the digits that they have."""
        x, parameters = rows(2, 3, 40, scale=1.0), self.parameters(40, torch.float32)
        x[first:] *= 1e-40
        y, truth = type(self).op(x, *parameters), self.exact(x, *parameters)
        assert truth[1].abs().max() > 0
        mine, theirs = errors(y, truth), errors(type(self).reference(x, *parameters), truth)
        assert all(ours <= 2 * other + 1e-43 for ours, other in zip(mine[1:], theirs[1:], strict=True))

    def test_non_contiguous(self, device):
        x = rows(2, 6, 50, device=device)
        for view in (x[:, ::2], x.transpose(1, 2), x[:, :, 1:], x.flip(1)):
            parameters = self.parameters(view.shape[-1], torch.float32, device)
            ours = type(self).op(view, *parameters)
            torch.testing.assert_close(ours, type(self).op(view.contiguous(), *parameters), rtol=1e-6, atol=1e-6)

    def test_does_not_write_into_its_input(self, device):
        x = rows(2, 4, 40, device=device)
        before = x.clone()
        type(self).op(x, *self.parameters(40, torch.float32, device))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("orders", [0, 1, 2])
    def test_gradients(self, device, orders):
        inputs = [rows(orders, 2, 3, dtype=torch.float64, device=device, scale=1.0)]
        inputs += self.parameters(3, torch.float64, device)
        for tensor in inputs:
            tensor.requires_grad_()
        assert torch.autograd.gradcheck(type(self).op, inputs)
        assert torch.autograd.gradcheck(type(self).reference, inputs)
        assert torch.autograd.gradgradcheck(type(self).op, inputs)

    @pytest.mark.parametrize("orders", [0, 1, 2])
    def test_opcheck(self, device, orders):
        for requires_grad in (False, True):
            x = rows(orders, 5, 3, device=device).requires_grad_(requires_grad)
            parameters = self.parameters(3, torch.float32, device)
            torch.library.opcheck(self.raw(), (x, *self.arguments(parameters)))

    def raw(self) -> Any:
        return getattr(torch.ops.asvit_fast, self.name).default

    def arguments(self, parameters: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Arguments of the raw op after x."""
        return parameters

    def test_compile(self, device):
        parameters = self.parameters(5, torch.float32, device)

        def loss(x: Tensor) -> Tensor:
            return (type(self).op(x.sin(), *parameters) ** 2).sum()

        x = rows(2, 9, 5, device=device).requires_grad_()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), loss(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("transform", list(TRANSFORMS))
    def test_transforms(self, transform, compiled):
        x, parameters = rows(2, 2, 4, dtype=torch.float64, scale=1.0), self.parameters(4, torch.float64)

        def run(function) -> Tensor:
            return TRANSFORMS[transform](lambda z: function(z, *parameters), x)

        ours = torch.compile(run, backend="aot_eager") if compiled else run
        torch.testing.assert_close(ours(type(self).op), run(type(self).reference))

    def test_export(self):
        function, parameters = type(self).op, self.parameters(8, torch.float32)

        class Module(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return function(x, *parameters)

        x = rows(1, 3, 8)
        torch.testing.assert_close(torch.export.export(Module(), (x,)).module()(x), function(x, *parameters))

    @pytest.mark.parametrize("backend", ["reference", "cpu"])
    def test_forced_backend(self, backend):
        if backends.available(self.name, backend, "cpu") is not None:
            pytest.skip(str(_extension.reason()))
        x, parameters = rows(2, 3, 33), self.parameters(33, torch.float32)
        with backends.use_backend(backend), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
            ours = type(self).op(x, *parameters)
        compiled = [event.name for event in profile.events() if event.name.startswith("asvit_fast_C::")]
        assert bool(compiled) == (backend == "cpu")
        torch.testing.assert_close(ours, type(self).reference(x, *parameters))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", list(TINY))
    @pytest.mark.parametrize("size", [1, 3, 32, 49, 512, 1025, 4096])
    def test_gpu_backend(self, size, dtype):
        why = backends.available(self.name, "cuda", "cuda")
        if why is not None:
            pytest.skip(why)
        with backends.use_backend("cuda"):
            for orders in (0, 1, 2):
                x = rows(orders, 300, size, dtype=dtype, device="cuda")
                self.check(x, *self.parameters(size, dtype, "cuda"))

"""The As-ViT network as a pure function in JAX, and JAX's derivatives of it: a peer of bench_scores.py.

    pip install jax

Written as a user of JAX would write it: jax.numpy and jax.lax, compiled whole by jax.jit, weights as arguments, so that
XLA does not fold them into the program. On a CPU XLA runs threads of its own: OMP_NUM_THREADS does not bind them,
the cores that the process may use do (taskset).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory of the same GPU

import jax
import jax.numpy as jnp
import torch
from jax import Array, lax
from jax.experimental.jet import jet
from torch import Tensor

from asvit_fast import AsViT
from asvit_fast.topology import EMBED_STRIDE, Topology

Weights = dict[str, Array]  # names of our state_dict
Features = Callable[[Weights, Array], Array]  # images [B, 3, H, W] -> [B, F]

LAYER_NORM_EPS = 1e-5


# --------------------------------------------------------------------------- network


def score_features(topology: Topology, weights: Weights, x: Array) -> Array:
    """Images [B, 3, H, W] -> [B, F]: tokens averaged before the final norm. LayerNorms run where weights has them."""
    x = patch_embed(weights, x, topology.stages[0].kernel)  # [B, H/4, W/4, C]
    for i, (stage, heads) in enumerate(zip(topology.stages, topology.stage_heads, strict=True)):
        if i > 0:
            x = patch_merge(weights, f"stages.{i}.downsample", x, stage.kernel)  # [B, ceil(H/2), ceil(W/2), 2C]
        for j in range(stage.depth):
            block = f"stages.{i}.blocks.{j}"
            x = x + window_attention(weights, f"{block}.attn", norm(weights, f"{block}.norm1", x), heads, stage.splits)
            x = x + mlp(weights, f"{block}.mlp", norm(weights, f"{block}.norm2", x))
    return x.mean((1, 2))


def norm(weights: Weights, name: str, x: Array) -> Array:
    """LayerNorm over the last dimension, if the network has it."""
    if f"{name}.weight" not in weights:
        return x
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)  # [..., 1]
    return centred * lax.rsqrt(variance + LAYER_NORM_EPS) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(weights: Weights, name: str, x: Array) -> Array:
    """[..., in] -> [..., out], with the bias if there is one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros (before, after) along one axis such that ceil(size / stride) patches come out."""
    before = max(kernel - stride, 0) // 2
    return before, max((-(-size // stride) - 1) * stride + kernel - size - before, 0)


def patch_embed(weights: Weights, x: Array, kernel: int) -> Array:
    """Images [B, 3, H, W] -> [B, ceil(H/4), ceil(W/4), C]."""
    x = lax.conv_general_dilated(
        x,
        weights["patch_embed.proj.weight"],  # [C, 3, K, K]
        window_strides=(EMBED_STRIDE, EMBED_STRIDE),
        padding=[padding(side, kernel, EMBED_STRIDE) for side in x.shape[2:]],
        dimension_numbers=("NCHW", "OIHW", "NHWC"),
    )
    return norm(weights, "patch_embed.norm", x + weights["patch_embed.proj.bias"])


def patch_merge(weights: Weights, name: str, x: Array, kernel: int) -> Array:
    """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]: K x K neighbourhoods with stride 2, LayerNorm, projection."""
    pads = [padding(side, kernel, 2) for side in x.shape[1:3]]
    numbers = ("NHWC", "OIHW", "NHWC")
    if f"{name}.norm.weight" in weights:
        patches = lax.conv_general_dilated_patches(x, (kernel, kernel), (2, 2), pads, dimension_numbers=numbers)
        return linear(weights, f"{name}.reduction", norm(weights, f"{name}.norm", patches))  # patches [..., C*K*K]
    projection = weights[f"{name}.reduction.weight"].reshape(-1, x.shape[3], kernel, kernel)  # [2C, C, K, K]
    return lax.conv_general_dilated(x, projection, (2, 2), pads, dimension_numbers=numbers)


def window_attention(weights: Weights, name: str, x: Array, heads: int, splits: int) -> Array:
    """Attention in splits x splits windows, [B, H, W, C] -> [B, H, W, C]; tokens of padding are no keys."""
    batch, height, width, _ = x.shape
    qkv = linear(weights, f"{name}.qkv", x)  # [B, H, W, 3*heads*d]
    window = -(-height // splits), -(-width // splits)
    rows, columns = -(-height // window[0]), -(-width // window[1])  # windows per side
    qkv = jnp.pad(qkv, ((0, 0), (0, rows * window[0] - height), (0, columns * window[1] - width), (0, 0)))
    qkv = qkv.reshape(batch, rows, window[0], columns, window[1], 3, heads, -1)
    q, k, v = qkv.transpose(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, rows * columns, heads, window[0] * window[1], -1)
    scores = jnp.einsum("bwhqd,bwhkd->bwhqk", q, k) * q.shape[-1] ** -0.5  # [B, windows, heads, tokens, tokens]
    real = jnp.zeros((rows * window[0], columns * window[1]), bool).at[:height, :width].set(True)
    real = real.reshape(rows, window[0], columns, window[1]).transpose(0, 2, 1, 3)
    if (height, width) != (rows * window[0], columns * window[1]):
        scores += jnp.where(real.reshape(rows * columns, 1, 1, -1), 0.0, -3.0e4)
    out = jnp.einsum("bwhqk,bwhkd->bwhqd", jax.nn.softmax(scores), v)  # [B, windows, heads, tokens, d]
    out = out.reshape(batch, rows, columns, heads, *window, -1).transpose(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(batch, rows * window[0], columns * window[1], -1)[:, :height, :width]  # [B, H, W, heads*d]
    return linear(weights, f"{name}.proj", out)


def mlp(weights: Weights, name: str, x: Array) -> Array:
    """Linear, GELU, Linear: [..., C] -> [..., C]. GELU by erf: jet has no rule for the erfc of jax.nn.gelu."""
    x = linear(weights, f"{name}.fc1", x)
    return linear(weights, f"{name}.fc2", 0.5 * x * (1 + lax.erf(x * 0.5**0.5)))


# --------------------------------------------------------------------------- derivatives


def order_1(features: Features, weights: Weights, x: Array, dx: Array) -> tuple[Array, ...]:
    """(y, y'), each [B, F]."""
    return jax.jvp(partial(features, weights), (x,), (dx,))


def order_2_nested(features: Features, weights: Weights, x: Array, dx: Array) -> tuple[Array, ...]:
    """(y, y', y'') along a circle, where x'' = -x, by forward mode through forward mode."""

    def velocity(t: Array) -> tuple[Array, Array]:
        return jax.jvp(lambda s: features(weights, x + s * dx - 0.5 * s * s * x), (t,), (jnp.ones_like(t),))

    zero = jnp.zeros((), x.dtype)
    (y, v), (_, a) = jax.jvp(velocity, (zero,), (jnp.ones_like(zero),))
    return y, v, a


def order_2_jet(features: Features, weights: Weights, x: Array, dx: Array) -> tuple[Array, ...]:
    """The same by JAX's Taylor mode."""
    y, (v, a) = jet(partial(features, weights), (x,), ((dx, -x),))
    return y, v, a


def gram(features: Features, weights: Weights, images: Array) -> Array:
    """The NTK Gram [B, B] through vmap(grad), one gradient per sample and weight kept."""
    chosen = {name: weight for name, weight in weights.items() if "weight" in name}

    def total(chosen: Weights, image: Array) -> Array:
        return features({**weights, **chosen}, image[None]).sum()

    rows = jax.vmap(jax.grad(total), in_axes=(None, 0))(chosen, images)
    flat = [row.reshape(len(images), -1) for row in rows.values()]  # of every weight [B, elements]
    return jnp.stack([row @ row.T for row in flat]).sum(0)


FUNCTIONS = {"jvp": order_1, "nested jvp": order_2_nested, "jet": order_2_jet, "vmap(grad)": gram}


# --------------------------------------------------------------------------- from torch and back


class Peer:
    """JAX's derivatives of one of our networks, on the same weights and device; RuntimeError where JAX lacks it."""

    def __init__(self, model: AsViT, device: torch.device) -> None:
        platform = "gpu" if device.type == "cuda" else "cpu"
        self.device = jax.devices(platform)[device.index or 0]
        self.features = partial(score_features, model.topology)
        self.weights = {name: self.array(weight) for name, weight in model.state_dict().items()}
        threads = ", threads of its own" if platform == "cpu" else ""
        self.note = f"jax {jax.__version__}, XLA on {platform}{threads}"

    def array(self, tensor: Tensor) -> Array:
        return jax.device_put(tensor.detach().cpu().numpy(), self.device)

    def compile(self, name: str, *tensors: Tensor) -> Callable[[], object]:
        """One of FUNCTIONS on these inputs (x [B, 3, H, W], and its velocity for passes), compiled, ready to run.

        A run waits for its end and returns torch tensors.
        """
        arrays = [self.array(tensor) for tensor in tensors]
        with jax.default_matmul_precision("highest"):  # float32, no TF32
            compiled = jax.jit(partial(FUNCTIONS[name], self.features)).lower(self.weights, *arrays).compile()

        def run() -> object:
            return jax.tree.map(torch.from_dlpack, jax.block_until_ready(compiled(self.weights, *arrays)))

        return run

"""The Triton kernel that sums gradients of k and v where windows of keys overlap: each window was differentiated for
itself, and a token is in several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, kv_of

BLOCK_C, BLOCK_M = 64, 32  # channels and tokens of a program


@triton.jit
def _in_window(position, size, turn, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    # along one axis, a window of keys with the token at `position`, which one it is in there, and whether there is one
    WINDOW: tl.constexpr = SHAPE.window[AXIS]
    KEYS: tl.constexpr = SHAPE.key_window[AXIS]
    position += (KEYS - WINDOW) // 2
    window = position // WINDOW - turn
    key = position - window * WINDOW
    return window, key, (window >= 0) & (window < tl.cdiv(size, WINDOW)) & (key < KEYS)


@triton.jit(do_not_specialize=SIZES)
def window_attention_overlap_kernel(
    windows_pointer,  # [2, windows, KEYS, channels]: gradients of k and v in each window
    grad_q_pointer,  # that of all three if SHAPE.FUSED
    grad_k_pointer,  # [B, D, H, W, channels], written, tokens SHAPE.grad_strides[0] apart
    grad_v_pointer,
    windows, depth, height, width,
    SHAPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each program: BLOCK_C channels of BLOCK_M tokens."""
    ACROSS: tl.constexpr = (SHAPE.channels + BLOCK_C - 1) // BLOCK_C
    PLANES: tl.constexpr = (SHAPE.key_window[0] + SHAPE.window[0] - 1) // SHAPE.window[0]  # that have a token, at most
    ROWS: tl.constexpr = (SHAPE.key_window[1] + SHAPE.window[1] - 1) // SHAPE.window[1]
    COLUMNS: tl.constexpr = (SHAPE.key_window[2] + SHAPE.window[2] - 1) // SHAPE.window[2]
    tokens = depth * height * width
    block, blocks = tl.program_id(0) // ACROSS, tl.cdiv(tokens, BLOCK_M)
    image = block // blocks
    token = (block - image * blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0) % ACROSS * BLOCK_C + tl.arange(0, BLOCK_C)
    column, row = token % width, token // width
    plane, row = row // height, row % height
    deep, down = tl.cdiv(depth, SHAPE.window[0]), tl.cdiv(height, SHAPE.window[1])
    across = tl.cdiv(width, SHAPE.window[2])
    mask = (token < tokens)[:, None] & (channel < SHAPE.channels)[None, :]
    grad_k = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    of_v = tl.cast(windows, tl.int64) * (SHAPE.keys * SHAPE.channels)
    for turn in range(PLANES * ROWS * COLUMNS):
        i, a, in_planes = _in_window(plane, depth, turn // (ROWS * COLUMNS), 0, SHAPE)
        j, b, in_rows = _in_window(row, height, turn // COLUMNS % ROWS, 1, SHAPE)
        k, c, in_columns = _in_window(column, width, turn % COLUMNS, 2, SHAPE)
        number = ((tl.cast(image, tl.int64) * deep + i) * down + j) * across + k
        key = (a * SHAPE.key_window[1] + b) * SHAPE.key_window[2] + c
        elements = windows_pointer + ((number * SHAPE.keys + key) * SHAPE.channels)[:, None] + channel[None, :]
        present = mask & (in_planes & in_rows & in_columns)[:, None]
        grad_k += tl.load(elements, mask=present, other=0.0).to(tl.float32)
        grad_v += tl.load(elements + of_v, mask=present, other=0.0).to(tl.float32)
    k_pointer, v_pointer = kv_of(grad_q_pointer, grad_k_pointer, grad_v_pointer, SHAPE.FUSED, SHAPE)
    place = (tl.cast(image, tl.int64) * tokens + token) * SHAPE.grad_strides[0]
    place = place[:, None] + channel[None, :]
    tl.store(k_pointer + place, grad_k.to(k_pointer.dtype.element_ty), mask=mask)
    tl.store(v_pointer + place, grad_v.to(v_pointer.dtype.element_ty), mask=mask)

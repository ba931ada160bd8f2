"""The Triton kernel that sums gradients of k and v where windows of keys overlap: each window was differentiated for
itself, and a token is in several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .window_attention_geometry import SIZES, kv_of

BLOCK_C, BLOCK_M = 64, 32  # channels and tokens of a program


@triton.jit
def _descend(number, key, present, position, size, turn, AXIS: tl.constexpr, SHAPE: tl.constexpr):
    # along one more axis, the `turn`-th window back from `position`: the numbers so far of the window and of the key in
    # it, and whether it is there and has the token
    WINDOW: tl.constexpr = SHAPE.window[AXIS]
    KEYS: tl.constexpr = SHAPE.key_window[AXIS]
    count = tl.cdiv(size, WINDOW)
    position += (KEYS - WINDOW) // 2
    window = position // WINDOW - turn
    place = position - window * WINDOW
    present &= (window >= 0) & (window < count) & (place < KEYS)
    return number * count + window, key * KEYS + place, present


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
    grad_k = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    of_v = tl.cast(windows, tl.int64) * (SHAPE.keys * SHAPE.channels)
    for turn in range(PLANES * ROWS * COLUMNS):
        number, key, present = tl.cast(image, tl.int64), 0, token < tokens
        if SHAPE.HAS_DEPTH:
            number, key, present = _descend(number, key, present, plane, depth, turn // (ROWS * COLUMNS), 0, SHAPE)
        number, key, present = _descend(number, key, present, row, height, turn // COLUMNS % ROWS, 1, SHAPE)
        number, key, present = _descend(number, key, present, column, width, turn % COLUMNS, 2, SHAPE)
        elements = windows_pointer + ((number * SHAPE.keys + key) * SHAPE.channels)[:, None] + channel[None, :]
        mask = present[:, None] & (channel < SHAPE.channels)[None, :]
        grad_k += tl.load(elements, mask=mask, other=0.0).to(tl.float32)
        grad_v += tl.load(elements + of_v, mask=mask, other=0.0).to(tl.float32)
    k_pointer, v_pointer = kv_of(grad_q_pointer, grad_k_pointer, grad_v_pointer, SHAPE.FUSED, SHAPE)
    mask = (token < tokens)[:, None] & (channel < SHAPE.channels)[None, :]
    place = (tl.cast(image, tl.int64) * tokens + token) * SHAPE.grad_strides[0]
    place = place[:, None] + channel[None, :]
    tl.store(k_pointer + place, grad_k.to(k_pointer.dtype.element_ty), mask=mask)
    tl.store(v_pointer + place, grad_v.to(v_pointer.dtype.element_ty), mask=mask)

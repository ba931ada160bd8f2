"""Rules of LSTM, GRU and RNN layers and cells: written out, step by step, in functions that have rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from .value import TaylorError, function_name, register_rule

# One step: the gates' shares [B, gates * hidden] of the input and of the state, and the state (h,) or (h, c) before.
Step = Callable[[Any, Any, tuple[Any, ...]], tuple[Any, ...]]


def _lstm_step(from_input: Any, from_state: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    enter, forget, candidate, leave = (from_input + from_state).chunk(4, -1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * candidate.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru_step(from_input: Any, from_state: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
    (reset, update, new), (reset_state, update_state, new_state) = from_input.chunk(3, -1), from_state.chunk(3, -1)
    update = (update + update_state).sigmoid()
    candidate = (new + (reset + reset_state).sigmoid() * new_state).tanh()
    return (candidate + update * (state[0] - candidate),)


STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": lambda from_input, from_state, state: ((from_input + from_state).tanh(),),
    "rnn_relu": lambda from_input, from_state, state: ((from_input + from_state).relu(),),
}


def _advance(step: Step, x: Any, state: tuple[Any, ...], weights: list[Any], biases: list[Any]) -> tuple[Any, ...]:
    from_input = F.linear(x, weights[0], biases[0])
    h, *rest = step(from_input, F.linear(state[0], weights[1], biases[1]), state)
    return (h if len(weights) < 3 else F.linear(h, weights[2]), *rest)  # an LSTM with a projection of its output


@register_rule(*STEPS)
def recurrent_layers(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """x [L, B, F] (or [B, L, F]) -> outputs [L, B, directions * hidden], last states [layers * directions, B, *]."""
    name = function_name(func)
    if len(args) != 9 or not isinstance(args[3], bool):
        raise TaylorError(f"no Taylor rule for {name} of a PackedSequence; pass the padded sequences")
    x, states, flat, has_biases, layers, dropout, training, bidirectional, batch_first = args
    if training and dropout > 0.0 and layers > 1:
        raise TaylorError(f"{name} with dropout has no derivative to propagate; call model.eval() first")
    x = x.transpose(0, 1) if batch_first else x  # [L, B, F]
    states = tuple(states) if name == "lstm" else (states,)
    directions = 2 if bidirectional else 1
    parts = iter(_split(flat, layers * directions, has_biases))
    last = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            weights, biases = next(parts)
            state = tuple(s[layer * directions + direction] for s in states)
            steps = []
            for at in x.flip(0) if direction else x:
                state = _advance(STEPS[name], at, state, weights, biases)
                steps.append(state[0])
            outputs.append(torch.stack(steps[::-1] if direction else steps))
            last.append(state)
        x = torch.cat(outputs, -1)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(kind) for kind in zip(*last, strict=True)))


def _split(flat: list[Any], count: int, has_biases: bool) -> Iterator[tuple[list[Any], list[Any]]]:
    """torch's flat list, layer by layer: w_ih, w_hh, then b_ih, b_hh, then an LSTM's projection w_hr."""
    size = len(flat) // count
    for i in range(count):
        part = list(flat[i * size : (i + 1) * size])
        biases = part[2:4] if has_biases else [None, None]
        yield part[:2] + part[4 if has_biases else 2 :], biases


@register_rule(*(f"{name}_cell" for name in STEPS))
def recurrent_cell(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x [B, F] and the state [B, hidden] (h, and c for LSTM) -> the next state."""
    name = function_name(func).removesuffix("_cell")
    x, state, *parameters = args
    weights, biases = parameters[:2], (parameters[2:] or [None, None])
    after = _advance(STEPS[name], x, tuple(state) if name == "lstm" else (state,), weights, biases)
    return after if name == "lstm" else after[0]

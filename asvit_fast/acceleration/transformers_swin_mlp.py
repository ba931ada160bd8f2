"""Replacement for the feed-forward network of Swin in Hugging Face's transformers, a module since version 5."""

from __future__ import annotations

from transformers.models.swin.modeling_swin import SwinMLP

from .chunked_mlp import ChunkedMlp


class FastSwinMLP(ChunkedMlp, SwinMLP):
    """Its feed-forward network."""

    order = ("fc1", "activation_fn", "fc2")

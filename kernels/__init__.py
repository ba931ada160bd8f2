"""Triton kernels, installed as `asvit_fast.kernels`: they import torch and triton only, and are loaded when needed."""

"""Triton kernels, installed as `asvit_fast.kernels`. They import torch and triton only, and are imported when first needed."""

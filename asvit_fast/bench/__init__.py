"""Timing the kernels of ops on the shapes of real networks, and refining their tiles."""

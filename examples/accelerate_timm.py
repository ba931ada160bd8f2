# %% [markdown]
# # Accelerate a training of a timm network
#
# A Swin that learns scikit-learn's digits in a plain PyTorch loop, with one line more than before.

# %%
import time

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import asvit_fast as af

SIDE, BATCH, UPDATES = 64, 16, 8
torch.manual_seed(0)
digits = load_digits()
images = nn.functional.interpolate(torch.from_numpy(digits.images).float()[:, None] / 16, size=(SIDE, SIDE))
images = images.expand(-1, 3, -1, -1)  # [1797, 3, SIDE, SIDE]
labels = torch.from_numpy(digits.target)  # [1797]

# %%
model = timm.create_model(
    "swin_tiny_patch4_window7_224", img_size=SIDE, window_size=4, num_classes=10, embed_dim=32, depths=(1, 1, 2, 1)
)

# %% [markdown]
# The line. Weights, `state_dict`, optimizer and everything else stay as they were.

# %%
print(af.accelerate(model))

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def update(batch: Tensor) -> float:
    """Train on the images of these numbers [B], and return the loss."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    loss.backward()
    optimizer.step()
    return loss.item()


for number in range(UPDATES):
    started = time.perf_counter()
    loss = update(torch.randint(len(labels), (BATCH,)))
    print(f"update {number}: loss {loss:.3f}, {1e3 * (time.perf_counter() - started):.0f} ms")

# %% [markdown]
# Is it still right? Outputs and gradients against the original, both held against float64:

# %%
verification = af.verify(model, images[:2], modes="train")
assert verification.ok

# %% [markdown]
# What you save is timm's:

# %%
af.restore(model)
weights = model.state_dict()
print(type(model.layers[0].blocks[0]).__module__, len(weights))

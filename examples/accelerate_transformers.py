# %% [markdown]
# # Accelerate a network of Hugging Face's transformers
#
# `pip install transformers`. Nothing is downloaded here; `from_pretrained(NAME)` brings trained weights.

# %%
import torch
from transformers import SwinConfig, SwinForImageClassification

import asvit_fast as af

torch.manual_seed(0)
config = SwinConfig(
    image_size=128,
    patch_size=4,
    embed_dim=32,
    depths=[1, 1, 2, 1],
    num_heads=[1, 2, 4, 8],
    window_size=4,
    num_labels=10,
)
model = SwinForImageClassification(config).eval()
images = torch.randn(4, 3, 128, 128)  # [B, 3, H, W]
with torch.no_grad():
    before = model(pixel_values=images).logits  # [B, 10]

# %%
report = af.accelerate(model)
print(report)

# %%
with torch.no_grad():
    after = model(pixel_values=images).logits  # [B, 10]
print(f"largest difference {(after - before).abs().max():.1e}")
assert torch.allclose(after, before, atol=1e-5)

# %% [markdown]
# Training works as before, with transformers' `Trainer` and in your own loop:

# %%
model.train()
loss = model(pixel_values=images, labels=torch.tensor([0, 1, 2, 3])).loss
loss.backward()
print(f"loss {loss.item():.3f}, gradients for {sum(p.grad is not None for p in model.parameters())} parameters")

# %% [markdown]
# `save_pretrained` writes what transformers reads, restored or not: names and values of the weights are the same.

# %%
names = set(model.state_dict())
af.restore(model)
assert names == set(model.state_dict())

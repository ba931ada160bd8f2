# %% [markdown]
# # Coarse tokens first, in a loop of one's own
#
# The same ViT of timm is trained on scikit-learn's digits with all tokens, and with 4 times fewer per side at first.

# %%
import time

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn

import asvit_fast as af

SIDE, BATCH, EPOCHS = 64, 64, 5
digits = load_digits()
images = nn.functional.interpolate(torch.from_numpy(digits.images).float()[:, None] / 16, size=(SIDE, SIDE))
images = images.expand(-1, 3, -1, -1)[:512]  # [512, 3, SIDE, SIDE]
labels = torch.from_numpy(digits.target)[:512]  # [512]


# %%
def train(schedule: str) -> tuple[float, float]:
    """Train for all epochs; returns seconds, and the accuracy on the training images in percent."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIDE, patch_size=4, num_classes=10, embed_dim=48, depth=2, num_heads=3
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    retokenizer = af.Retokenizer(model, schedule)
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        if retokenizer.step(epoch):
            print(f"  epoch {epoch}: {retokenizer.reduction} times fewer tokens per side")
        for batch in torch.randperm(len(images)).split(BATCH):  # [B]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    with torch.no_grad():
        right = (model.eval()(images[:256]).argmax(1) == labels[:256]).float().mean().item()
    return seconds, 100 * right


# %%
for name, schedule in (("all tokens", "5:1"), ("coarse first", "3:4,1:2,1:1")):
    print(name)
    seconds, right = train(schedule)
    print(f"  {seconds:.1f} s, {right:.0f} % right")

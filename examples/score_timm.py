# %% [markdown]
# # Score networks of timm, and plot them
#
# Nothing is trained and nothing is downloaded. Name the networks you consider, and a folder of your images.

# %%
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import timm

import asvit_fast as af

NAMES = ["test_vit", "test_vit2", "test_vit3"]  # or timm.list_models("*tiny*224")
SETTINGS = {"metrics": ("length_distortion", "ntk_condition"), "img_size": 160, "repeats": 2, "batch": 4}

# %%
rows = []
for name in NAMES:
    scores = af.score(name, images=None, **SETTINGS)  # images="photos/" for the NTK of your images
    params = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    rows.append((name, params, scores["length_distortion"], scores["ntk_condition"]))
    print(f"{name:20} {params / 1e6:6.2f} M  length {rows[-1][2].mean:.4g}  condition {rows[-1][3].mean:.4g}")

# %%
figure, axes = plt.subplots(figsize=(6, 4))
for name, params, length, condition in rows:
    axes.errorbar(length.mean, condition.mean, xerr=length.std, yerr=condition.std, fmt="none", ecolor="grey")
    axes.scatter(length.mean, condition.mean, s=40 + 30 * params / 1e6, label=name)
axes.set(xlabel="length distortion (larger is better)", ylabel="NTK condition number (smaller is better)", yscale="log")
axes.legend()
figure.savefig("timm_scores.png", dpi=150, bbox_inches="tight")

# %% [markdown]
# The scores order networks of one kind, at one image size. They do not predict accuracy: train the candidates.

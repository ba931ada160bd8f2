# %% [markdown]
# # Search and scale for a latency budget
#
# Budgets of parameters and multiply-adds are built in. A latency on *your* machine is a scorer of your own: a topology
# that is too slow gets scores that nobody chooses.

# %%
import torch

import asvit_fast as af
from asvit_fast.cost import measure_latency

SIDE, STEPS, LIMIT = 32, 6, 20.0  # pixels, topologies, milliseconds for one image
torch.manual_seed(0)
images = torch.randn(8, 3, SIDE, SIDE)  # [B, 3, H, W]; yours: a folder


def latency(topology: af.Topology) -> float:
    """Milliseconds of one image."""
    return measure_latency(af.create_model(topology, img_size=SIDE), SIDE, batch=1, runs=5)[0]


def scorer(topology: af.Topology) -> dict[str, float]:
    """The usual scores of what is fast enough, and the worst ones of what is not."""
    if latency(topology) > LIMIT:
        return {"length_distortion": 1e-9, "ntk_condition": 1e9}
    scores = af.score(
        topology, ("length_distortion", "ntk_condition"), img_size=SIDE, repeats=1, batch=len(images), images=images
    )
    return {name: scores[name].mean for name in scores}


# %%
found = af.search(steps=STEPS, img_size=SIDE, scorer=scorer, progress=False)
best = found.best_sampled
assert best is not None
print(f"best of {STEPS}: {best}, {latency(best.topology):.1f} ms, {best.params / 1e6:.2f} M parameters")

# %% [markdown]
# Grow it as long as it stays within the limit: every step is a network that you can take.

# %%
steps = af.scale(best.topology, max_steps=2, img_size=SIDE, scorer=scorer, progress=False)
for step in steps:
    print(f"step {step.step}: {step.topology}, {latency(step.topology):.1f} ms")
fitting = [step.topology for step in steps if latency(step.topology) <= LIMIT]
model = af.create_model(fitting[-1] if fitting else best.topology, img_size=SIDE, num_classes=10)
print(f"take {model.topology}")

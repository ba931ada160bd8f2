# %% [markdown]
# # A network that solves the heat equation
#
# u_t = u_xx on the unit interval from u(0, x) = sin(pi x), whose solution is exp(-pi^2 t) sin(pi x). The derivatives of
# the network come from `af.jvp` and `af.jet`: one pass each, and no graph of a graph.

# %%
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import asvit_fast as af

POINTS, STEPS, LAST = 128, 1500, 0.2  # of a step, steps of Adam, seconds of the equation
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)).double()
along_t, along_x = torch.eye(2, dtype=torch.float64)  # [2] each


# %%
def residual(points: Tensor) -> Tensor:
    """u_t - u_xx at points [n, (t, x)], [n, 1]."""
    _, u_t = af.jvp(network, points, along_t.expand_as(points))
    _, _, u_xx = af.jet(network, points, along_x.expand_as(points), torch.zeros_like(points))
    return u_t - u_xx


def loss_of(points: Tensor) -> Tensor:
    """The equation inside, the sine at the start, zero at both ends."""
    start = points * along_x  # [n, 2], t = 0
    left, right = points * along_t, points * along_t + along_x  # [n, 2], x = 0 and x = 1
    begins = network(start) - torch.sin(math.pi * start[:, 1:])
    ends = torch.cat([network(left), network(right)])
    return residual(points).square().mean() + 20 * (begins.square().mean() + ends.square().mean())


# %%
optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for step in range(STEPS):
    points = torch.rand(POINTS, 2, dtype=torch.float64) * torch.tensor([LAST, 1.0])  # [POINTS, (t, x)]
    optimizer.zero_grad()
    loss = loss_of(points)
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 300 == 0:
        print(f"step {step}: loss {loss.item():.4f}")

# %%
x = torch.linspace(0, 1, 101, dtype=torch.float64)  # [101]
figure, axes = plt.subplots(figsize=(5, 3.2))
worst = 0.0
for t, color in ((0.0, "#3f51b5"), (0.05, "#2e7d32"), (0.2, "#ef6c00")):
    with torch.no_grad():
        u = network(torch.stack([torch.full_like(x, t), x], 1))[:, 0]  # [101]
    exact = math.exp(-(math.pi**2) * t) * torch.sin(math.pi * x)  # [101]
    worst = max(worst, (u - exact).abs().max().item())
    axes.plot(x, exact, color="lightgrey", linewidth=4)
    axes.plot(x, u, color=color, label=f"t = {t}")
axes.set(xlabel="x", ylabel="u")
axes.legend()
figure.savefig("heat_equation.png", dpi=120, bbox_inches="tight")
print(f"largest error {worst:.3f}")

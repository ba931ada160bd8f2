import random

import pytest
import timm
import torch
from torch import nn

from asvit_fast.cost import count_macs, measure_latency, measure_memory, params, topology_cost
from asvit_fast.errors import InputError
from asvit_fast.models import create_model
from asvit_fast.topology import SearchSpace, Topology

SEED = "8,2,3|4,1,2|4,1,4|4,1,6|32"
# topology, parameters without and with the position embedding, multiply-adds in G (specification of the paper's models)
MODELS = [
    (f"{SEED},32", 2_319_624, 2_419_976, 0.491),
    ("8,2,3,3|4,1,2,1|4,1,4,4|4,1,6,2|32,88", 28_775_328, 29_051_296, 5.132),
    ("8,2,3,3|4,1,2,1|4,1,4,5|4,1,6,2|32,116", 52_258_652, 52_622_428, 8.754),
    ("8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180", 87_580_820, 88_145_300, 22.358),
]


@pytest.mark.parametrize(("text", "bare", "embedded", "gmacs"), MODELS)
def test_published_models(text: str, bare: int, embedded: int, gmacs: float) -> None:
    topology = Topology.parse(text)
    assert topology_cost(topology).params == bare
    assert topology_cost(topology, pos_embed="absolute").params == embedded
    assert topology_cost(topology).flops == pytest.approx(gmacs * 1e9, rel=1e-3)


def random_topology(generator: random.Random) -> Topology:
    space = SearchSpace()
    action = [generator.randrange(len(choices)) for choices in space.dimensions.values()]
    topology = space.topology(action, width=generator.choice([8, 13, 22, 32, 150, 200]))
    return topology.replace(depths=[generator.randint(1, 3) for _ in range(4)])


@pytest.mark.parametrize("trial", range(16))
def test_closed_form_equals_the_counted_model(trial: int) -> None:
    generator = random.Random(trial)
    topology = random_topology(generator)
    img_size = generator.choice([224, 32, 100, 56, (96, 160), (70, 45), 37])
    classes = generator.choice([0, 10, 1000])
    pos_embed = generator.choice(["none", "absolute"])
    model = create_model(topology, img_size, classes, pos_embed, device="meta")
    cost = topology_cost(topology, img_size, classes, pos_embed)
    assert (cost.params, cost.flops) == (params(model), count_macs(model, img_size))


def test_flops_of_any_model_and_state_left_alone() -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    counted = count_macs(model)
    tokens, dim, head = 197, 192, 192 * 1000
    block = tokens * 12 * dim * dim + 2 * tokens * tokens * dim
    assert counted == 196 * 3 * 256 * dim + 12 * block + head
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_padding_of_windows_is_not_counted() -> None:
    # 10 tokens per side in 4 windows of 3: the last window holds a single row and column.
    topology = Topology.parse("4,4,2|2,1,2|2,1,2|2,1,2|16,32")
    pairs = 3 * 9 + 1
    linear = 100 * (4 * 32 * 32 + 2 * 32 * 64)
    rest = topology_cost(topology.replace(depths=(1, 1, 1, 1)), img_size=40).flops
    twice = topology_cost(topology.replace(depths=(2, 1, 1, 1)), img_size=40).flops
    assert twice - rest == linear + 2 * 32 * pairs**2


def test_measurements_are_real() -> None:
    small = create_model(SEED, img_size=32, num_classes=0)
    large = create_model(SEED + ",128", img_size=96, num_classes=0)
    (fast, spread), (slow, _) = measure_latency(small, 32, runs=5), measure_latency(large, 96, batch=4, runs=5)
    assert min(fast, slow) > 0  # which is faster on a loaded machine, nobody knows
    assert spread >= 0
    one, four = measure_memory(small, 32, batch=1, device="cpu"), measure_memory(small, 32, batch=4, device="cpu")
    assert 0 < one < four


@pytest.mark.parametrize("size", [16, (64,), "224", (64, 64, 3), 64.0])
def test_bad_sizes(size: object) -> None:
    with pytest.raises(InputError, match="img_size"):
        topology_cost(Topology.parse(SEED), img_size=size)


class KeepsConstant(nn.Module):
    """A network that moves a constant to its input's device and remembers it, as SwinIR does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.mean = torch.ones(1, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = self.mean.type_as(x)
        self.seen = x
        return self.linear((x - self.mean).mean((2, 3)))


def test_counting_leaves_attributes() -> None:
    model = KeepsConstant()
    assert count_macs(model, 32) == 12
    assert model.mean.device.type == "cpu"
    assert not hasattr(model, "seen")
    assert model(torch.ones(2, 3, 4, 4)).isfinite().all()

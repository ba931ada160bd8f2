"""The topology's text form, its derived sizes, and Table 1's space."""

from __future__ import annotations

import math

import pytest
import timm
import torch

import asvit_fast as af

LARGE = "8,2,3,5|4,1,2,2|4,1,4,5|4,1,6,2|32,180"


@pytest.mark.filterwarnings("ignore:topology .*all depths are 1")
@pytest.mark.parametrize(
    ("text", "long"),
    [
        (LARGE, LARGE),
        ("8,2,3|4,1,2|4,1,4|4,1,6|32", "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32"),
        ("8,2,3|4,1,2|4,1,4|4,1,6|32,88", "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,88"),
        ("8,2,3,5|4,1,2|4,1,4,5|4,1,6,2|32", "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32"),  # one depth missing: all are 1
        (" 8,2,3 | 4,1,2|4,1,4|4,1,6|32 ", "8,2,3,1|4,1,2,1|4,1,4,1|4,1,6,1|32,32"),
    ],
)
def test_parse_and_print(text: str, long: str) -> None:
    topology = af.Topology.parse(text)
    assert str(topology) == long
    assert af.Topology.parse(str(topology)) == topology
    assert af.Topology.parse(topology) is topology


def test_sizes() -> None:
    large = af.Topology.parse(LARGE)
    assert large.dims == (180, 360, 720, 1024)  # the cap
    assert large.stage_heads == (4, 8, 16, 32)
    assert large.depths == (5, 2, 5, 2)
    assert large.features == 1024
    assert large.seed_string == "8,2,3|4,1,2|4,1,4|4,1,6|32"
    assert large.stages[0] == af.StageSpec(kernel=8, splits=2, expansion=3, depth=5)
    grown = large.replace(depths=(6, 2, 5, 2), width=200)
    assert (grown.depths, grown.width, grown.heads) == ((6, 2, 5, 2), 200, 32)
    assert len({large, grown, af.Topology.parse(LARGE)}) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8,2,3|4,1,2|4,1,4|32", "4 instead of 5 groups"),
        ("8,2|4,1,2|4,1,4|4,1,6|32", "stage 1 has 2 numbers"),
        ("8,2,3|4,1,2|4,1,4|4,1,6|32,1,2", "the last group has 3 numbers"),
        ("8,2,x|4,1,2|4,1,4|4,1,6|32", "group 1 ('8,2,x') must hold integers only"),
        ("8,2,3|4,0,2|4,1,4|4,1,6|32", "stage 2: splits must be an integer from 1 to 256, got 0"),
        ("3,2,3|4,1,2|4,1,4|4,1,6|32", "stage 1: kernel must be an integer from 4 to 64"),
        ("8,2,3|4,1,2|1,1,4|4,1,6|32", "stage 3: kernel must be an integer from 2 to 64"),
        ("8,2,3|4,1,2|4,1,4|4,1,600|32", "stage 4: expansion must be an integer from 1 to 64, got 600"),
        ("8,2,3|4,1,2|4,1,4|4,1,6|30", "heads must be a multiple of 8"),
        ("8,2,3|4,1,2|4,1,4|4,1,6|64,4", "8 heads need at least 8 channels, got 4"),
        ("", "1 instead of 5 groups"),
        (None, "expected a string, got NoneType"),
    ],
)
def test_errors_name_field_value_and_range(text: str, says: str) -> None:
    with pytest.raises(af.InputError) as error:
        af.Topology.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_table_1() -> None:
    space = af.SearchSpace()
    assert space.size == 4_556_250
    assert space.entropy == pytest.approx(15.332010474739105, rel=1e-12)
    assert list(space.dimensions) == ["K1", "K2", "K3", "K4", "S1", "S2", "S3", "E1", "E2", "E3", "E4", "heads"]
    assert space.topology([4, 2, 2, 2, 0, 0, 0, 1, 0, 2, 4, 1]) == af.Topology.parse("8,2,3|4,1,2|4,1,4|4,1,6|32")
    generator = torch.Generator().manual_seed(3)
    drawn = [space.sample(generator) for _ in range(50)]
    assert all(topology in space for topology in drawn)
    assert len(set(drawn)) > 45
    assert space.sample(torch.Generator().manual_seed(3)) == drawn[0]
    assert af.Topology.parse("9,2,3|4,1,2|4,1,4|4,1,6|32") not in space
    assert af.Topology.parse("8,2,3|4,1,2|4,1,4|4,2,6|32") not in space  # the final stage is never split
    assert "8,2,3|4,1,2|4,1,4|4,1,6|32" not in space


def test_narrow_and_enumerate() -> None:
    space = af.SearchSpace().narrow(
        K1=(8,),
        K2=(4,),
        K3=(4,),
        K4=(4,),
        S1=(2, 4),
        S2=(1,),
        S3=(1,),
        E1=(3,),
        E2=(2,),
        E3=(4,),
        E4=(6,),
        heads=[16, 32],
    )
    assert space.size == 4
    assert space.entropy == pytest.approx(math.log(4))
    assert [t.seed_string for t in space.enumerate(width=16)] == [
        "8,2,3|4,1,2|4,1,4|4,1,6|16",
        "8,2,3|4,1,2|4,1,4|4,1,6|32",
        "8,4,3|4,1,2|4,1,4|4,1,6|16",
        "8,4,3|4,1,2|4,1,4|4,1,6|32",
    ]
    with pytest.raises(af.InputError, match="unknown dimension K5"):
        af.SearchSpace().narrow(K5=(1,))
    with pytest.raises(af.InputError, match="K1 needs one or more different choices"):
        af.SearchSpace().narrow(K1=())
    with pytest.raises(af.InputError, match="kernel must be an integer"):
        af.SearchSpace().narrow(K1=(2, 4))
    with pytest.raises(af.InputError, match="index of K1 must be from 0 to 4, got 5"):
        af.SearchSpace().topology([5, *[0] * 11])


@pytest.mark.parametrize("name", ["asvit_seed", "asvit_small", "asvit_base", "asvit_large.untrained"])
def test_names_of_table_4_are_topologies(name: str) -> None:
    topology = af.Topology.parse(name)
    model = timm.create_model(name, img_size=64, num_classes=3)
    assert str(model.topology) == str(topology)
    same = af.create_model(name, img_size=64, num_classes=3, pos_embed="absolute")
    assert {n: p.shape for n, p in same.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(af.InputError, match=r"'asvit_huge'.*one of asvit_seed, asvit_small, asvit_base, asvit_large"):
        af.Topology.parse("asvit_huge")


def test_depths_of_some_stages_only() -> None:
    with pytest.warns(UserWarning, match="all depths are 1, as stage 3 has none"):
        assert af.Topology.parse("4,2,2,2|2,1,2,2|3,1,2|2,1,2|8").depths == (1, 1, 1, 1)

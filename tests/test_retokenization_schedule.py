"""Schedules of token reductions: their text, their epochs, and what they save."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch

import asvit_fast as af
from asvit_fast.cost import count_macs
from asvit_fast.training import Phase, schedule_cost, token_reduction
from asvit_fast.training.schedule import TABLE_6

Schedule = af.RetokenizationSchedule
TINY = "4,2,2,1|2,1,2,1|3,1,2,1|2,1,2,1|8,8"
TEXTS = ["40:4,30:2,230:1", "0.4:4,0.3:2,0.3:1", "1", "4", "3:1", "1:2,2:1", "1e-05:4,0.99999:1", *TABLE_6]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(text: str) -> None:
    schedule = Schedule.parse(text)
    assert str(schedule) == text
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse(schedule) is schedule


def test_parse() -> None:
    schedule = Schedule.parse(" 40:4, 30 : 2,230:1 ")
    assert schedule.phases == (Phase(40, 4), Phase(30, 2), Phase(230, 1))
    assert (schedule.epochs, schedule.starts, schedule.reductions) == (300, (0, 40, 70), (4, 2, 1))
    assert Schedule.parse("10:4,5:1,5:4").reductions == (4, 1)
    assert Schedule.parse("1").phases == (Phase(1.0, 1),) and Schedule.parse("1").epochs is None
    assert Schedule.parse("0.5:2,0.5:1").epochs is None


def test_the_paper_schedules() -> None:
    """Table 6: boundaries after epochs 40, 70; 80, 140; 120, 210."""
    assert [Schedule.parse(name).starts for name in TABLE_6] == [(0, 40, 70), (0, 80, 140), (0, 120, 210)]
    assert {Schedule.parse(name).epochs for name in TABLE_6} == {300}


def test_reduction_at() -> None:
    schedule = Schedule.parse("2:4,1:2,3:1")
    assert [schedule.reduction_at(epoch) for epoch in range(8)] == [4, 4, 2, 1, 1, 1, 1, 1]
    assert [Schedule.parse("table6-40").reduction_at(epoch) for epoch in (0, 39, 40, 69, 70, 299, 999)] == [
        *(4, 4, 2, 2, 1, 1, 1)
    ]
    assert Schedule.parse("1").reduction_at(7) == 1
    assert Schedule.parse("1:1,2:4").reduction_at(9) == 4  # the last one stays, whatever it is
    with pytest.raises(af.InputError, match="epochs count from 0, got -1"):
        schedule.reduction_at(-1)
    with pytest.raises(af.InputError, match="fractions of the training: say for how many epochs"):
        Schedule.parse("0.5:2,0.5:1").reduction_at(0)


@pytest.mark.parametrize(
    ("text", "epochs", "expected"),
    [
        ("table6-40", 300, "40:4,30:2,230:1"),
        ("table6-40", 30, "4:4,3:2,23:1"),
        ("table6-120", 5, "2:4,2:2,1:1"),  # boundaries 2, 3.5 (up)
        ("table6-80", 600, "160:4,120:2,320:1"),
        ("0.4:4,0.3:2,0.3:1", 10, "4:4,3:2,3:1"),
        ("0.4:4,0.3:2,0.3:1", 7, "3:4,2:2,2:1"),  # boundaries 2.8, 4.9
        ("0.1:4,0.2:2,0.7:1", 5, "1:4,1:2,3:1"),  # boundaries 0.5 and 1.5 go up, with 0.1 + 0.2 > 0.3
        ("1", 12, "12:1"),
        ("2:4,1:2,3:1", 6, "2:4,1:2,3:1"),
        ("2:4,1:2,3:1", 100, "2:4,1:2,97:1"),
    ],
)
def test_for_epochs(text: str, epochs: int, expected: str) -> None:
    schedule = Schedule.parse(text).for_epochs(epochs)
    assert str(schedule) == expected
    assert schedule.epochs == epochs


@pytest.mark.parametrize("epochs", range(1, 40))
@pytest.mark.parametrize("text", ["table6-40", "table6-120", "0.3334:4,0.3333:2,0.3333:1"])
def test_for_epochs_covers_the_training(text: str, epochs: int) -> None:
    """Every boundary within half an epoch of where it belongs, or a message."""
    parsed = Schedule.parse(text)
    if epochs < (7 if text == "table6-40" else 3):
        with pytest.raises(af.InputError, match="leaves no epoch for its phase"):
            parsed.for_epochs(epochs)
        return
    schedule = parsed.for_epochs(epochs)
    assert schedule.epochs == epochs
    total = sum(phase.length for phase in parsed.phases)
    wanted = [sum(p.length for p in parsed.phases[:i]) / total * epochs for i in range(3)]
    assert all(abs(start - want) <= 0.5 + 1e-6 for start, want in zip(schedule.starts, wanted, strict=True))


def test_for_epochs_refuses() -> None:
    with pytest.raises(
        af.InputError, match="schedule '40:4,30:2,230:1' is 300 epochs long but the training has 100: shorten"
    ):
        Schedule.parse("40:4,30:2,230:1").for_epochs(100)
    with pytest.raises(af.InputError, match="'table6-40' leaves no epoch for its phase 40:4 in a training of 3"):
        Schedule.parse("table6-40").for_epochs(3)
    for wrong in (0, -1, True, 2.0):
        with pytest.raises(af.InputError, match="a training has 1 or more whole epochs, got"):
            Schedule.parse("1").for_epochs(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("", "'' is not epochs:reduction"),
        ("40", "'40' is not epochs:reduction"),
        ("40:4,", "'' is not epochs:reduction"),
        ("40:4;30:2", "'40:4;30:2' is not epochs:reduction"),
        ("40:3", "token reduction must be 1, 2 or 4 per side, got 3"),
        ("40:8,2:1", "token reduction must be 1, 2 or 4 per side, got 8"),
        ("40:x", "'40:x' is not epochs:reduction"),
        ("x:4", "'x' is not a number"),
        ("0:4,3:1", "whole epochs, or a fraction of the training above 0 and at most 1; got 0"),
        ("-3:4", "got -3.0"),
        ("1.5:4", "got 1.5"),
        ("nan:4", "got nan"),
        ("0.5:4,3:1", "mixes epochs with fractions"),
        ("0.5:4,0.4:1", "the fractions of schedule '0.5:4,0.4:1' sum to 0.9, they must sum to 1"),
        ("table6-50", "'table6-50' is not epochs:reduction"),
    ],
)
def test_mistakes_show_the_expected_form(text: str, mistake: str) -> None:
    with pytest.raises(af.InputError) as caught:
        Schedule.parse(text)
    message = str(caught.value)
    assert message.startswith(f"schedule {text!r}: ") and mistake in message
    assert "'40:4,30:2,230:1'" in message and "table6-40" in message and "\n" not in message


def test_mistakes_without_text() -> None:
    with pytest.raises(af.InputError, match="schedule must be a text, got 4; expected epochs:reduction"):
        Schedule.parse(4)  # type: ignore[arg-type]
    with pytest.raises(af.InputError, match="a schedule needs a phase"):
        Schedule(())
    with pytest.raises(af.InputError, match="per side, got True"):
        Phase(3, True)


def test_needs_no_torch() -> None:
    program = (
        "import sys, types; package = types.ModuleType('asvit_fast'); package.__path__ = sys.argv[1:2]\n"
        "training = types.ModuleType('asvit_fast.training'); training.__path__ = [sys.argv[1] + '/training']\n"
        "sys.modules.update({'asvit_fast': package, 'asvit_fast.training': training, 'torch': None})\n"
        "from asvit_fast.training.schedule import RetokenizationSchedule\n"
        "print(RetokenizationSchedule.parse('table6-40').for_epochs(30))"
    )
    command = [sys.executable, "-c", program, str(af.__path__[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4:4,3:2,23:1", done.stderr


# --------------------------------------------------------------------------- saving


def test_savings_of_the_paper_schedules() -> None:
    """Ours for Large at 224; SPEC: 20.5, 41.0, 61.4 % (the paper prints 18.7, 37.4, 56.2)."""
    model = timm.create_model("asvit_large", device=torch.device("meta"), weight_init="skip")
    costs = [schedule_cost(model, name) for name in TABLE_6]
    assert [round(100 * cost.saving, 1) for cost in costs] == [20.5, 41.0, 61.4]
    assert [round(costs[0].macs[reduction] / 1e9, 3) for reduction in (1, 2, 4)] == [22.358, 4.712, 1.247]


def test_schedule_cost() -> None:
    model = af.create_model(TINY, img_size=64, num_classes=5)
    model.set_token_reduction(2)
    cost = schedule_cost(model, "2:4,1:2,1:1", img_size=(52, 64))
    assert token_reduction(model) == 2
    assert cost.macs[2] == count_macs(model, (52, 64))
    assert cost.phase_savings == (1 - cost.macs[4] / cost.macs[1], 1 - cost.macs[2] / cost.macs[1], 0.0)
    trained = 2 * cost.macs[4] + cost.macs[2] + cost.macs[1]
    assert cost.saving == pytest.approx(1 - trained / (4 * cost.macs[1]))
    assert schedule_cost(model, "0.5:4,0.25:2,0.25:1", (52, 64)).saving == pytest.approx(cost.saving)
    assert schedule_cost(model, "1", 64).saving == 0 and token_reduction(model) == 2
    rows = [line.split() for line in cost.table().splitlines()]
    assert [row[0] for row in rows] == ["epochs", "0-1", "2-2", "3-3", "all"]
    assert rows[1][-1] == f"{cost.phase_savings[0]:.1%}" and rows[-1][-1] == f"{cost.saving:.1%}"


def test_schedule_cost_of_any_model_with_full_tokens() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    assert schedule_cost(model, "3:1", 64).macs == {1: count_macs(model, 64)}
    with pytest.raises(af.InputError, match="the tokens of ResNet cannot be reduced"):
        schedule_cost(model, "1:2,3:1", 64)

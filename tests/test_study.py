"""af.study: sampling, measuring, training, keeping what is done."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from training_images import write_images

import asvit_fast as af
from asvit_fast.cost import topology_cost
from asvit_fast.recipe import Recipe
from asvit_fast.scoring.draws import stream
from asvit_fast.settings import ScoreSettings
from asvit_fast.studies import trainings
from asvit_fast.studies.external import read_accuracies, read_topologies
from asvit_fast.studies.measures import NAMES, measure, token_counts
from asvit_fast.studies.sample import sample
from asvit_fast.studies.trainings import fingerprint_of

TINY: dict[str, Any] = {
    "topologies": 3, "epochs": 1, "repeats": 2, "repeat_every": 2, "width": 8, "img_size": 32, "score_repeats": 1,
    "thetas": 2, "batch": 2, "device": "cpu", "progress": False,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "no_aug": True, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "reprob": 0.0, "model_ema": False, "workers": 0,
    "batch_size": 4,
}  # fmt: skip


def data(seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Eight images of two classes for training, four for validation."""
    generator = torch.Generator().manual_seed(seed)
    parts = [TensorDataset(torch.randn(n, 3, 32, 32, generator=generator), torch.arange(n) % 2) for n in (8, 4)]
    return parts[0], parts[1]


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if "seconds" not in name}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, af.Study]:
    out = tmp_path_factory.mktemp("study")
    return out, af.study(data(), out=out, **TINY, **RECIPE)


def test_every_topology_has_a_row_with_every_measure(finished: tuple[Path, af.Study]) -> None:
    out, result = finished
    stored = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    assert [without_times(row) for row in stored] == [without_times(row) for row in result.rows]
    assert [len(row["top1"]) for row in stored] == [2, 1, 2]
    for row in stored:
        assert set(row["measures"]) == set(row["seconds"]) == set(NAMES)
        assert all(math.isfinite(value) for value in row["measures"].values())
        cost = topology_cost(af.Topology.parse(row["topology"]), 32, pos_embed="absolute")
        assert (row["measures"]["params"], row["measures"]["flops"]) == (cost.params, cost.flops)
    assert not list((out / "trainings").glob("*"))  # nothing but the record is kept
    content = json.loads((out / "result.json").read_text())
    assert content["kind"] == "study" and set(content["measures"]) >= {*NAMES, "combined_rank", "az_nas"}


def test_a_study_that_was_killed_ends_as_if_it_had_not_been(
    finished: tuple[Path, af.Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = trainings.train, []

    def killed(*arguments: Any, **options: Any) -> Any:
        calls.append(options["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(trainings, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        af.study(data(), out=tmp_path, **TINY, **RECIPE)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1
    result = af.study(data(), out=tmp_path, **TINY, **RECIPE)
    assert [without_times(row) for row in result.rows] == [without_times(row) for row in finished[1].rows]
    assert len(calls) == 6  # three before, the one that was killed and the two left after it


def test_a_study_goes_on_with_more_topologies(finished: tuple[Path, af.Study], tmp_path: Path) -> None:
    af.study(data(), out=tmp_path, **{**TINY, "topologies": 1}, **RECIPE)
    result = af.study(data(), out=tmp_path, **{**TINY, "topologies": 2}, **RECIPE)
    assert [without_times(row) for row in result.rows] == [without_times(row) for row in finished[1].rows[:2]]
    with pytest.raises(af.InputError, match="2 topologies are on record"):
        af.study(data(), out=tmp_path, **{**TINY, "topologies": 1}, **RECIPE)


def test_a_damaged_row_is_named(finished: tuple[Path, af.Study], tmp_path: Path) -> None:
    lines = (finished[0] / "trace.jsonl").read_text().splitlines()
    (tmp_path / "config.json").write_bytes((finished[0] / "config.json").read_bytes())
    row = json.loads(lines[1])
    del row["measures"]["synflow"]
    (tmp_path / "trace.jsonl").write_text("\n".join([lines[0], json.dumps(row), lines[2], ""]))
    with pytest.raises(af.InputError, match="line 2: is not the row of a study"):
        af.study(data(), out=tmp_path, **TINY, **RECIPE)


def test_a_training_that_diverges_is_marked(tmp_path: Path) -> None:
    options = {**TINY, "topologies": 1, "repeats": 1, "epochs": 4}
    result = af.study(data(), out=tmp_path, **options, **RECIPE, lr=1e30)
    assert result.diverged == [result.rows[0]["topology"]]
    assert json.loads((tmp_path / "trace.jsonl").read_text())["top1"] == ["nan"]


def test_data_that_changed_between_runs_are_noticed(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    write_images(folder)
    before = fingerprint_of(folder)
    assert fingerprint_of(str(folder)) == before
    af.study(folder, out=out, **{**TINY, "topologies": 1, "repeats": 1}, **RECIPE)
    image = next((folder / "val").rglob("*.png"))
    content = bytearray(image.read_bytes())
    content[-1] ^= 1  # of the same name and size
    image.write_bytes(content)
    assert fingerprint_of(folder) != before
    with pytest.raises(af.InputError, match="data_fingerprint is"):
        af.study(folder, out=out, **{**TINY, "topologies": 2, "repeats": 1}, **RECIPE)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asvit_fast import run_directory

    append = run_directory.append_jsonl

    def full(path: Path, record: Any) -> None:
        if path == tmp_path / "trace.jsonl" and record["step"] == 1:
            raise af.InputError(f"cannot append to {path}: No space left on device; free space")
        append(path, record)

    monkeypatch.setattr(run_directory, "append_jsonl", full)
    with pytest.raises(af.InputError, match="No space left"):
        af.study(data(), out=tmp_path, **TINY, **RECIPE)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 1
    assert list((tmp_path / "trainings").glob("0001-0/last.pth.tar"))  # the training that is not on record yet


def test_accuracies_of_elsewhere_take_the_place_of_trainings(tmp_path: Path) -> None:
    file = tmp_path / "trained.csv"
    file.write_text(
        'topology,accuracy,note\n"4,2,2|2,1,2|2,1,2|2,1,2|16,8",61.5,a\n'
        '"8,2,3|4,1,2|4,1,4|4,1,6|32,8",63,b\n"4,2,2|2,1,2|2,1,2|2,1,2|16,8",62.5,c\n'
    )
    unused = ("topologies", "epochs", "width", "repeats", "repeat_every")
    options = {name: value for name, value in TINY.items() if name not in unused}
    result = af.study(accuracies=file, out=tmp_path / "out", **options)
    assert [row["top1"] for row in result.rows] == [[61.5, 62.5], [63.0]]
    assert result.kendall_tau["params"].value == pytest.approx(1)
    with pytest.raises(af.InputError, match="got both, give one"):
        af.study(data(), accuracies=file, **options)


def test_candidates_take_the_place_of_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "top.csv"
    file.write_text('place,topology\n1,"4,2,2|2,1,2|2,1,2|2,1,2|16,8"\n2,"4,2,2|2,1,2|2,1,2|2,1,2|16,8"\n')
    options = {name: value for name, value in TINY.items() if name != "topologies"}
    result = af.study(data(), candidates=file, **{**options, "repeats": 1}, **RECIPE)
    assert [row["topology"] for row in result.rows] == ["4,2,2,1|2,1,2,1|2,1,2,1|2,1,2,1|16,8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,accuracy\n", "has no column topology"),
        ("topology,accuracy\n", "has no line"),
        ('topology,accuracy\n"4,2|16",1\n', "line 2: topology '4,2|16'"),
        ('topology,accuracy\n"8,2,3|4,1,2|4,1,4|4,1,6|32",70.5%\n', "plain number such as 70.5, got '70.5%'"),
        (
            "topology,accuracy\n8,2,3|4,1,2|4,1,4|4,1,6|32,70\n",
            "line 2 has more cells than the first line has names; put what has commas in quotes",
        ),
        ("topology;accuracy\n8,2,3|4,1,2|4,1,4|4,1,6|32;70,5\n", "plain number such as 70.5, got '70,5'"),
    ],
)
def test_a_file_of_accuracies_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(af.InputError) as raised:
        read_accuracies(tmp_path / "a.csv", 32)
    assert message in str(raised.value)
    with pytest.raises(af.InputError, match=r"cannot read .*none\.csv: No such file or directory; choose another path"):
        read_accuracies(tmp_path / "none.csv", 32)


def test_accuracies_and_candidates_need_no_file(tmp_path: Path) -> None:
    topology = "8,2,3|4,1,2|4,1,4|4,1,6|32"
    (tmp_path / "a.csv").write_text(f"topology\taccuracy\n{topology}\t61\n{topology}\t\n{topology},48\t7\n")
    found = read_accuracies(tmp_path / "a.csv", 16)
    assert [parsed.width for parsed in found] == [16, 48]
    values = list(found.values())
    assert values[0][0] == 61 and math.isnan(values[0][1]) and values[1] == [7]
    assert read_accuracies({topology: [61, 62.5], f"{topology},48": 7}, 16) == {
        af.Topology.parse(f"{topology},16"): [61.0, 62.5], af.Topology.parse(f"{topology},48"): [7.0]
    }  # fmt: skip
    assert read_topologies([topology, f"{topology},16"], 16) == [af.Topology.parse(topology, 16)]
    same = {topology: np.array([70.0, 71.0]), f"{topology},16": 72}
    assert read_accuracies(same, 16) == {af.Topology.parse(topology, 16): [70.0, 71.0, 72.0]}
    for wrong in ({}, 3, {topology: "good"}):
        with pytest.raises(af.InputError, match="accurac"):
            read_accuracies(wrong, 16)  # type: ignore[arg-type]
    for wrong in ([], 3):
        with pytest.raises(af.InputError, match="candidates must be"):
            read_topologies(wrong, 16)  # type: ignore[arg-type]


def test_options_without_effect_are_said() -> None:
    small = {name: TINY[name] for name in ("img_size", "score_repeats", "thetas", "batch", "device", "progress")}
    trained = {"4,2,2|2,1,2|2,1,2|2,1,2|16,8": 60}
    with pytest.warns(UserWarning, match="no effect beside accuracies, .*: topologies, epochs, lr"):
        af.study(accuracies=trained, topologies=3, epochs=2, lr=0.1, mixup=Recipe.mixup, **small)
    with pytest.raises(af.InputError, match="leave candidates out"):
        af.study(accuracies=trained, candidates=list(trained), **small)
    with pytest.warns(UserWarning, match="no effect beside candidates, .*: sampling"):
        af.study(data(), candidates=list(trained), sampling="uniform", repeats=1, epochs=1, **small, **RECIPE)


def test_lines_are_added_behind_others(tmp_path: Path) -> None:
    """Accuracies and candidates: a longer list goes on, another one is refused."""
    small = {name: TINY[name] for name in ("img_size", "score_repeats", "thetas", "batch", "device", "progress")}
    first, second = "4,2,2|2,1,2|2,1,2|2,1,2|16,8", "4,2,3|2,1,2|2,1,2|2,1,2|16,8"
    af.study(accuracies={first: math.nan}, out=tmp_path / "a", **small)
    result = af.study(accuracies={first: math.nan, second: [2, 3]}, out=tmp_path / "a", **small)
    assert len(result.rows) == 2 and result.rows[1]["top1"] == [2, 3]
    assert af.Study.load(tmp_path / "a").diverged == result.diverged
    for changed in ({first: 1.0, second: [2, 3]}, {second: [2, 3], first: math.nan}):
        with pytest.raises(af.InputError, match="on record"):
            af.study(accuracies=changed, out=tmp_path / "a", **small)
    options = {**small, "epochs": 1, "repeats": 1}
    af.study(data(), candidates=[first], out=tmp_path / "c", **options, **RECIPE)
    assert len(af.study(data(), candidates=[first, second], out=tmp_path / "c", **options, **RECIPE).rows) == 2


def test_the_same_data_by_another_name_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder)
    options = {**TINY, "topologies": 1, "repeats": 1}
    first = af.study(folder, out=tmp_path / "out", **options, **RECIPE)
    second = af.study(f"{folder}/", out=tmp_path / "out", **options, **RECIPE, bad_images="skip")
    folder.rename(tmp_path / "moved")
    third = af.study(tmp_path / "moved", out=tmp_path / "out", **options, **RECIPE)
    assert first.rows == second.rows == third.rows


def test_images_of_one_class_are_refused() -> None:
    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(af.InputError, match="two classes or more"):
        af.study((images, images), **TINY, **RECIPE)
    with pytest.raises(af.InputError, match="space must be a SearchSpace"):
        af.study(data(), space={"K1": [8]}, **TINY, **RECIPE)  # type: ignore[arg-type]


def test_a_study_that_was_refused_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    for wrong, message in (({"batch_size": 64}, "8 training images are fewer"), ({"lr": -1.0}, "lr")):
        with pytest.raises(af.InputError, match=message):
            af.study(data(), out=tmp_path, **TINY, **{**RECIPE, **wrong})
    with pytest.raises(af.InputError, match="must hold images for validation"):
        af.study((data()[0], None), out=tmp_path, **TINY, **RECIPE)
    assert not (tmp_path / "config.json").exists()
    options = {**TINY, "topologies": 1, "repeats": 1}
    (tmp_path / "config.json").write_text('{"kind": "study", "topologies": 7}')  # ended before its first topology
    af.study(data(), out=tmp_path, **options, **RECIPE)
    with pytest.raises(af.InputError, match=r"other options: lr is null there and 0\.1 here; give"):
        af.study(data(), out=tmp_path, **options, **RECIPE, lr=0.1)


def test_samples_are_prefixes_of_each_other_and_spread_over_sizes() -> None:
    space = af.SearchSpace()

    def params(topology: af.Topology) -> int:
        return topology_cost(topology, 64).params

    for sampling in ("uniform", "stratified"):
        few, many = (sample(space, n, 16, sampling, 3, params) for n in (8, 24))
        assert many[:8] == few and len(set(many)) == 24
    sizes = [params(topology) for topology in few]  # stratified: the first eight are of the eight strata
    generator = stream(5)
    borders = sorted(params(space.sample(generator, 16)) for _ in range(4000))[::500]
    assert [sum(size >= border for border in borders) for size in sizes] == pytest.approx(range(1, 9), abs=1)
    tiny = space.narrow(**{name: values[:1] for name, values in space.dimensions.items() if name != "K1"})
    for sampling in ("uniform", "stratified"):
        few, everything = (sample(tiny, n, 16, sampling, 0, params) for n in (3, 87))
        assert everything[:3] == few and set(everything) == set(tiny.enumerate(16))


def test_measures_are_a_pure_function_and_counts_are_right() -> None:
    topology = af.Topology.parse("4,2,2,1|2,1,2,2|2,1,2,1|2,1,2,1|16,8")
    settings = ScoreSettings(img_size=32, thetas=2, repeats=1, batch=2, device=torch.device("cpu"))
    first, second = (measure(topology, settings, None, 7) for _ in range(2))
    values = {name: first[name] for name in NAMES}
    assert values == {name: second[name] for name in NAMES}
    # grids of 8, 4, 2 and 1 tokens a side, in windows of 4, 4, 2 and 1; the second stage has two blocks
    assert token_counts(topology, (32, 32)) == (64 + 2 * 16 + 4 + 1, 4 * 16**2 + 2 * 16**2 + 4**2 + 1)
    assert values["dss"] > 0 and values["az_trainability"] <= 0


def test_synflow_is_invariant_as_its_authors_say() -> None:
    """The sum of weight x gradient over a layer is R for every layer of a positively homogeneous network: of a network
    that is nearly linear, synflow is about (number of layers) x R."""
    from asvit_fast.scoring.draws import draw
    from asvit_fast.studies.saliency import saliency_measures

    topology = af.Topology.parse("4,2,2|2,1,2|2,1,2|2,1,2|16,8")
    model = draw(topology, 0, ScoreSettings(img_size=32, device=torch.device("cpu")), 0)
    before = saliency_measures(model, (3, 32, 32))["synflow"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.patch_embed.proj.weight.neg_()  # signs do not count
    assert saliency_measures(model, (3, 32, 32))["synflow"] == pytest.approx(before, rel=1e-12)
    assert all(torch.equal(value.abs(), weights[name].abs()) for name, value in model.state_dict().items())

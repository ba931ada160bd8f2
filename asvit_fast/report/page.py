"""The page of a report: plain HTML with its style and its pictures inside, so that one file can be sent around."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch

from .._version import __version__
from ..errors import InputError
from ..files import as_float
from ..run_directory import STATE
from ..runs import TRAININGS, Run
from ..topology import SearchSpace, Topology
from .study_tables import measure_table, network_table, study_result_table
from .training_tables import phase_table, training_result_table

TITLES = {
    "search": "Topology search",
    "scale": "Scaling",
    "train": "Training",
    "detect": "Training of a detector",
    "study": "Study",
}
TOP = 10  # rows in the tables of the best

DESIGN_NOTE = (
    "Vision transformers designed without training (As-ViT, arXiv 2202.11921). Scores order untrained networks; only "
    "training can tell accuracies. MACs are multiply-adds of one image."
)

CAPTIONS = {  # by the ends of file names
    "search_progress.png": "Measures of the topology that each step drew and scored, their moving mean with its "
    "standard error, and what random topologies reach: the mean of the baseline (search --baseline random), with one "
    "standard deviation to either side. Below, the entropy of the policy before each step, where there is one.",
    "search_candidates.png": "Each dot is one sampled topology, coloured by its step. "
    "Both scores are means over freshly initialised networks; no network was trained.",
    "scale_trajectory.png": "Blocks in all four stages against channels of the first; "
    "grey dots are the candidates that were scored but not taken.",
    "scale_candidates.png": "Each dot is one candidate, coloured by its step; the star was taken. "
    "Scores of different steps belong to different sizes: compare within a colour.",
    "train_epochs.png": "Loss and top-1 accuracy of every epoch. The shades are the phases of the training: darker "
    "ones see fewer tokens, which makes their epochs cheaper. Validation sees as many tokens as its phase.",
    "train_cost.png": "The same training over what it has cost: multiply-adds of all forward passes on the left (the "
    "backward passes cost about twice as many again), time in training steps on the right.",
    "detect_epochs.png": "Loss and COCO's average precision of every epoch, of boxes and of masks. The shades are the "
    "phases of the training: darker ones see fewer tokens.",
    "detect_cost.png": "The same training over what it has cost: multiply-adds of all forward passes of the backbone "
    "on the left, time in training steps on the right.",
    "detect_examples.png": "Validation images with what is in them (above) and what the last validation found with a "
    "score of 0.5 or more (below). F1 counts what was found with the right class and an overlap (IoU) of 0.5 or more.",
    "detect_hardest.png": "The hardest images: those with the smallest F1, the truth above.",
    "search_pareto.png": "Every sampled topology: the sum of its ranks in both measures as a share of the largest, "
    "against what it costs. The line joins those that no other one beats in both.",
    "scale_compared.png": "Left: how each rule grows the same topology. Right: what was measured of it on the way; the "
    "numbers are steps.",
    "search_compared.png": "Moving means of what each search drew, a line for each seed.",
    "study_scatter.png": "Each dot is one topology: what was measured of it untrained, and its accuracy when trained. "
    "Tau is Kendall's, in the direction in which the measure is said to be better, with its 95 % bootstrap interval. "
    "Orange-red: As-ViT; grey: sizes; yellow: AZ-NAS; blue: other training-free measures.",
    "study_taus.png": "How well each measure orders the trained networks, 1 being perfect and 0 chance, and what it "
    "costs. An interval that holds 0 may be luck.",
    "-inference.png": "Inference: medians; shades or whiskers are quartiles of the turns.",
    "-train.png": "Forward and backward of a training step: medians; shades or whiskers are quartiles of the turns.",
    "-memory.png": "Largest memory that a call takes beyond weights and images.",
}

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; max-width: 66rem; margin: 2.5rem auto;
       padding: 0 1.25rem; }
h1 { font-size: 1.8rem; margin: 0 0 .25rem; } h2 { margin: 3rem 0 .5rem; border-bottom: 2px solid #0072b2; }
h3 { margin: 2rem 0 .5rem; } .note { color: #5a5a5a; margin: .25rem 0 1rem; }
code { font: .92em ui-monospace, monospace; background: #f2f5f8; padding: .1em .35em; border-radius: 4px; }
.result { font-size: 1.1rem; background: #f2f5f8; border-left: 4px solid #0072b2; padding: .8rem 1rem; margin: 1rem 0;
          overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; } figcaption { color: #5a5a5a; font-size: .92rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #bbb; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.text { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.bar { display: block; height: .35rem; margin-top: .15rem; background: #e3e8ee; border-radius: 2px; min-width: 5rem; }
.bar i { display: block; height: 100%; background: #0072b2; border-radius: 2px; }
small { color: #5a5a5a; }
"""


class Html(str):
    """Text that is markup already."""


@dataclass(frozen=True)
class Section:
    """A heading, a result line, pictures by file name, and tables."""

    title: str
    status: str
    topology: str
    images: dict[str, bytes]
    tables: list[tuple[str, str, Sequence[str], Sequence[Sequence[Any]]]]  # title, note, header, rows

    @classmethod
    def of(cls, run: Run, images: dict[str, bytes]) -> Section:
        """The section of one run."""
        unit = "topologies" if run.kind == "study" else "epochs" if run.kind in TRAININGS else "steps"
        steps = f"{len(run.trace)} {unit}"
        status = f"finished after {steps}" if run.finished else f"not finished: {steps} so far"
        makers = {
            "search": (_result_table, _top_table, _choice_table),
            "scale": (_result_table, _growth_table),
            **dict.fromkeys(TRAININGS, (training_result_table, phase_table)),
            "study": (study_result_table, measure_table, network_table),
        }
        common = (_config_table, _starts_table) if run.starts else (_config_table,)
        tables = [make(run) for make in (*makers[run.kind], *common)]
        title = TITLES[run.kind]
        return cls(title, status, run.topology, images, tables)


def render(name: str, sections: Sequence[Section], note: str = DESIGN_NOTE) -> str:
    """The whole page; ``name`` is that of the run directory or the file."""
    body = "\n".join(_section(section) for section in sections)
    title = escape(f"asvit_fast: {name}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<h1>{title}</h1>\n<p class="note">{escape(note)}</p>\n'
        f'{body}\n<p class="note">Written by asvit_fast {escape(__version__)}.</p>\n</body>\n</html>\n'
    )


def _section(section: Section) -> str:
    figures = "\n".join(_figure(name, png) for name, png in section.images.items())
    tables = "\n".join(_table(*table) for table in section.tables)
    label = "Network" if section.title in (TITLES[kind] for kind in TRAININGS) else "Topology"
    result = f'<div class="result">{label} <code>{escape(section.topology)}</code></div>\n' if section.topology else ""
    return f'<h2>{section.title}</h2>\n<p class="note">{escape(section.status)}</p>\n{result}{figures}\n{tables}'


def _figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    caption = escape(next(text for end, text in CAPTIONS.items() if name.endswith(end)))
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _table(title: str, note: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<h3>{escape(title)}</h3>{note}\n<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    """A table cell; long text wraps, everything else stays on one line."""
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    return f"<td{' class=text' if len(str(value)) > 40 else ''}>{escape(str(value))}</td>"


def _code(topology: str) -> Html:
    return Html(f"<code>{escape(topology)}</code>")


def _millions(value: Any) -> str:
    return f"{as_float(value) / 1e6:,.2f}"


def _score(value: Any) -> str:
    return f"{as_float(value):.5g}"


def _result_table(run: Run):
    """The run's result in numbers with units."""
    source = run.result or run.trace[-1]
    rows = [
        ("parameters (millions)", _millions(source["params"])),
        ("multiply-adds (millions)", _millions(source["flops"])),
    ]
    for key, label in (("length_distortion", "length distortion"), ("ntk_condition", "NTK condition number")):
        if run.finished and key in source:
            rows.append((label, _score(source[key])))
    if run.finished and source.get("entropy") is not None:
        rows.append(("entropy of the policy at the end (nats)", _score(source["entropy"])))
    rows.append(("time in all steps (seconds)", f"{sum(as_float(record['seconds']) for record in run.trace):,.1f}"))
    rejected = sum(len(record.get("rejected") or record.get("dropped") or []) for record in run.trace)
    rows.append(("candidates outside the budget, not scored", str(rejected)))
    title = "Result" if run.finished else "Last step"
    return title, "", ("", "value"), rows


def _top_table(run: Run):
    """The best sampled topologies by the sum of their two ranks."""
    distinct = list({record["topology"]: record for record in run.trace}.values())
    scores = np.array(
        [[as_float(record[name]) for name in ("length_distortion", "ntk_condition")] for record in distinct]
    )
    costs = np.where(np.isnan(scores), np.inf, scores * [-1, 1])  # [topologies, 2]; NaN ranks last
    rank_sums = costs.argsort(0, kind="stable").argsort(0, kind="stable").sum(1)  # [topologies]
    rows = [
        (
            _code(distinct[index]["topology"]),
            rank_sums[index],
            *(f"{score:.5g}" for score in scores[index]),
            _millions(distinct[index]["params"]),
            _millions(distinct[index]["flops"]),
            distinct[index]["step"] + 1,
        )
        for index in rank_sums.argsort(kind="stable")[:TOP]
    ]
    note = (
        f"The best of {len(distinct)} different sampled topologies, by the sum of their ranks in length distortion "
        "(larger is better) and NTK condition number (smaller is better)."
    )
    if "rule" not in run.config:
        note += " The search returns the most probable topology of its policy, which need not be among them."
    header = ("topology", "rank sum", "length distortion", "NTK condition", "params (M)", "MACs (M)", "step")
    return "Best sampled topologies", note, header, rows


def _choice_table(run: Run):
    """Every choice of every dimension: how often it was drawn, and its probability now."""
    probabilities = _policy(run)
    drawn = Counter(_choices(run.trace))
    dimensions = _space(run).dimensions
    columns = max(map(len, dimensions.values()))
    rows = []
    for name, values in dimensions.items():
        cells = [
            _share(
                value,
                drawn[name, value] / len(run.trace),
                None if probabilities is None else probabilities[name, value],
            )
            for value in values
        ]
        rows.append((name, *cells, *[""] * (columns - len(cells))))
    note = (
        "K kernel, S splits per side, E expansion of the MLP, in stages 1 to 4; heads of the last stage. In each cell: "
    )
    if probabilities is None:
        note, title = note + "the choice; its share of all that were drawn.", "What was drawn"
    else:
        note += "the choice; the policy's probability of it now, also as a bar; its share of all that were drawn."
        title = "What the policy learnt"
    return title, note, ("dimension", *["" for _ in range(columns)]), rows


def _choices(records: Iterable[dict[str, Any]]) -> Iterable[tuple[str, int]]:
    """Every (dimension, value) of every sampled topology."""
    for record in records:
        topology = Topology.parse(record["topology"])
        yield "heads", topology.heads
        for index, stage in enumerate(topology.stages, start=1):
            yield from ((f"K{index}", stage.kernel), (f"S{index}", stage.splits), (f"E{index}", stage.expansion))


def _space(run: Run) -> SearchSpace:
    return SearchSpace({name: tuple(values) for name, values in run.config["space"].items()})


def _policy(run: Run) -> dict[tuple[str, int], float] | None:
    """Probability of each (dimension, value) in the saved state; None when there is no state beside the trace."""
    path = run.directory / STATE
    if not path.is_file() or "rule" in run.config:
        return None
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        logits = saved["policy"]["logits"]  # [choices of all dimensions]
    except Exception as error:  # a torn or foreign file raises whatever its bytes suggest
        raise InputError(f"{str(path)!r} is not the state of a search ({type(error).__name__}); restore it") from error
    dimensions = _space(run).dimensions
    parts = logits.split([len(values) for values in dimensions.values()])
    return {
        (name, value): float(probability)
        for (name, values), part in zip(dimensions.items(), parts, strict=True)
        for value, probability in zip(values, part.softmax(0), strict=True)
    }


def _share(value: int, drawn: float, probability: float | None) -> Html:
    shown = f"<small>drawn {100 * drawn:.0f} %</small>"
    if probability is None:
        return Html(f"<b>{value}</b> {shown}")
    bar = f'<span class="bar"><i style="width: {100 * probability:.1f}%"></i></span>'
    return Html(f"<b>{value}</b> &nbsp;{100 * probability:.0f} % {shown}{bar}")


def _growth_table(run: Run):
    """The chosen topology of every step."""
    rows = []
    for record in run.trace:
        topology = Topology.parse(record["topology"])
        rows.append(
            (
                record["step"] + 1,
                _code(record["topology"]),
                topology.width,
                sum(topology.depths),
                _millions(record["params"]),
                _millions(record["flops"]),
                len(record["candidates"]),
                f"{as_float(record['seconds']):.1f}",
            )
        )
    header = ("step", "topology", "width", "blocks", "params (M)", "MACs (M)", "candidates", "seconds")
    return "Growth", "Width in channels of the first stage; blocks of all four stages.", header, rows


def _config_table(run: Run):
    rows = [(name, _words(value)) for name, value in run.config.items() if name not in ("kind", "changes")]
    return "Options", "", ("option", "value"), rows


def _words(value: Any) -> str:
    """An option for people: no quotes, brackets or names of Python's."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_words(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def _starts_table(run: Run):
    """When, where and by which command the run was begun and continued."""
    names = ("date", "command", "machine", "versions")
    rows = [tuple(_words(start.get(name)) for name in names) for start in run.starts]
    return "Started", "Each line is one start: the first began the run, the others continued it.", names, rows

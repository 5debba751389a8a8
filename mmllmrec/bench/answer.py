"""The answer to a question: its table over seeds, curves, and verdicts with intervals.

Legend: U users of the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from mmllmrec.bench.run import fewer
from mmllmrec.evaluation.protocols import harmonic
from mmllmrec.evaluation.report import HARMONIC
from mmllmrec.evaluation.significance import clustered_bootstrap, first_row, holm, over_seeds
from mmllmrec.runcard import RunCard

NDCG = "ndcg@20"
COST = "cost"  # the row of the metrics that are of a fit and not of a ranking


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and the row and metric that it shows; ``of_oracle``: as share of the oracle's."""

    title: str
    row: str
    metric: str = NDCG
    digits: int = 4
    of_oracle: bool = False


@dataclass(frozen=True)
class Line:
    """A curve: what its axis is, and the row of the metrics at each place of it."""

    label: str
    rows: dict[float, str]
    metric: str = NDCG


@dataclass(frozen=True)
class Claim:
    """A system less another on a row; of several others the best on that very row, which is the stronger rival.
    ``share``: told as the first system's share of the other."""

    system: str
    other: str | tuple[str, ...]
    row: str
    metric: str = NDCG
    share: bool = False


@dataclass(frozen=True)
class Layout:
    """What of the metrics an answer shows: tables by heading, curves by title, and systems that are printed grey (those
    that cannot be had)."""

    tables: dict[str, list[Column]]
    curves: dict[str, Line] = field(default_factory=dict)
    grey: tuple[str, ...] = ("Oracle",)


@dataclass
class Answer:
    """A question's table over seeds: ``frame`` has a row a (system, row, metric) with mean, standard deviation, share
    of the oracle and number of seeds; ``verdicts`` a row a claim; ``notes`` further sentences; ``path`` is the card."""

    title: str
    frame: pd.DataFrame
    verdicts: pd.DataFrame
    notes: list[str]
    layout: Layout
    path: Path

    def value(self, system: str, row: str, metric: str = NDCG) -> float:
        """A mean over seeds; NaN where there is none."""
        part = self.frame.query("system == @system and row == @row and metric == @metric")
        return float(part["mean"].iloc[0]) if len(part) else float("nan")

    def table(self, heading: str | None = None) -> pd.DataFrame:
        """A table as text, mean ± standard deviation over seeds: a line a system, the columns of a heading (the first
        without one); systems that have none of them are left out."""
        columns = self.layout.tables[heading or next(iter(self.layout.tables))]
        known = {(one["system"], one["row"], one["metric"]): one for one in self.frame.to_dict("records")}
        lines: dict[str, dict[str, str]] = {}
        for system in self.frame["system"].unique():
            cells = {c.title: _cell(known.get((system, c.row, c.metric)), c, self.frame) for c in columns}
            if any(v != "-" for v in cells.values()):
                lines[str(system)] = cells
        return pd.DataFrame.from_dict(lines, orient="index").rename_axis("system")

    def curve(self, title: str) -> pd.DataFrame:
        """The means of a curve: a line a system that has it, a column a place of the axis."""
        line = self.layout.curves[title]
        names = {row: place for place, row in line.rows.items()}
        part = self.frame[self.frame["row"].isin(names) & (self.frame["metric"] == line.metric)]
        part = part.assign(place=part["row"].map(names))
        return part.pivot(index="system", columns="place", values="mean").loc[part["system"].unique()]

    @property
    def covers(self) -> str:
        """What the intervals of the verdicts cover."""
        seeds = int(self.frame["seeds"].max())
        if seeds == 1:
            return "users resampled: of one division of the data and one start of each, which intervals leave out"
        return f"users resampled, each user's mean over the {seeds} seeds: which seeds they were is left out"

    def told(self) -> list[str]:
        """The verdicts as sentences, and the notes."""
        return [_sentence(v) for v in self.verdicts.to_dict("records")] + self.notes

    def __str__(self) -> str:
        with pd.option_context("display.width", 250, "display.max_columns", 40):
            parts = [self.title]
            parts += [f"{heading}\n{self.table(heading).to_string()}" for heading in self.layout.tables]
        told = self.told()
        if told:
            parts.append("\n".join([f"verdicts ({self.covers}; p Holm-corrected)", *told]))
        return "\n\n".join(parts) + f"\n\nrun card: {self.path}"

    def plot(self) -> Any:
        """Bars of the first table's rankings, mean and standard deviation over seeds, a panel a column, and a panel a
        curve; a dashed line is the oracle. Returns the figure."""
        import matplotlib.pyplot as plt

        bars = [c for c in next(iter(self.layout.tables.values())) if c.row != COST and not c.of_oracle]
        systems = [s for s in self.frame["system"].unique() if s != "Oracle" and self.value(s, bars[0].row) >= 0]
        n = len(bars) + len(self.layout.curves)
        figure, axes = plt.subplots(1, n, figsize=(3.2 * n, 0.32 * len(systems) + 1.6), squeeze=False)
        std = self.frame.set_index(["system", "row", "metric"])["std"].to_dict()
        for axis, column in zip(axes[0], bars, strict=False):
            means = [self.value(s, column.row, column.metric) for s in systems]
            spread = [float(std.get((s, column.row, column.metric)) or 0.0) for s in systems]
            colours = [
                "#2a6f97" if s == "Unified" else "#d5d5d5" if s in self.layout.grey else "#a9bcd0" for s in systems
            ]
            axis.barh(range(len(systems)), means, xerr=spread, color=colours)
            axis.set_yticks(range(len(systems)), systems if axis is axes[0][0] else [""] * len(systems), fontsize=8)
            axis.invert_yaxis()
            ceiling = self.value("Oracle", column.row, column.metric)
            if ceiling == ceiling:
                axis.axvline(ceiling, color="#333", linestyle="--", linewidth=1)
            axis.set_title(column.title, fontsize=10)
            axis.set_xlabel(column.metric)
        for axis, (title, line) in zip(axes[0][len(bars) :], self.layout.curves.items(), strict=True):
            for system, values in self.curve(title).iterrows():
                deviation = [float(std.get((system, row, line.metric)) or 0.0) for row in line.rows.values()]
                axis.errorbar(list(line.rows), values, yerr=deviation, marker="o", markersize=3, label=str(system))
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(line.label, fontsize=8)
            axis.set_xticks(list(line.rows))
            axis.set_ylim(bottom=0)
            if axis is axes[0][-1]:
                axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
        for axis in axes[0]:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        return figure

    def _repr_html_(self) -> str:
        """The tables, systems that cannot be had and controls in grey, and the verdicts."""

        def shade(line: pd.Series) -> list[str]:
            plain = line.name not in self.layout.grey and ", shuffled " not in str(line.name)
            return ["" if plain else "color: #888"] * len(line)

        tables = {heading: self.table(heading).style.apply(shade, axis=1).to_html() for heading in self.layout.tables}
        parts = [f"<p>{heading}</p>{table}" for heading, table in tables.items()]
        return f"<h4>{self.title}</h4>{''.join(parts)}<ul>{''.join(f'<li>{t}</li>' for t in self.told())}</ul>"


def _cell(one: dict[Any, Any] | None, column: Column, frame: pd.DataFrame) -> str:
    if one is None:
        return "-"
    if column.of_oracle:
        return "-" if one["of oracle"] is None else f"{one['of oracle']:.0%}"
    spread = "" if one["std"] is None or column.row == COST else f" ±{one['std']:.{column.digits}f}"
    return f"{one['mean']:,.{column.digits}f}{spread}{fewer(one, frame)}"


def judge(claims: Sequence[Claim], frame: pd.DataFrame, cards: Sequence[RunCard], folder: Path) -> pd.DataFrame:
    """Each claim as ``clustered_bootstrap`` finds it from the users' values of all seeds' reports, a row a claim, with
    Holm's correction over all of them."""
    lines = []
    means = {(r["system"], r["row"], r["metric"]): r["mean"] for r in frame.to_dict("records")}
    for claim in claims:
        others = (claim.other,) if isinstance(claim.other, str) else claim.other
        other = max(others, key=lambda name: means.get((name, claim.row, claim.metric), -1.0))
        rows = ("warm", "cold") if claim.row == HARMONIC else (claim.row,)
        a, b = (_users(name, rows, claim.metric, cards, folder) for name in (claim.system, other))
        found = clustered_bootstrap(a, b, combine=_harmonic if claim.row == HARMONIC else first_row)
        about = {"system": claim.system, "against": other, "row": claim.row, "metric": claim.metric}
        lines.append(about | asdict(found) | {"share": claim.share})
    verdicts = pd.DataFrame(lines)
    if len(verdicts):
        verdicts["p (Holm)"] = holm(verdicts["p"].to_numpy())
    return verdicts


def _harmonic(means: np.ndarray) -> np.ndarray:
    """Of rows warm and cold, (..., 2) -> (...)."""
    flat = means.reshape(-1, 2)
    return np.array([harmonic(float(w), float(c)) for w, c in flat]).reshape(means.shape[:-1])


def _users(system: str, rows: Sequence[str], metric: str, cards: Sequence[RunCard], folder: Path) -> np.ndarray:
    """Each user's mean over seeds on some rows, (U, rows), NaN where it is not ranked."""
    columns = []
    for row in rows:
        values = []
        for card in cards:
            with safe_open(folder / f"seed{card.seed}" / "report" / "users.safetensors", framework="numpy") as file:
                values.append((file.get_tensor(f"users/{row}"), file.get_tensor(f"{system}/{row}/{metric}")))
        columns.append(over_seeds(values, int(cards[0].split["users"])))
    return np.stack(columns, axis=1)


def _sentence(v: dict[Any, Any]) -> str:
    p = f"p {v['p (Holm)']:.4f}"
    known = v["relative"] == v["relative"]
    if v["share"]:
        share = f"{1 + v['relative']:.1%} [{1 + v['relative_low']:.1%}, {1 + v['relative_high']:.1%}]" if known else "-"
        return f"{v['system']} / {v['against']} on {v['row']}: {share}"
    relative = f", {v['relative']:+.1%} [{v['relative_low']:+.1%}, {v['relative_high']:+.1%}]" if known else ""
    difference = f"{v['difference']:+.4f} [{v['low']:+.4f}, {v['high']:+.4f}]"
    return f"{v['system']} - {v['against']} on {v['row']}: {difference}{relative}, {p}"


def plain(lines: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    """Rows for a card, which holds no NaN."""
    return [{k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in line.items()} for line in lines]

"""evaluate(): every system on every row of a split, with floors, ceiling, intervals and tests; and the Report of it."""

from __future__ import annotations

import html
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from safetensors.torch import save_file

from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.splits import Split
from mmllmrec.evaluation import metrics
from mmllmrec.evaluation.controls import controls_of
from mmllmrec.evaluation.floors import ContentKNN, Popularity, Random
from mmllmrec.evaluation.metrics import METRICS
from mmllmrec.evaluation.protocols import harmonic, rankings, seen_matrix
from mmllmrec.evaluation.ranking import name_of
from mmllmrec.evaluation.significance import holm, interval, paired_bootstrap
from mmllmrec.runcard import RunCard, write_atomically, write_json

HARMONIC = "harmonic mean"


def scorer_of(system: Any) -> Any:
    """What scores: a fitted run's model, or the scorer itself. Raises ``DataError`` for anything else."""
    for candidate in (system, getattr(system, "model", None)):
        if hasattr(candidate, "embed") or hasattr(candidate, "score"):
            return candidate
    raise DataError(f"{system!r} is neither a fitted run nor a scorer: it needs embed() or score(users)")


def evaluate(
    system: Any,
    split: Split,
    *,
    against: Sequence[Any] = (),
    on: str = "valid",
    mask: str = "train+valid",
    ks: tuple[int, ...] = (5, 10, 20, 50),
    floors: bool = True,
    controls: bool | Sequence[str] = False,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
) -> Report:
    """Rank the whole catalogue for every user, for ``system``, those ``against`` it, the floors, and the oracle.

    ``on="test"`` opens the sealed part, and the card says how often that has been done; choose on ``"valid"``. At test,
    train and validation positives are masked (``mask="train"``: train's alone). A planted dataset brings its oracle.
    ``controls`` adds rows of ``system`` with a modality gone, shuffled, random or noised at scoring time: True for all,
    or some by name (``["without image", "shuffled text"]``). ``folder`` saves the report. Raises ``DataError`` when two
    systems share a name.
    """
    began = time.perf_counter()
    seen = seen_matrix(split, on=on, mask=mask)
    target = split.open_test() if on == "test" else split.valid
    controlled = controls_of(scorer_of(system), split.catalog, controls, seed=seed, name=name_of(system))
    systems = [system, *controlled, *against]
    content = ContentKNN(split.train, catalog=split.catalog) if split.catalog.modalities else None
    if floors:
        systems += [Random(split.train, seed=seed), Popularity(split.train)]
        if content is not None:
            systems.append(content)
    if hasattr(split.data, "oracle"):
        systems.append(split.data.oracle())
    names = [name_of(s) for s in systems]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise DataError(f"two systems are called {twice[0]!r}: give one another name (its .name)")
    # what two items of a list have in common: content where there is some, else the users who took both
    vectors = content.vectors() if content is not None else _takers(split.train)
    counts, n_users, n_items = split.train.item_counts, split.train.n_users, split.train.n_items
    values: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    shown: dict[str, dict[str, float]] = {}
    users: dict[str, np.ndarray] = {}
    for one, name in zip(systems, names, strict=True):
        found = rankings(scorer_of(one), split, target, seen=seen, k=max(ks), seed=seed)
        for row, ranking in found.items():
            values[name, row] = {f"{m}@{k}": ranking.per_user(f"{m}@{k}") for m in METRICS for k in ks}
            users[row] = ranking.users
        lists = found["all"]
        for k in ks:
            items, real = lists.items[:, :k], lists.real[:, :k]
            values[name, "all"][f"novelty@{k}"] = metrics.novelty(items, real, counts, n_users)
            values[name, "all"][f"diversity@{k}"] = metrics.diversity(items, real, vectors)
            shown.setdefault(name, {})[f"coverage@{k}"] = metrics.coverage(items, real, n_items)
            shown[name][f"gini@{k}"] = metrics.gini(items, real, n_items)
    card = RunCard(
        kind="evaluate",
        name=names[0],
        seed=seed,
        data=split.data.name,
        split=split.describe(),
        model={n: getattr(getattr(s, "card", None), "model", {}) for n, s in zip(names, systems, strict=True)},
        settings={"on": on, "mask": mask if on == "test" else "train", "ks": list(ks)},
        seconds=round(time.perf_counter() - began, 3),
        test_opened=split.test_opened,
    )
    about = {n: _about(s) for n, s in zip(names, systems, strict=True)}
    report = Report(names, values, users, about, card, shown, controls=[c.name for c in controlled])
    if folder is not None:
        report.save(folder)
    return report


def _takers(train: Interactions) -> sp.csr_matrix:
    """Items described by who took them: (I, U) of unit or zero length."""
    length = np.sqrt(np.maximum(train.item_counts, 1)).astype(np.float32)
    return (sp.diags(1 / length) @ train.csr.T).tocsr()


def _about(system: Any) -> dict[str, Any]:
    card = getattr(system, "card", None)
    return {
        "loss": getattr(scorer_of(system), "loss_name", "-"),
        "trained": card.trainable_parameters if card is not None else 0,
        "seconds": card.seconds if card is not None else 0.0,
    }


class Report:
    """Per-user values of all systems on all rows, and tables, plots and tests of them."""

    def __init__(
        self,
        names: list[str],
        values: dict[tuple[str, str], dict[str, np.ndarray]],
        users: dict[str, np.ndarray],
        about: dict[str, dict[str, Any]],
        card: RunCard,
        shown: dict[str, dict[str, float]],
        *,
        controls: Sequence[str] = (),
    ):
        self.controls = tuple(controls)
        self.names, self.values, self.users, self.about, self.card = names, values, users, about, card
        self.shown = shown  # coverage and Gini of all lists together: they have no value a user
        self.path: Path | None = None
        card.metrics = {
            f"{system} | {row} | {metric}": [self.mean(system, row, metric), *interval(v)]
            for (system, row), found in values.items()
            for metric, v in found.items()
            if len(v) > 1
        }
        card.metrics |= {f"{system} | all | {m}": [v] for system, found in shown.items() for m, v in found.items()}

    @property
    def rows(self) -> list[str]:
        """The rows of the split: all, and where it has them warm, cold, cold only, cold users."""
        return list(self.users)

    def per_user(self, system: str, row: str = "all", metric: str = "ndcg@20") -> np.ndarray:
        """A metric of each ranked user, (n,); ``users[row]`` says whose."""
        return self.values[system, row][metric]

    def mean(self, system: str, row: str = "all", metric: str = "ndcg@20") -> float:
        """The mean over users; ``row`` may be ``"harmonic mean"`` (of warm and cold)."""
        if row == HARMONIC:
            return harmonic(self.mean(system, "warm", metric), self.mean(system, "cold", metric))
        return float(self.values[system, row][metric].mean())

    @property
    def frame(self) -> pd.DataFrame:
        """Everything, one row a (system, row, metric): mean, 95% interval, number of users."""
        rows = []
        for (system, row), found in self.values.items():
            for metric, v in found.items():
                low, high = interval(v)
                rows.append([system, row, metric, v.mean(), low, high, len(v)])
        return pd.DataFrame(rows, columns=["system", "row", "metric", "mean", "low", "high", "users"])

    def table(self, metric: str = "ndcg@20") -> pd.DataFrame:
        """One line a system: mean +- half of the 95% interval on each row, share of the oracle, loss, cost."""
        lines = []
        for name in self.names:
            line: dict[str, Any] = {"system": name, "loss": self.about[name]["loss"]}
            for row in self.rows:
                values = self.per_user(name, row, metric)
                low, high = interval(values)
                line[row] = f"{values.mean():.4f} ±{(high - low) / 2:.4f}"
            if "warm" in self.rows and "cold" in self.rows:
                line[HARMONIC] = f"{self.mean(name, HARMONIC, metric):.4f}"
            if "Oracle" in self.names:
                for row in self.rows:
                    ceiling = self.mean("Oracle", row, metric)
                    line[f"{row}, of oracle"] = f"{self.mean(name, row, metric) / ceiling:.0%}" if ceiling > 0 else "-"
            line["trained parameters"] = f"{self.about[name]['trained']:,}"
            line["fit seconds"] = f"{self.about[name]['seconds']:.0f}"
            lines.append(line)
        return pd.DataFrame(lines).set_index("system")

    def beyond(self, k: int = 20) -> pd.DataFrame:
        """What the lists are like, right or wrong: a line a system, the columns of ``evaluation.metrics`` on row
        ``all``. coverage: share of the catalogue shown to anyone; Gini: 0 all items alike; novelty in bits; diversity:
        1 - mean cosine of content within a list."""
        lines = []
        for name in self.names:
            line: dict[str, Any] = {"system": name}
            line |= {m: self.shown[name][f"{m}@{k}"] for m in ("coverage", "gini")}
            line |= {m: self.mean(name, "all", f"{m}@{k}") for m in ("novelty", "diversity")}
            lines.append(line)
        return pd.DataFrame(lines).set_index("system")

    def compare(self, a: str | None = None, *, metric: str = "ndcg@20", row: str = "all") -> pd.DataFrame:
        """``a`` (the first system) less each other: difference, paired-bootstrap 95% interval, p, Holm-corrected p."""
        first = a or self.names[0]
        lines = []
        for other in self.names:
            if other == first:
                continue
            x, y = self.per_user(first, row, metric), self.per_user(other, row, metric)
            low, high, p = paired_bootstrap(x, y)
            lines.append({"against": other, "difference": x.mean() - y.mean(), "low": low, "high": high, "p": p})
        frame = pd.DataFrame(lines).set_index("against")
        frame["p (Holm)"] = holm(frame["p"].to_numpy())
        return frame

    def plot(self, metric: str = "ndcg@20") -> Any:
        """Bars of a metric with 95% intervals, a panel a row; a dashed line is the oracle. Returns the figure."""
        import matplotlib.pyplot as plt

        systems = [n for n in self.names if n != "Oracle"]
        figure, axes = plt.subplots(1, len(self.rows), figsize=(3.2 * len(self.rows), 0.45 * len(systems) + 1.4))
        for axis, row in zip(np.atleast_1d(axes), self.rows, strict=True):
            means = np.array([self.mean(n, row, metric) for n in systems])
            half = np.array([np.subtract(*interval(self.per_user(n, row, metric))[::-1]) / 2 for n in systems])
            axis.barh(range(len(systems)), means, xerr=half, color=["#2a6f97", *["#a9bcd0"] * (len(systems) - 1)])
            axis.set_yticks(range(len(systems)), systems if axis is np.atleast_1d(axes)[0] else [""] * len(systems))
            axis.invert_yaxis()
            if "Oracle" in self.names:
                axis.axvline(self.mean("Oracle", row, metric), color="#333", linestyle="--", linewidth=1)
            axis.set_title(row, fontsize=10)
            axis.set_xlabel(metric)
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        return figure

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``card.json``, ``table.txt`` and the per-user values to ``folder``, at once; the card's path."""

        def write(beside: Path) -> None:
            beside.mkdir()
            write_json(beside / "card.json", self.card.as_dict())
            (beside / "table.txt").write_text(str(self) + "\n", encoding="utf-8")
            tensors = {f"{s}/{r}/{m}": torch.from_numpy(v) for (s, r), x in self.values.items() for m, v in x.items()}
            tensors |= {f"users/{r}": torch.from_numpy(u) for r, u in self.users.items()}
            save_file(tensors, beside / "users.safetensors")

        self.path = write_atomically(folder, write) / "card.json"
        return self.path

    def __str__(self) -> str:
        with pd.option_context("display.width", 250, "display.max_columns", 30):
            return f"{self._heading()}\n{self.table()}"

    def __repr__(self) -> str:
        return f"Report({', '.join(self.names)}; rows {', '.join(self.rows)})"

    def _heading(self) -> str:
        s = self.card
        where = f", card {self.path}" if self.path else ""
        return f"ndcg@20 on {s.settings['on']} of {s.split['name']}({s.data}), test opened {s.test_opened}x{where}"

    def _repr_html_(self) -> str:
        """The table with the best of each row in bold, systems that cannot be had (the oracle) and controls in grey."""
        table = self.table()
        rivals = [n for n in self.names if n != "Oracle" and n not in self.controls]
        bold = {row: max(rivals, key=lambda n, row=row: self.mean(n, row)) for row in self.rows}  # type: ignore[misc]
        if HARMONIC in table:
            bold[HARMONIC] = max(rivals, key=lambda n: self.mean(n, HARMONIC))
        lines = []
        for name, cells in table.iterrows():
            shade = "" if name in rivals else " style='color:#888'"
            weights = ("bold" if bold.get(str(c)) == name else "normal" for c in table.columns)
            inner = "".join(
                f"<td style='font-weight:{w}'>{html.escape(str(v))}</td>" for w, v in zip(weights, cells, strict=True)
            )
            lines.append(f"<tr{shade}><th style='text-align:left'>{html.escape(str(name))}</th>{inner}</tr>")
        head = "".join(f"<th>{html.escape(str(c))}</th>" for c in ["system", *table.columns])
        return f"<p>{html.escape(self._heading())}</p><table><tr>{head}</tr>{''.join(lines)}</table>"

"""tune(): settings chosen on validation, under one budget of trials and minutes for every system of a table."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from tqdm.auto import tqdm

from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.models.base import Recommender
from mmllmrec.runcard import RunCard, content_hash, drop_torn_line
from mmllmrec.seed import generator, seed_everything, stream
from mmllmrec.training import checkpoint
from mmllmrec.training.fit import DivergedError, fit

JOURNAL = "journal.jsonl"
FIXED = (
    "model",
    "split",
    "seed",
    "folder",
    "checkpoint_every",
    "resume",
    "on_epoch",
    "monitor",
    "progress",
    "log_with",
)
Range = Sequence[Any]  # [a, b, c]: one of these; (low, high): between; (low, high, "log"): between, on a log scale


class OtherSearchError(DataError):
    """A folder holds another search than the one that is asked for."""


@dataclass
class Tuned:
    """What ``tune`` found. ``best``: the best trial's values by name, as in ``space``; ``score``: its validation value;
    ``table``: a row a trial (values, score, seconds, epochs, state); ``card``: all of it, for the record; ``kept``: the
    folder of the best trial's fit, where it was kept."""

    best: dict[str, Any]
    score: float
    table: pd.DataFrame
    card: RunCard
    kept: Path | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of ``build`` among the best values."""
        return {k: v for k, v in self.best.items() if not k.startswith("fit.")}

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords of ``fit`` of the best trial, the fixed ones included."""
        chosen = {k.removeprefix("fit."): v for k, v in self.best.items() if k.startswith("fit.")}
        return {**self.card.settings["fit"], **chosen}

    def __repr__(self) -> str:
        return f"Tuned({self.card.name}: {self.card.settings['monitor']} {self.score:.4f} at {self.best})"


def tune(
    build: Callable[..., Recommender],
    split: Split,
    *,
    space: Mapping[str, Range],
    settings: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    trials: int = 8,
    minutes: float | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = True,
    monitor: str = "ndcg@20",
    prune: bool = True,
    keep_best: bool = False,
    progress: bool = True,
) -> Tuned:
    """Search settings of a model on ``split.valid`` with Optuna; the test part stays sealed.

    ``build(split, **options)`` makes the model; ``space`` maps a keyword of ``build``, or of ``fit`` with ``fit.``
    before it, to a list of choices (plain values), to ``(low, high)`` (whole numbers where both are) or to ``(low,
    high, "log")``. ``settings`` are the fixed keywords of ``fit``; without them the model's own ``fit_defaults``.

    The first trial is the published setting: ``start``, else the defaults of ``build`` and of the fit settings; of a
    list of settings each is a trial, in order, none of them cut off. The others come from a tree-structured Parzen
    estimator (Bergstra et al. 2011), whose first third is drawn at random; where ``space`` has choices alone, they are
    its other settings in random order, each once (of up to 200).
    With ``prune`` a trial ends at an epoch where its best value is below the median of the others' (Optuna's median
    rule), after a quarter of its epochs. Every trial has the same seed, so that settings are compared and not luck.

    The budget is ``trials`` and, where given, ``minutes`` of training: give every row of a table the same. A trial in
    which the minutes run out ends after its epoch and counts with what it reached. With ``folder`` each step is written
    down (JSON lines); a search that was cut off goes on, the trial that was running from its last epoch, and ends as it
    would have; one that was complete is read again. With ``keep_best`` the best trial's fit stays there (``kept``):
    ``fit`` with its settings, seed and that folder reads it, where it would train the same model once more, and trains
    it to its end where the search had cut it off.

    Raises ``DataError`` for an empty space, a name that neither ``build`` nor ``fit`` knows, a start outside its range,
    a ``folder`` of another search, a search in several processes, and when no trial could be trained.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if PartialState().num_processes > 1:
        raise DataError("tune runs in one process, without torchrun or accelerate launch: fit its best setting in many")
    if trials < 1 or (minutes is not None and minutes <= 0):
        raise DataError(f"trials={trials}, minutes={minutes}: a budget is at least one trial, and more than no time")
    ranges = {name: _distribution(name, values) for name, values in space.items()}
    starts = [start or {}] if start is None or isinstance(start, Mapping) else [dict(s) for s in start]
    if not starts or any(s.keys() != starts[0].keys() for s in starts):
        raise DataError("start: give settings, or a list of settings of the same names")
    known = {**_names(build, ranges), **starts[0]}
    for name in ranges:
        if name not in known:
            raise DataError(f"space: build has no default for {name!r}; pass start={{{name!r}: ...}}, as published")
    began = time.perf_counter()
    seed_everything(seed)
    first = build(split, **_unprefixed(starts[0], fits=False))
    fixed = dict(settings if settings is not None else getattr(first, "fit_defaults", {}))
    for key in fixed:
        if key in FIXED or key not in inspect.signature(fit).parameters:
            raise DataError(f"settings: fit takes no {key!r} here; use {sorted(_fit_names())}")
    given = {**known, **{f"fit.{k}": v for k, v in fixed.items()}}
    published = [_published(ranges, {**given, **s}, s) for s in starts]
    epochs = int(fixed.get("epochs", inspect.signature(fit).parameters["epochs"].default))
    asked: dict[str, Any] = {
        "space": {k: list(v) for k, v in space.items()},
        "fit": fixed,
        "start": published if len(published) > 1 else published[0],
        "monitor": monitor,
    }
    asked |= {"prune": prune, "model": first.name, "trials": trials, "minutes": minutes}
    place = None if folder is None else Path(folder).resolve()
    # what decides a trial's numbers; a larger budget later goes on with the same search
    same = {k: v for k, v in asked.items() if k not in ("trials", "minutes")}
    key = content_hash(same, split.hash, seed)
    del first

    def sampler(number: int) -> Any:
        # seeded by the trial and not once: a search that goes on asks as one that was never cut off
        own = int(stream(seed, "trial", number).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=own, n_startup_trials=max(trials // 3, 2))

    pruner = optuna.pruners.MedianPruner(n_startup_trials=max(2, len(published)), n_warmup_steps=epochs // 4)
    study = optuna.create_study(
        storage=_storage(place, resume),
        study_name="tune",
        direction="maximize",
        pruner=pruner if prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    if study.user_attrs.get("key", key) != key:
        why = "data, seed, space or settings"
        raise OtherSearchError(f"{place} holds another search ({why}): pass another, or resume=False")
    study.set_user_attr("key", key)
    # those that are not there: it may have been cut off here, or be of before
    there = [t.params or t.system_attrs.get("fixed_params") for t in study.get_trials(deepcopy=False)]
    for one in published + _rest(ranges, published, seed):
        if one not in there:
            study.enqueue_trial(one)

    def spent() -> float:
        return sum(t.user_attrs.get("seconds", 0.0) for t in study.get_trials(deepcopy=False))

    def finished() -> int:
        return sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))

    limit = math.inf if minutes is None else 60 * minutes
    bar = tqdm(total=trials, initial=min(finished(), trials), desc="tune", disable=not progress)
    while finished() < trials and spent() < limit and not _exhausted(study, ranges):
        cut = [t for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
        study.sampler = sampler(cut[0].number if cut else finished())
        trial = optuna.trial.Trial(study, cut[0]._trial_id) if cut else study.ask()
        chosen = {name: _suggest(trial, name, one) for name, one in ranges.items()}
        within = None if place is None else place / f"trial-{trial.number}"
        left, started = limit - spent(), time.perf_counter()
        told = study._storage.get_trial(trial._trial_id).intermediate_values if cut else {}
        best, ended = max(told.values(), default=-math.inf), ""  # a trial that goes on has come this far

        def watch(row: dict[str, Any], trial: Any = trial, left: float = left) -> bool:
            nonlocal best, ended
            if monitor in row:
                best = max(best, row[monitor])
                if row["epoch"] not in trial.storage.get_trial(trial._trial_id).intermediate_values:
                    trial.report(best, row["epoch"])
                ended = "pruned" if trial.should_prune() else ""
            if not ended and row["seconds"] > left and best > -math.inf:
                ended = "out of time"
            return bool(ended)

        state, value, about = TrialState.COMPLETE, None, {"seconds": 0.0}
        try:
            seed_everything(seed)
            model = build(split, **_unprefixed(chosen, fits=False))
            own = {**fixed, **_unprefixed(chosen, fits=True), "monitor": monitor, "seed": seed}
            run = fit(model, split, **own, folder=within, on_epoch=watch, progress=False)
            value = run.best_score
            about = {"epochs": len(run.history), "best epoch": run.best_epoch, "seconds": run.seconds}
            if ended == "pruned":
                state = TrialState.PRUNED
        except DivergedError as error:
            state, ended = TrialState.FAIL, str(error)
            about["seconds"] = round(time.perf_counter() - started, 3)
        for name, attribute in {**about, "ended": ended, "score": value}.items():
            trial.set_user_attr(name, attribute)
        study.tell(trial, None if state != TrialState.COMPLETE else value, state=state)
        leader = _leader(study)
        for old in place.glob("trial-*") if place is not None else ():
            if not (keep_best and leader is not None and old.name == f"trial-{leader.number}"):
                shutil.rmtree(old, ignore_errors=True)  # a finished trial's weights are of no more use
        bar.update()
        bar.set_postfix({monitor: f"{leader.user_attrs['score'] if leader else math.nan:.4f}"})
    bar.close()
    return _told(study, asked, ranges, split, seed=seed, began=began, place=place)


def _leader(study: Any) -> Any:
    """The finished trial of the best score, the first of equals; None where none has a score."""
    finished = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    scored = [t for t in finished if t.user_attrs.get("score") is not None]
    return max(scored, key=lambda t: t.user_attrs["score"], default=None)


def _told(
    study: Any,
    asked: dict[str, Any],
    ranges: dict[str, Any],
    split: Split,
    *,
    seed: int,
    began: float,
    place: Path | None,
) -> Tuned:
    """The table of all finished trials, the best of them, and the card."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        if t.state.is_finished():
            about = {k: t.user_attrs.get(k) for k in ("score", "best epoch", "epochs", "seconds", "ended")}
            params = {k: t.params.get(k) for k in ranges}
            rows.append({"trial": t.number, **params, **about, "state": t.state.name.lower()})
    leader = _leader(study)
    if leader is None:
        raise DataError(
            f"none of {len(rows)} trials could be trained: {rows[0]['ended'] if rows else 'no time was left'}"
        )
    best = next(r for r in rows if r["trial"] == leader.number)
    seconds = sum(r["seconds"] for r in rows)
    card = RunCard(
        kind="tune",
        name=asked["model"],
        seed=seed,
        data=split.data.name,
        loaded=split.data.about.get("loaded", {}),
        split=split.describe(),
        settings={**asked, "trials run": len(rows), "minutes run": round(seconds / 60, 3), "table": rows},
        metrics={asked["monitor"]: best["score"], "best trial": best["trial"]},
        seconds=round(time.perf_counter() - began, 3),
        test_opened=split.test_opened,
    )
    if place is not None:
        card.save(place / "card.json")
    kept = None if place is None else place / f"trial-{best['trial']}"
    kept = kept if kept is not None and kept.is_dir() else None
    if kept is not None and best["ended"]:  # here and not after the trial: a search can be cut off in between
        checkpoint.reopen(kept)
    return Tuned({k: best[k] for k in ranges}, best["score"], pd.DataFrame(rows), card, kept)


def _storage(place: Path | None, resume: bool) -> Any:
    """Optuna's journal in ``place``, JSON lines that nothing else writes to; in memory without a folder.

    Its snapshots, which are pickles, exist for Redis alone. What a process that was killed left behind is mended: a
    line without its end, and the lock.
    """
    from optuna.storages import InMemoryStorage, JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if place is None:
        return InMemoryStorage()
    if not resume:
        for old in (place / JOURNAL, *place.glob("trial-*")):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    place.mkdir(parents=True, exist_ok=True)
    path = place / JOURNAL
    (place / f"{JOURNAL}.lock").unlink(missing_ok=True)
    drop_torn_line(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _choices(ranges: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """All settings there are; None where one of them is a range of numbers, or where they are very many."""
    choices: list[Any] = [getattr(one, "choices", None) for one in ranges.values()]
    if None in choices or math.prod(len(c) for c in choices) > 200:
        return None
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*choices)]


def _rest(ranges: Mapping[str, Any], published: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """All further settings, in random order, of a space that has an end."""
    others = [one for one in _choices(ranges) or [] if one not in published]
    return [others[n] for n in generator(seed, "trials").permutation(len(others))]


def _exhausted(study: Any, ranges: Mapping[str, Any]) -> bool:
    """Whether every setting has been tried."""
    every, tried = _choices(ranges), [t.params for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    return every is not None and all(one in tried for one in every)


def _fit_names() -> set[str]:
    return set(inspect.signature(fit).parameters) - set(FIXED)


def _names(build: Callable[..., Any], ranges: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of everything in ``space``, where there are any; refuses names that nobody knows."""
    parameters = inspect.signature(build).parameters
    takes = {n for n, p in list(parameters.items())[1:] if p.kind is not p.VAR_KEYWORD}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not ranges:
        raise DataError("space is empty: name at least one keyword of build, or of fit as 'fit.lr'")
    for name in ranges:
        if name.startswith("fit."):
            if name.removeprefix("fit.") not in _fit_names():
                raise DataError(
                    f"space: fit has no {name!r} to tune; it has {sorted(f'fit.{n}' for n in _fit_names())}"
                )
        elif name not in takes and not anything:
            raise DataError(f"space: build takes no {name!r}; it takes {sorted(takes)}, and fit's begin with 'fit.'")
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    of_fit = inspect.signature(fit).parameters
    return defaults | {f"fit.{n}": of_fit[n].default for n in _fit_names()}


def _published(ranges: dict[str, Any], given: dict[str, Any], start: Mapping[str, Any]) -> dict[str, Any]:
    """The first trial; one that is not in its range is an error."""
    for name in start:
        if name not in ranges:
            raise DataError(f"start: {name!r} is not in space, which has {sorted(ranges)}")
    for name, distribution in ranges.items():
        value = given[name]
        choices = getattr(distribution, "choices", None)
        inside = value in choices if choices is not None else distribution._contains(value)
        if not inside:
            raise DataError(
                f"the published {name}={value!r} lies outside its range {distribution}: widen it, or pass start="
            )
    return {name: given[name] for name in ranges}


def _distribution(name: str, values: Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, list):
        if not values or not all(v is None or isinstance(v, bool | int | float | str) for v in values):
            raise DataError(f"space[{name!r}]: a list holds choices, plain values; let build make objects of them")
        return CategoricalDistribution(values)
    bad = f"space[{name!r}]={values!r}: use [a, b, ...], (low, high) or (low, high, 'log')"
    if not isinstance(values, tuple) or len(values) not in (2, 3) or values[2:] not in ((), ("log",)):
        raise DataError(bad)
    low, high = values[:2]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in (low, high)) or low >= high:
        raise DataError(f"{bad}, numbers with low below high")
    log = len(values) == 3
    if log and low <= 0:
        raise DataError(f"{bad}; a log scale begins above 0")
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    return kind(low, high, log=log)


def _suggest(trial: Any, name: str, distribution: Any) -> Any:
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return trial.suggest_categorical(name, choices)
    whole = type(distribution).__name__ == "IntDistribution"
    ask = trial.suggest_int if whole else trial.suggest_float
    return ask(name, distribution.low, distribution.high, log=distribution.log)


def _unprefixed(chosen: Mapping[str, Any], *, fits: bool) -> dict[str, Any]:
    return {k.removeprefix("fit."): v for k, v in chosen.items() if k.startswith("fit.") == fits}

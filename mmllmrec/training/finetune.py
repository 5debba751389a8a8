"""LoRA fine-tuning from one small saved file: what to train on, which towers, how long.

``mmllmrec finetune CONFIG`` and, for several processes or bf16, the same under ``accelerate launch`` or torchrun.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mmllmrec.data.dataset import load_dataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import SPLITS, Split
from mmllmrec.evaluation.report import evaluate
from mmllmrec.models.hybrid import Hybrid
from mmllmrec.models.unified import PRESETS, Preset, Unified
from mmllmrec.runcard import content_hash, write_json
from mmllmrec.seed import seed_everything
from mmllmrec.training.fit import Run, fit

# what a config holds, and what it is where a key is left out
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"name": "atelier", "path": None, "options": {}},
    "split": {"kind": "cold_items", "options": {}},
    "model": {"preset": "nano"},
    "fit": {},
}
LAUNCHERS = ("cpu2", "bf16", "fsdp")


def default() -> dict[str, Any]:
    """A config with every section, the model's and fit's defaults written out: what ``--init`` saves."""
    model = {"preset": "nano", "rank": PRESETS["nano"].rank, "trainer": "end_to_end"}
    model |= _defaults(Hybrid, ("dim", "id_dropout", "lr_ids")) | _defaults(Unified, ("lr_lora",))
    split = {"kind": "cold_items", "options": _defaults(SPLITS["cold_items"], ("fraction", "seed"))}
    fit_section = {**Unified.fit_defaults, "chunk": None, "stages": {}}
    return {**SECTIONS, "split": split, "model": model, "fit": fit_section, "seed": 0}


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A config from a JSON file, whole: what is left out is as in ``SECTIONS``, with Unified's fit settings.

    Raises ``DataError`` naming the file, and the key that is unknown or holds something else than it should.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file: write one with `mmllmrec finetune --init {path}`")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        return check(given)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def check(given: Any) -> dict[str, Any]:
    """The same config, whole. Raises ``DataError`` naming what is wrong with it."""
    if not isinstance(given, dict):
        raise DataError("a config is a JSON object, as `mmllmrec finetune --init` writes it")
    _known("", given, (*SECTIONS, "seed"))
    seed = given.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise DataError(f"seed={seed!r}: a whole number")
    for section in SECTIONS:
        if not isinstance(given.get(section, {}), dict):
            raise DataError(f"{section}: a JSON object is expected, not {given[section]!r}")
    whole: dict[str, Any] = {k: {**v, **given.get(k, {})} for k, v in SECTIONS.items()} | {"seed": seed}
    preset = whole["model"].get("preset")
    asked = Unified.settings(whole["model"].get("trainer", ""), preset if preset in PRESETS else "nano")
    whole["fit"] = {**asked, **given.get("fit", {})}
    for section in ("data", "split"):
        _known(section, whole[section], SECTIONS[section])
        if not isinstance(whole[section]["options"], dict):
            raise DataError(f"{section}.options: a JSON object is expected")
    kind = whole["split"]["kind"]
    if kind not in SPLITS:
        raise DataError(f"split.kind: unknown split {kind!r}; splits are {sorted(SPLITS)}")
    _known("split.options", whole["split"]["options"], _keywords(SPLITS[kind]))
    if whole["model"]["preset"] not in PRESETS:
        raise DataError(f"model.preset: unknown preset {whole['model']['preset']!r}; presets are {sorted(PRESETS)}")
    _known("model", whole["model"], ("preset", *_towers(), *_options()))
    ours = ("model", "split", "seed", "folder", "resume", "on_epoch", "log_with", "progress")
    _known("fit", whole["fit"], [k for k in inspect.signature(fit).parameters if k not in ours])
    return whole


def finetune(
    config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    resume: bool = True,
    command: str = "",
    progress: bool = True,
) -> Run:
    """Fine-tune a Unified as a config says; the fitted run, in every process.

    The main process writes to ``folder``: ``config.json``, ``fit/`` (checkpoints; a run that was cut off goes on from
    them), ``model/`` (weights, LoRA adapters in PEFT's format), ``report-valid/`` (metrics with intervals) and
    ``card.json``, which names data, split, towers, prompt and ``command``. Raises ``DataError`` for a config that
    ``check`` refuses, and for a folder of another one.
    """
    whole, place = check(dict(config)), Path(folder)
    state = PartialState(cpu=not torch.cuda.is_available())
    key = content_hash(whole)
    old = place / "config.json"
    # read before anyone writes, so that all processes see the same folder
    if old.is_file() and resume and content_hash(check(json.loads(old.read_text(encoding="utf-8")))) != key:
        raise DataError(f"{place} holds a run of another config: pass another folder, or --no-resume")
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(old, whole)
    data = load_dataset(whole["data"]["name"], whole["data"]["path"], **whole["data"]["options"])
    split: Split = SPLITS[whole["split"]["kind"]](data, **whole["split"]["options"])
    seed_everything(whole["seed"])
    model = build(split, **whole["model"])
    run = fit(model, split, seed=whole["seed"], folder=place / "fit", resume=resume, progress=progress, **whole["fit"])
    run.card.settings |= {"config": whole, "command": command, "processes": state.num_processes}
    if state.is_main_process:
        run.model.save_pretrained(place / "model")
        report = evaluate(run, split, on="valid", seed=whole["seed"], folder=place / "report-valid")
        run.card.metrics |= {k: v for k, v in report.card.metrics.items() if k.startswith(f"{run.name} | ")}
        run.card.save(place / "card.json")
    state.wait_for_everyone()
    return run


def build(split: Split, *, preset: str = "nano", **chosen: Any) -> Unified:
    """The model of a config's ``model`` section: a preset, any of its fields replaced (towers, rank, tokens), and
    keywords of ``Unified``."""
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    towers = replace(PRESETS[preset], **{k: v for k, v in chosen.items() if k in _towers()})
    options = {k: v for k, v in chosen.items() if k not in _towers()}
    return Unified.from_preset(towers, data=split.train, catalog=split.catalog, **options)


def launcher(name: str) -> Path:
    """The Accelerate config that ships under ``name``: ``cpu2``, ``bf16`` or ``fsdp``."""
    if name not in LAUNCHERS:
        raise DataError(f"unknown launcher config {name!r}; there are {list(LAUNCHERS)}")
    return Path(__file__).parent / "configs" / f"{name}.yaml"


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return bool(PartialState(cpu=not torch.cuda.is_available()).is_main_process)


def _towers() -> list[str]:
    return [f.name for f in fields(Preset)]


def _options() -> list[str]:
    """Keywords of ``Unified``, those it hands on to ``Hybrid`` and the trainer of ``from_preset`` included."""
    found = [*inspect.signature(Unified.__init__).parameters, *inspect.signature(Hybrid.__init__).parameters, "trainer"]
    ours = ("self", "train", "catalog", "preset", "whiten", "options", "config")
    return [k for k in dict.fromkeys(found) if k not in ours]


def _keywords(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def _defaults(function: Callable[..., Any], names: tuple[str, ...]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {n: parameters[n].default for n in names if n in parameters}


def _known(section: str, given: Mapping[str, Any], keys: Any) -> None:
    unknown = [k for k in given if k not in keys]
    if unknown:
        where = f"{section}.{unknown[0]}" if section else unknown[0]
        raise DataError(f"{where}: unknown key; {section or 'a config'} takes {sorted(keys)}")

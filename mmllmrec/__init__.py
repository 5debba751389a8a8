"""mmllmrec: LLM-augmented multimodal recommendation. The public face; each name is imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmllmrec import fusion, losses, models
    from mmllmrec.data import sampling, splits
    from mmllmrec.data.catalog import Catalog
    from mmllmrec.data.dataset import RecDataset, load_dataset
    from mmllmrec.data.interactions import DataError, Interactions
    from mmllmrec.evaluation.report import Report, evaluate
    from mmllmrec.runcard import RunCard
    from mmllmrec.seed import seed_everything
    from mmllmrec.serving.recommend import recommend
    from mmllmrec.training.fit import Run, fit
    from mmllmrec.training.tune import Tuned, tune

__version__ = "0.1.0"

_WHERE = {
    "seed_everything": "seed",
    "RunCard": "runcard",
    "DataError": "data.interactions",
    "Interactions": "data.interactions",
    "Catalog": "data.catalog",
    "RecDataset": "data.dataset",
    "load_dataset": "data.dataset",
    "evaluate": "evaluation.report",
    "Report": "evaluation.report",
    "recommend": "serving.recommend",
    "fit": "training.fit",
    "Run": "training.fit",
    "tune": "training.tune",
    "Tuned": "training.tune",
}
_MODULES = {
    "splits": "data.splits",
    "sampling": "data.sampling",
    "models": "models",
    "losses": "losses",
    "fusion": "fusion",
}

__all__ = [
    "Catalog",
    "DataError",
    "Interactions",
    "RecDataset",
    "Report",
    "Run",
    "RunCard",
    "Tuned",
    "evaluate",
    "fit",
    "fusion",
    "load_dataset",
    "losses",
    "models",
    "recommend",
    "sampling",
    "seed_everything",
    "splits",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mmllmrec.{_MODULES[name]}")
    if name in _WHERE:
        return getattr(importlib.import_module(f"mmllmrec.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'mmllmrec' has no attribute {name!r}; it has {__all__}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

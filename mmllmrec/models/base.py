"""The contract every recommender keeps.

Legend: B batch, U users, I items, D width.
"""

from __future__ import annotations

import copy
import json
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.evaluation.calibration import lifted
from mmllmrec.features import hub
from mmllmrec.runcard import RunCard, write_atomically


class Recommender(nn.Module):
    """A model of who likes what, built from training events (and, where ``modalities`` says so, from a catalogue).

    A subclass with parameters to train defines ``forward() -> (users (U, D), items (I, D))`` and ``loss(batch)``; one
    in closed form defines ``score(users)`` and has ``trainable = False``. Keyword arguments of the constructor are
    kept in ``self.config`` (plain values) by passing them to ``super().__init__(train, **config)``.
    Models take tensors and modules: they open no files and move no devices.
    """

    cold_offset: Tensor
    trainable: ClassVar[bool] = True
    supports_cold_items: ClassVar[bool] = False
    supports_cold_users: ClassVar[bool] = False
    modalities: tuple[str, ...] = ()
    negatives: int = 1  # sampled negatives a positive; 0 for in-batch losses and closed forms
    loss_name: str = "bpr"  # the loss column of a table

    def __init__(self, train: Interactions, **config: Any):
        super().__init__()
        self.train_data = train
        self.config = config
        self.n_users, self.n_items = train.n_users, train.n_items
        # what an item without a training event gets beside its score (``evaluation.calibration``)
        self.register_buffer("cold_offset", torch.zeros(()))

    @property
    def name(self) -> str:
        """The name in tables."""
        return type(self).__name__

    @property
    def device(self) -> torch.device:
        """Where the parameters are; the CPU for a model without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def provenance(self) -> dict[str, Any]:
        """What besides its configuration decides this model's numbers (hashes of features, towers, prompt), for the
        run card."""
        return {}

    # -- training ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; ``fit`` minimises their sum. Every term has a gradient."""
        raise TypeError(f"{self.name} is computed in closed form: it has no loss to train")

    def begin_epoch(self, rng: np.random.Generator, *, resumed: bool = False) -> None:
        """Called by ``fit`` before the first batch of an epoch: what a model draws or chooses once an epoch, such as a
        view of the graph. ``rng`` depends on fit's seed and the epoch alone. ``resumed``: the run goes on within the
        epoch, with the parameters and persistent buffers it had then. Nothing, by default."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What the optimiser gets: one group of everything trainable, unless a model knows better."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr, "name": "all"}]

    # -- scoring ----------------------------------------------------------------------------------------------------

    def embed(self) -> tuple[Tensor, Tensor]:
        """Users (U, D) and items (I, D) whose inner product is the score: fresh, in eval mode, no gradient; the mode
        the model was in is restored. The items of a catalogue passed to ``with_catalog`` are embedded with it."""
        with self.evaluating():
            users, items = self._lifted(*self())
        return users.detach(), items.detach()

    def _lifted(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings with ``cold_offset`` in them."""
        if not bool(self.cold_offset):
            return users, items
        new = torch.from_numpy(self.train_data.item_counts == 0).to(items.device)
        return lifted(users, items, new, self.cold_offset)

    def score(self, users: np.ndarray | Tensor) -> Tensor:
        """Scores of all items for some users, (B,) -> (B, I)."""
        all_users, items = self.embed()
        return all_users[torch.as_tensor(users, device=all_users.device)] @ items.T

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients inside, the former mode after."""
        was = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was)

    # -- saving -----------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """What is saved: the persistent state, on the CPU, contiguous."""
        return {k: v.detach().cpu().contiguous().clone() for k, v in self.state_dict().items()}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write weights (safetensors), configuration, id maps and training events (JSON, safetensors) to ``folder``.

        The whole folder appears at once: it is written beside and renamed. Load it with ``from_pretrained``.
        """
        return write_atomically(folder, self._write)

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        about = {"format": 1, "class": type(self).__name__, "config": self.config, "modalities": list(self.modalities)}
        (folder / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        ids = {"users": self.train_data.user_ids.ids, "items": self.train_data.item_ids.ids}
        (folder / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        events = {"users": torch.tensor(self.train_data.users), "items": torch.tensor(self.train_data.items)}
        save_file(events, folder / "events.safetensors")
        save_file(self.weights(), folder / "model.safetensors")

    def push_to_hub(self, repo_id: str, *, card: RunCard, private: bool = True, token: str | None = None) -> str:
        """Upload what ``save_pretrained`` writes to ``owner/name`` on the Hugging Face hub; the repository's address.

        ``card`` (of the run, or of a report, whose metrics have intervals) becomes the model card and ``card.json``
        beside the weights: base and revision, data and split hash, prompt hash, metrics, command. The training events
        and the ids of users and items are part of a saved model: the repository is private unless you say otherwise.
        ``adapters.push`` uploads one tower's LoRA without them. Raises ``DataError`` for a ``repo_id`` without owner.
        """
        return hub.upload(repo_id, self.save_pretrained, card=card, base=hub.bases(self), private=private, token=token)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, catalog: Catalog | None = None) -> Recommender:
        """Load what ``save_pretrained`` wrote; ``catalog`` is needed by models that read content.

        Called on ``Recommender`` itself, any saved class of the library is loaded. A class of your own loads what it
        saved when this is called on it: no name in a file is ever imported. Raises ``DataError`` naming the file that
        is missing or does not fit.
        """
        folder = Path(folder)
        about = read_json(folder / "config.json")
        ids, events = read_json(folder / "ids.json"), read_tensors(folder / "events.safetensors")
        try:
            user_ids, item_ids = IdMap(ids["users"], what="user id"), IdMap(ids["items"], what="item id")
            train = Interactions(events["users"].numpy(), events["items"].numpy(), None, user_ids, item_ids)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: ids.json and events.safetensors do not fit each other: {error}") from None
        from mmllmrec import models

        name, known = about.get("class"), sorted(set(models.WHERE) - {"Recommender"})
        own = name == cls.__name__ and cls is not Recommender
        if not own and name not in known:
            raise DataError(
                f"{folder / 'config.json'}: class {name!r} is not one of {known}; "
                "a class of your own is loaded by from_pretrained called on the class itself"
            )
        kind: type[Recommender] = cls if own else getattr(models, str(name))
        if not issubclass(kind, cls):
            raise DataError(
                f"{folder} holds a {kind.__name__}, not a {cls.__name__}: use {kind.__name__}.from_pretrained"
            )
        if about.get("modalities") and catalog is None:
            raise DataError(f"{folder}: a {kind.__name__} reads items' content; pass catalog=")
        if catalog is not None and catalog.item_ids != train.item_ids:
            raise DataError(f"{folder}: the catalogue's item ids are not those the model was trained on")
        try:
            return kind._restore(folder, train, catalog, about)
        except (KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{folder}: config.json and model.safetensors do not fit each other: {error}") from error

    @classmethod
    def _restore(cls, folder: Path, train: Interactions, catalog: Catalog | None, about: dict[str, Any]) -> Recommender:
        extra = {"catalog": catalog} if about.get("modalities") else {}
        model = cls(train, **extra, **about["config"])
        model.load_state_dict(read_tensors(folder / "model.safetensors"))
        return model


class ClosedForm(Recommender):
    """A recommender computed from the training events at once: ``score(users)``, nothing to train, nothing to embed.

    ``history`` (U, I) is what its users are known to have taken; a subclass scores from it. What was computed is not
    saved: it is computed again from the saved events.
    """

    trainable: ClassVar[bool] = False
    negatives: int = 0
    loss_name: str = "-"

    def __init__(self, train: Interactions, **config: Any):
        super().__init__(train, **config)
        self.history = train.csr

    @property
    def embed(self) -> Any:
        """Absent (``hasattr`` says so): these scores are not an inner product of embeddings."""
        raise AttributeError(f"{self.name} has no embeddings; use score(users)")

    def taken(self, users: np.ndarray | Tensor) -> sp.csr_matrix:
        """What users (B,), of any device, are known to have taken: (B, I)."""
        return self.history[torch.as_tensor(users).cpu().numpy()]

    def with_history(self, history: Interactions) -> ClosedForm:
        """The same fitted model seeing other events of its users (k-shot protocols); nothing is computed again."""
        if (history.user_ids, history.item_ids) != (self.train_data.user_ids, self.train_data.item_ids):
            raise DataError(f"{self.name}.with_history: the history's ids are not those of the training events")
        other = copy.copy(self)
        other.history = history.csr
        return other


def arguments(scope: dict[str, Any], *without: str) -> dict[str, Any]:
    """The keyword arguments of a constructor, of its ``locals()`` before anything else is there: what a model passes on
    to ``super().__init__(train, **arguments(locals()))``, and is built again with; ``without`` some."""
    return {k: v for k, v in scope.items() if k not in ("self", "train", "__class__", *without)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors from a safetensors file; ``DataError`` naming the file otherwise."""
    if not path.is_file():
        raise DataError(f"{path} is missing: this is not a folder that save_pretrained wrote")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is not a safetensors file: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``DataError`` naming the file otherwise."""
    if not path.is_file():
        raise DataError(f"{path} is missing: this is not a folder that save_pretrained wrote")
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object: this is not a file that save_pretrained wrote")
    return value

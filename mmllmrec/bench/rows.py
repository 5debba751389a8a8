"""The rows of the questions' tables: how each system is built, what of it is tuned, and on which data.

Legend: I items, D width.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from mmllmrec.bench.run import SOFTMAX
from mmllmrec.data import splits
from mmllmrec.data.atelier.world import Atelier
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.dataset import RecDataset, load_dataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import Split
from mmllmrec.encoders.heads import SHRINK
from mmllmrec.features.table import FeatureTable
from mmllmrec.runcard import RunCard
from mmllmrec.seed import dealt, generator

if TYPE_CHECKING:
    from mmllmrec.models.unified import Preset

DATA = ("atelier", "atelier-b", "movielens-small", "lastfm-2k", "folder")  # the last is one's own
TWIN, TWIN_PRESENT = "Factor-fed twin", "Factor-fed twin, of present content"
COLD_COST = 0.05  # of its ndcg@20 on known items that every system gives for new ones, at least (see ``ask``)
LR, DECAY = (3e-4, 1e-2, "log"), (0.1, 3.0, "log")
HYBRID = {"fit.lr": (1e-3, 1e-2, "log"), "reg_user": (5e-3, 0.1, "log"), "reg_item": (0.5, 8.0, "log")}
# what of each system is searched, the published setting first; everything else, the width of 64 too, stays
SPACES: dict[str, dict[str, Any]] = {
    "BPR": {"fit.lr": LR, "fit.weight_decay": DECAY},
    "LightGCN": {"fit.lr": LR, "fit.weight_decay": DECAY, "layers": [1, 2, 3]},
    "VBPR": {"fit.lr": LR, "fit.weight_decay": DECAY, "feature_dim": [32, 64, 128]},
    "LightGCNContent": {"fit.lr": LR, "fit.weight_decay": DECAY, "layers": [1, 2, 3]},
    "AlphaRec": {"fit.lr": LR, "fit.weight_decay": DECAY, "layers": [1, 2, 3]},
    "CLCRec": {"fit.lr": LR, "fit.weight_decay": DECAY, "weight": [0.1, 0.3, 0.5, 0.7]},
    "DropoutNet": {"fit.lr": LR, "fit.weight_decay": DECAY, "dropout": [0.3, 0.5, 0.7]},
    "ALDI": {"fit.lr": LR, "fit.weight_decay": DECAY, "ranking": [0.3, 0.9]},
}
# recorded tastes may ask for slower steps, and for users and items that lean on content until they have many events:
# both ways are tried first
RECORDED: dict[str, Any] = {"fit.epochs": [20, 40], "id_dropout": [0.1, 0.3, 0.5], "mix": [10.0, 40.0]}
PUBLISHED = {"reg_user": 0.02, "reg_item": 2.0}
LEANING = {"fit.lr": 2e-3, "fit.epochs": 40, "id_dropout": 0.5, "mix": 40.0}
STARTS: dict[str, dict[str, Any]] = {
    "LightGCN": {"layers": 2},
    "VBPR": {"feature_dim": 64},
    "LightGCNContent": {"layers": 2},
    "AlphaRec": {"layers": 2},
    "CLCRec": {"weight": 0.5},
    "DropoutNet": {"dropout": 0.5},
    "ALDI": {"ranking": 0.9},
}
# frozen features of the two-stage rows, by the preset of the towers beside them: the twin is to be as good as it gets
FEATURES = {
    "nano": ["descriptors:64", "descriptors:128", "towers-0:32", "towers-0:48", "towers-1:48", "towers-2:48"],
    "minilm": ["towers-0:64", "towers-3:64", "towers-5:64", "towers-5:128", "descriptors:64", "descriptors:128"],
}


@dataclass(frozen=True)
class Row:
    """A trained line of a table. ``build(split, made, **options)`` makes the model, ``made`` being the runs of the rows
    before it; ``settings`` are keywords of ``fit``. With a ``space`` its settings are searched, first those of
    ``starts``, and kept under ``search``; without one it takes what the search of that name found. Of ``choices``
    (option, values) all are tried at the first start, beyond the budget. ``after`` are rows that it is built from;
    ``about`` is what decides its fit besides settings, split and data."""

    name: str
    build: Callable[..., Any]
    settings: dict[str, Any]
    search: str
    space: dict[str, Any] = field(default_factory=dict)
    starts: tuple[dict[str, Any], ...] = ({},)
    choices: tuple[str, Sequence[Any]] | None = None
    after: tuple[str, ...] = ()
    about: str = ""


@dataclass(frozen=True)
class Setup:
    """A question's data, and how the unified model reads it: preset, trainer of the row called Unified, and whether
    there is a second row with the cached one; ``vision`` is the folder of another image tower than the preset's,
    ``{seed}`` in it the split's."""

    data: RecDataset
    preset: str
    trainer: str
    vision: str = ""
    name: str = ""  # what the data was asked for by
    path: str = ""  # where it lies, of one's own data
    tables: dict[Any, FeatureTable] = field(default_factory=dict, repr=False, compare=False)  # of the split at hand

    @property
    def told(self) -> dict[str, str]:
        """What a command says of the data."""
        return {"data": self.name or self.data.name, "path": self.path}

    @property
    def both(self) -> bool:
        return self.trainer == "end_to_end"

    @property
    def hybrid(self) -> dict[str, Any]:
        """What is searched of the unified model and its twins: ``space`` and ``starts`` of a row."""
        # a choice of one: the settings of a fit say which tower they stand on
        vision = {"vision": self.vision} if self.vision else {}
        space: dict[str, Any] = HYBRID | {name: [value] for name, value in vision.items()}
        published = PUBLISHED | vision
        if isinstance(self.data, Atelier):
            return {"space": space, "starts": (published,)}
        first = {"fit.lr": 5e-3, "fit.epochs": 20, "id_dropout": 0.1, "mix": 10.0}
        return {"space": space | RECORDED, "starts": (published | first, published | LEANING)}

    def towers(self, split: Split, vision: str) -> Any:
        """The preset for a split, with ``vision`` in place of its image tower. Raises ``DataError`` where that tower's
        card says that it was trained on pictures of items that are new in the split."""
        from mmllmrec.models.unified import PRESETS

        preset = PRESETS[self.preset]
        if not vision:
            return preset
        folder = vision.format(seed=split.settings["seed"])
        path = Path(folder) / "card.json"
        card = RunCard.load(path) if path.is_file() else None
        if card is not None and card.split.get("data") == split.data.name:
            seed = card.split["seed"]
            seen = np.ones(len(split.warm_items), dtype=bool)
            for about in (card.split, *card.settings.get("also", ())):
                own = splits.by_name(about["name"], split.data, seed=seed)
                if own.hash != about["hash"]:
                    raise DataError(f"vision={folder!r} was trained on another {about['name']} of {split.data.name}")
                seen &= own.warm_items
            if bool((seen & ~split.warm_items).any()):
                raise DataError(
                    f"vision={folder!r} was trained on {card.split['name']} of seed {seed}, and saw pictures of items "
                    f"that are new in {split.name} of seed {split.settings['seed']}: train one for this split too, "
                    "`python -m mmllmrec.training.posters FOLDER --split ... --also ...`"
                )
        return replace(preset, vision=folder)


def setup(
    data: str | RecDataset,
    path: str | os.PathLike[str] | None = None,
    *,
    end_to_end: bool | None = None,
    whole: bool = True,
    vision: str | os.PathLike[str] | None = None,
) -> Setup:
    """Load a question's data by name, or take it, and choose how Unified reads it.

    ``"folder"`` is one's own, at ``path``. Planted worlds: ``nano``; real data: ``minilm``. Its trainer is the cached
    one unless ``end_to_end=True``; where that is left out, planted worlds are trained end to end if ``whole``. Of
    Last.fm the words (artist names and tags) and ``vggish`` are kept: ``whisper`` is a second account of the same
    sound, and the MiniLM table one of the same words. ``vision``: see ``Setup``. Raises ``DataError`` for another name.
    """
    name = data if isinstance(data, str) else ""
    if isinstance(data, str):
        if data not in DATA:
            raise DataError(f"data={data!r}: the questions are asked of {list(DATA)}, or of a RecDataset")
        # a garbled row is left out and counted in ``about``: a bench must run on the files as they are
        reading = {"bad_rows": "drop"} if data == "movielens-small" else {}
        found = load_dataset(data, path, **reading)
        data = _sound_and_words(found) if data == "lastfm-2k" else found
    planted = isinstance(data, Atelier)
    whole = planted and whole if end_to_end is None else end_to_end
    trainer = "end_to_end" if whole else "cached"
    where = os.fspath(path) if path is not None and name == "folder" else ""
    preset = "nano" if planted else "minilm"
    return Setup(data, preset, trainer, vision=os.fspath(vision or ""), name=name, path=where)


def _sound_and_words(data: RecDataset) -> RecDataset:
    old = data.catalog
    if "vggish" not in old.features:
        raise DataError(f"{data.name}: feature file vggish.npy is missing; it is the sound of this dataset")
    absent = {"vggish": ~old.present("vggish")}
    features = {"vggish": old.features["vggish"]}
    return replace(data, catalog=Catalog(old.dataset, old.item_ids, features=features, absent=absent, name=old.name))


# -- features of the two-stage rows ----------------------------------------------------------------------------------


def two_stage_features(
    split: Split,
    kind: str,
    preset: Preset,
    *,
    modalities: tuple[str, ...] | None = None,
    catalog: Catalog | None = None,
) -> FeatureTable:
    """What a two-stage row reads, extracted beforehand, (I, D_m) a modality, of all modalities or some; of another
    ``catalog`` of the same items where given.

    ``"towers-1:48"``: what the frozen towers of the unified model's ``preset`` say, the words' states taken at language
    layer 1, whitened to 48 columns a part on the items with a training event (``Unified.tower_features``);
    ``"descriptors:64"``: the training-free ones of ``FeatureTable.from_catalog``, whitened to 64. Raises ``DataError``
    for another kind.
    """
    warm, catalog = split.warm_items, catalog or split.catalog
    found = re.fullmatch(r"(?:descriptors|towers-(\d+)):(\d+)", kind)
    if found is None:
        raise DataError(f"features={kind!r}: use 'descriptors:64', or 'towers-0:48' for language layer 0")
    layer, keep = found[1], int(found[2])
    if layer is None:
        table = FeatureTable.from_catalog(catalog, fit_on=warm, modalities=modalities)
        return table.whiten(warm, keep, shrink=SHRINK)
    from mmllmrec.models.unified import Unified

    chosen = replace(preset, enter=int(layer))
    content: dict[str, Any] = {"data": split.train, "catalog": catalog, "modalities": modalities}
    return Unified.from_preset(chosen, **content, whiten=False).tower_features(keep=keep)


def catalog_of(lines: Sequence[str], like: Catalog) -> Catalog:
    """A catalogue of the same items that has one line of text of each, empty for none."""
    columns = {"item_id": like.item_ids.ids, "title": [""] * len(lines), "text": list(lines)}
    return Catalog(datasets.Dataset.from_dict(columns), like.item_ids, name=f"{like.name}, lines")


def shuffled(table: FeatureTable, *, seed: int) -> FeatureTable:
    """Each modality's rows dealt to other items, among those that have it: the same features, no meaning."""
    present = zip(table.tables.items(), table.presence.T, strict=True)
    tables = {m: rows[dealt(here, seed, "shuffled", m)] for (m, rows), here in present}
    return FeatureTable(tables, table.presence)


def randomised(table: FeatureTable, *, seed: int) -> FeatureTable:
    """Standard normal numbers in place of features, of the same widths, where there were some."""
    tables = {m: generator(seed, "randomised", m).normal(size=rows.shape) for m, rows in table.tables.items()}
    return FeatureTable(tables, table.presence)


def tuned_features(split: Split, run: Any) -> FeatureTable:
    """The content vectors of a fitted unified model, standardised, as a table: (I, D)."""
    with run.model.evaluating():
        content = run.model.all_content().cpu().numpy()
    return FeatureTable({"content": content}, (content != 0).any(axis=1)[:, None]).standardise(split.warm_items)


# -- rows --------------------------------------------------------------------------------------------------------------


def vector_row(kind: str, *, loss: str = "", first: str = "") -> Row:
    """A published system under the softmax: ``loss`` where it is not the published one, ``first`` the row whose latents
    it stands on."""
    title = f"{kind} ({loss})" if loss else kind

    def build(split: Split, made: Mapping[str, Any], **options: Any) -> Any:
        from mmllmrec import models

        cls: Any = models.classes()[kind]
        options |= {"loss": loss} if loss else {}
        if first:
            return cls.pretrained(made[first], catalog=split.catalog, **options)
        content = {"catalog": split.catalog} if hasattr(cls, "with_catalog") else {}
        return cls(split.train, **content, **options)

    after = (first,) if first else ()
    return Row(title, build, SOFTMAX, title, space=SPACES[kind], starts=(STARTS.get(kind, {}),), after=after)


REFERENCE = vector_row("LightGCN", loss="softmax")  # what knows IDs alone


def tuned_vbpr_row(unified: str = "Unified") -> Row:
    """VBPR on what the fitted unified model says of items, with VBPR's own tuned settings."""

    def build(split: Split, made: Mapping[str, Any], *, feature_dim: int = 64, **options: Any) -> Any:
        from mmllmrec.models import VBPR

        return VBPR(split.train, features=tuned_features(split, made[unified]), loss="softmax", **options)

    return Row("VBPR (softmax) on tuned features", build, SOFTMAX, search="VBPR (softmax)", after=(unified,))


def two_stage_row(
    asked: Setup,
    name: str = "TwoStage",
    *,
    modalities: tuple[str, ...] | None = None,
    change: Callable[[FeatureTable, Split], FeatureTable] | None = None,
    written: Callable[[Split, Mapping[str, Any]], Sequence[str]] | None = None,
    after: tuple[str, ...] = (),
    about: str = "",
) -> Row:
    """The two-stage twin; under another name with some modalities, with its table changed, or with what is ``written``
    of the items, a line each, as one more modality, and its settings; ``about`` is what decides these lines."""

    def build(
        split: Split, made: Mapping[str, Any], *, features: str = "descriptors:64", vision: str = "", **options: Any
    ) -> Any:
        from mmllmrec.models import TwoStage

        key = split.hash, features, vision, modalities
        if key not in asked.tables:  # every trial of a search reads one of a few
            if any(k[0] != split.hash for k in asked.tables):
                asked.tables.clear()
            asked.tables[key] = two_stage_features(split, features, asked.towers(split, vision), modalities=modalities)
        table = asked.tables[key]
        if written is not None:
            own = catalog_of(written(split, made), split.catalog)
            said = two_stage_features(split, features, asked.towers(split, vision), catalog=own)
            tables = {f"profile's {m}": rows for m, rows in said.tables.items()}
            table = table.beside(FeatureTable(tables, said.presence))
        senses = [m for m in split.catalog.modalities if m not in ("image", "text")]
        early = tuple(m for m in table.modalities if m not in senses) or None  # as the unified model's heads read
        return TwoStage(split.train, features=change(table, split) if change else table, early=early, **options)

    from mmllmrec.models import TwoStage

    tuned = asked.hybrid | {"choices": ("features", FEATURES[asked.preset])} if name == "TwoStage" else {}
    return Row(name, build, TwoStage.fit_defaults, search="TwoStage", after=after, about=about, **tuned)


def twin_row(asked: Setup, *, present: bool = False) -> Row:
    """The two-stage model fed the true factors and their cross: the ceiling of perception on a planted world; with
    ``present`` those alone that an item's content shows, for one whose picture is missing shows none."""

    def build(split: Split, made: Mapping[str, Any], **options: Any) -> Any:
        from mmllmrec.models import TwoStage

        assert isinstance(split.data, Atelier)
        if present:
            shown = split.data.perceptible()
            table = FeatureTable({m: x for m, (x, _) in shown.items()}, np.stack([p for _, p in shown.values()], 1))
        else:
            rows = split.data.factor_features(cross=True)
            table = FeatureTable({"factors": rows}, np.ones((len(rows), 1), dtype=bool))
        table = table.standardise(np.ones(len(table), dtype=bool))
        return TwoStage(split.train, features=table, **options)

    from mmllmrec.models import TwoStage

    if present:
        return Row(TWIN_PRESENT, build, TwoStage.fit_defaults, search=TWIN)
    return Row(TWIN, build, TwoStage.fit_defaults, search=TWIN, **asked.hybrid)


def unified_row(asked: Setup, name: str = "Unified", *, trainer: str = "", searched: bool = False, **fixed: Any) -> Row:
    """The unified model, or under another name a variant of it with ``fixed`` options and its settings; ``trainer``
    other than the setup's, and ``searched`` with a search of its own."""
    chosen = trainer or asked.trainer

    def build(split: Split, made: Mapping[str, Any], *, vision: str = "", **options: Any) -> Any:
        from mmllmrec.models import Unified

        content: dict[str, Any] = {"data": split.train, "catalog": split.catalog, "trainer": chosen}
        return Unified.from_preset(asked.towers(split, vision), **content, **(options | fixed))

    from mmllmrec.models import Unified

    tuned = asked.hybrid if name == "Unified" or searched else {}
    return Row(name, build, Unified.settings(chosen, asked.preset), search=f"Unified, {chosen}", **tuned)

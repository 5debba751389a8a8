"""FeatureTable: what frozen extractors said of each item, a table a modality, and who has what.

Legend: I items, M modalities, D_m width of modality m, F width of all together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash, write_atomically, write_json

if TYPE_CHECKING:
    from mmllmrec.features.extractor import Extractor
    from mmllmrec.features.store import Store


@dataclass(frozen=True)
class Affine:
    """x -> x @ matrix + offset, float32; matrix (D, d), or (D,) for a scale of each column. offset (d,)."""

    matrix: np.ndarray
    offset: np.ndarray

    def __call__(self, table: np.ndarray) -> np.ndarray:
        if table.shape[1] != len(self.matrix):
            raise DataError(f"features have {table.shape[1]} columns; this map was fitted on {len(self.matrix)}")
        turned = table @ self.matrix if self.matrix.ndim == 2 else table * self.matrix
        result: np.ndarray = (turned + self.offset).astype(np.float32)
        return result

    def then(self, other: Affine) -> Affine:
        """This map, and after it another one, as one."""
        if self.matrix.ndim == 2 and other.matrix.ndim == 2:
            matrix = self.matrix @ other.matrix
        elif self.matrix.ndim == 2:
            matrix = self.matrix * other.matrix
        else:
            matrix = (self.matrix[:, None] if other.matrix.ndim == 2 else self.matrix) * other.matrix
        return Affine(matrix, other(self.offset[None])[0])


@dataclass(frozen=True)
class FeatureTable:
    """Frozen item features: ``tables`` {modality: (I, D_m)} float32 and ``presence`` (I, M) bool, columns in order.

    An absent row is zero whatever was given, and no fit looks at it. ``maps`` are the affine maps that led here from
    the extractor's output, and ``reader`` makes that output of another catalogue, so that its features can follow
    (``of``, ``like``); a table that was read from files has no reader. Raises ``DataError`` on shapes that do not fit
    and on a present row that is not finite.

    >>> table = FeatureTable({"image": np.array([[1.0, 2.0], [3.0, 2.0], [9.0, 9.0]])}, np.array([[1], [1], [0]], bool))
    >>> table.standardise(fit_on=np.ones(3, bool)).tables["image"].tolist()
    [[-1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """

    tables: Mapping[str, np.ndarray]
    presence: np.ndarray
    maps: Mapping[str, Affine] = field(default_factory=dict)
    reader: Callable[[Catalog], FeatureTable] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        presence = np.array(self.presence, dtype=bool)
        if presence.ndim != 2 or presence.shape[1] != len(self.tables):
            raise DataError(f"presence has shape {presence.shape}; expected (items, {len(self.tables)} modalities)")
        clean = {}
        for column, (m, table) in enumerate(self.tables.items()):
            here = presence[:, column]
            table = np.asarray(table)
            if table.ndim != 2 or len(table) != len(presence):
                raise DataError(
                    f"features {m!r} have shape {table.shape}; expected ({len(presence)}, D), a row an item"
                )
            table = np.where(here[:, None], table, 0).astype(np.float32)
            bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
            if bad.size:
                raise DataError(f"features {m!r}, row {bad[0]}: NaN or infinite; mend it or mark the row absent")
            table.setflags(write=False)
            clean[m] = table
        presence.setflags(write=False)
        object.__setattr__(self, "tables", clean)
        object.__setattr__(self, "presence", presence)

    @classmethod
    def from_catalog(
        cls, catalog: Catalog, *, fit_on: np.ndarray | None = None, modalities: Sequence[str] | None = None
    ) -> FeatureTable:
        """The features a catalogue brings, or, where it has raw content, those of ``data.descriptors.describe``; of all
        modalities, or of some in the order named.

        ``fit_on`` (I,) bool are the items that a descriptor may fit on (train items); all without. Raises ``DataError``
        for a catalogue without any modality, and for one that is not there.
        """
        asked = catalog.modalities if modalities is None else tuple(modalities)
        if missing := [m for m in asked if m not in catalog.modalities]:
            raise DataError(f"features of {missing} are missing; these are {list(catalog.modalities)}")
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        if any(m in catalog.dataset.column_names for m in asked):
            from mmllmrec.data.descriptors import describe

            found = dict(describe(catalog, fit_on=fit_on, modalities=asked))
        for m in asked:
            if m not in catalog.dataset.column_names:
                found[m] = (catalog.signal(m), catalog.present(m))
        if not found:
            raise DataError(f"{catalog.name}: it has no modality, so there are no features to read")
        order = [m for m in asked if m in found]
        presence = np.stack([found[m][1] for m in order], axis=1)

        def again(other: Catalog) -> FeatureTable:
            return cls.from_catalog(other, fit_on=fit_on, modalities=modalities)

        return cls({m: found[m][0] for m in order}, presence, reader=again)

    @classmethod
    def extracted(
        cls, catalog: Catalog, extractors: Sequence[Extractor], *, store: Store | None = None, batch: int = 64
    ) -> FeatureTable:
        """What frozen towers say of a catalogue's raw content, pooled, a modality an extractor.

        With a ``store``, what it holds is not computed again. Raises ``DataError`` for two extractors of one modality
        and for one whose modality no item has.
        """
        order = [e.modality for e in extractors]
        if not order or len(set(order)) < len(order):
            raise DataError(f"extractors of {order}: give at least one, and no two extractors of one modality")
        found = {}
        for extractor in extractors:
            present = catalog.present(extractor.modality)
            if store is not None:
                table, present = store.extract(extractor, catalog, batch=batch)
            else:
                rows = extractor.extract(catalog, np.flatnonzero(present), batch=batch)
                table = np.zeros((len(catalog), rows.shape[1]), dtype=np.float32)
                table[present] = rows
            found[extractor.modality] = (table, present)
        presence = np.stack([p for _, p in found.values()], axis=1)

        def again(other: Catalog) -> FeatureTable:
            return cls.extracted(other, extractors, store=store, batch=batch)

        return cls({m: t for m, (t, _) in found.items()}, presence, reader=again)

    # -- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.presence)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of the columns of ``presence``."""
        return tuple(self.tables)

    @property
    def widths(self) -> dict[str, int]:
        """D_m of each modality."""
        return {m: t.shape[1] for m, t in self.tables.items()}

    @property
    def hash(self) -> str:
        """Hash of all tables, by modality, and of who has what."""
        return content_hash(*(part for m, t in self.tables.items() for part in (m, t)), self.presence)

    def concatenated(self) -> np.ndarray:
        """All modalities side by side, (I, F) float32; absent ones are zero."""
        return np.concatenate(list(self.tables.values()), axis=1)

    def only(self, modalities: Sequence[str]) -> FeatureTable:
        """Some modalities, in the order named. Raises ``DataError`` for one that is not there."""
        missing = [m for m in modalities if m not in self.tables]
        if missing:
            raise DataError(f"features of {missing} are missing; these are {list(self.modalities)}")
        columns = [self.modalities.index(m) for m in modalities]
        maps, whole = {m: self.maps[m] for m in modalities if m in self.maps}, self.reader
        reader = None if whole is None else lambda catalog: whole(catalog).only(modalities)
        return FeatureTable({m: self.tables[m] for m in modalities}, self.presence[:, columns], maps, reader)

    def beside(self, other: FeatureTable) -> FeatureTable:
        """These modalities and, after them, another table's. Raises ``DataError`` where both have one of a name."""
        twice = [m for m in self.modalities if m in other.tables]
        if twice or len(self) != len(other):
            raise DataError(f"tables of {len(self)} and {len(other)} items, both with {twice}: rename or leave one out")
        presence = np.concatenate([self.presence, other.presence], axis=1)
        first, second = self.reader, other.reader
        both = None if first is None or second is None else lambda catalog: first(catalog).beside(second(catalog))
        return FeatureTable({**self.tables, **other.tables}, presence, {**self.maps, **other.maps}, both)

    # -- maps fitted on train items ---------------------------------------------------------------------------------

    def standardise(self, fit_on: np.ndarray) -> FeatureTable:
        """Each column less its mean over its standard deviation, taken over the present items of ``fit_on`` (I,) bool.
        A constant column becomes zero."""

        def fit(rows: np.ndarray) -> Affine:
            deviation = rows.std(axis=0)
            varies = deviation > 1e-6 * np.maximum(np.abs(rows).max(axis=0), 1e-30)
            scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
            return Affine(scale, -rows.mean(axis=0) * scale)

        return self._fitted(fit, fit_on)

    def whiten(self, fit_on: np.ndarray, dim: int, *, shrink: float = 0.0) -> FeatureTable:
        """PCA whitening to at most ``dim`` columns a modality: uncorrelated, of unit variance on the present items of
        ``fit_on`` (I,) bool, or with ``shrink`` of less, the smaller the variance was.

        x -> (x - mean) V_d diag(lambda + shrink tr/D_m)^-1/2 with the d largest eigenpairs of the covariance (divisor
        n) and its trace tr; directions with less than 1e-6 of the largest variance are left out, so the result may be
        narrower.
        """
        if dim < 1 or shrink < 0:
            raise DataError(f"dim={dim}, shrink={shrink}: keep at least one column, and shrink by 0 or more")

        def fit(rows: np.ndarray) -> Affine:
            mean = rows.mean(axis=0)
            variance, axes = _principal(rows - mean, dim)
            matrix = axes / np.sqrt(np.maximum(variance + shrink * (rows - mean).var(axis=0).mean(), 1e-12))
            return Affine(matrix, -mean @ matrix)

        return self._fitted(fit, fit_on)

    def of(self, catalog: Catalog, *, fit_on: np.ndarray | None = None) -> FeatureTable:
        """The same features of another catalogue: read anew, and through the maps fitted here.

        Without a ``reader`` they are ``from_catalog``'s (``fit_on`` as there). Raises ``DataError`` where these do not
        bring every modality.
        """
        if self.reader is not None:
            return self.reader(catalog).like(self)
        raw = FeatureTable.from_catalog(catalog, fit_on=fit_on)
        unknown = [m for m in self.modalities if m not in raw.tables]
        if unknown:
            raise DataError(
                f"features {unknown} were given and not read from a catalogue, so nothing says what they are in "
                f"{catalog.name}: build a model on that catalogue's features"
            )
        return raw.like(self)

    def like(self, fitted: FeatureTable) -> FeatureTable:
        """These raw features through the maps that made ``fitted``: nothing is fitted again. Raises ``DataError`` when
        a modality is missing or its width is another."""
        missing = [m for m in fitted.modalities if m not in self.tables]
        if missing:
            raise DataError(f"features of {missing} are missing; these are {list(self.modalities)}")
        tables, columns = {}, []
        for m in fitted.modalities:
            table = fitted.maps[m](self.tables[m]) if m in fitted.maps else self.tables[m]
            if table.shape[1] != fitted.widths[m]:
                raise DataError(f"features {m!r} have {table.shape[1]} columns, expected {fitted.widths[m]}")
            tables[m] = table
            columns.append(self.presence[:, self.modalities.index(m)])
        return FeatureTable(tables, np.stack(columns, axis=1), fitted.maps, fitted.reader)

    # -- saving -----------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a safetensors file; ``from_arrays`` reads them."""
        found = {"presence": self.presence, **{f"table.{m}": t for m, t in self.tables.items()}}
        for m, step in self.maps.items():
            found |= {f"matrix.{m}": step.matrix, f"offset.{m}": step.offset}
        return {name: np.ascontiguousarray(array) for name, array in found.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], *, modalities: Sequence[str]) -> FeatureTable:
        """The table that ``arrays`` gave, its modalities in the order named."""
        maps = {m: Affine(arrays[f"matrix.{m}"], arrays[f"offset.{m}"]) for m in modalities if f"matrix.{m}" in arrays}
        return cls({m: arrays[f"table.{m}"] for m in modalities}, arrays["presence"], maps)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``features.safetensors`` and ``features.json`` (modalities, widths, hash) to ``folder``; gives it."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        write_atomically(folder / "features.safetensors", lambda path: save_file(self.arrays(), path))
        about = {"modalities": self.modalities, "widths": self.widths, "items": len(self), "hash": self.hash}
        write_json(folder / "features.json", about)
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FeatureTable:
        """The table that ``save`` wrote. Raises ``DataError`` naming a file that is missing, broken or another's."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
            table = cls.from_arrays(load_file(folder / "features.safetensors"), modalities=about["modalities"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"{folder} holds no feature table as FeatureTable.save writes it: {error!r}") from None
        if table.hash != about.get("hash"):
            raise DataError(f"{folder}: features.safetensors is not the file that features.json was written for")
        return table

    def as_inter_files(
        self, folder: str | os.PathLike[str], *, modalities: Sequence[str] | None = None
    ) -> dict[str, Path]:
        """Write the field's layout: ``<modality>_feat.npy`` (I, D_m) float32 each, row i item i; gives the paths.

        All modalities, or those named. An absent row is zero there, as the layout has no other way to say so;
        ``presence.json`` beside names the absent rows of each file, and ``data.sources.inter_files`` reads it. Raises
        ``DataError`` for a modality that is not in the table.
        """
        chosen = self.modalities if modalities is None else tuple(modalities)
        unknown = [m for m in chosen if m not in self.tables]
        if unknown:
            raise DataError(
                f"modalities={list(chosen)}: {unknown} are not in this table; it has {list(self.modalities)}"
            )
        paths, absent = {}, {}
        for m in chosen:
            name, table = f"{m}_feat", self.tables[m]
            paths[m] = write_atomically(Path(folder) / f"{name}.npy", lambda path, t=table: np.save(path, t))  # type: ignore[misc]
            absent[name] = np.flatnonzero(~self.presence[:, self.modalities.index(m)])
        write_json(Path(folder) / "presence.json", {"items": len(self), "absent": absent})
        return paths

    def _fitted(self, fit: Callable[[np.ndarray], Affine], fit_on: np.ndarray) -> FeatureTable:
        fit_on = np.asarray(fit_on)
        if fit_on.dtype != bool or fit_on.shape != (len(self),):
            raise DataError(
                f"fit_on is {fit_on.dtype} {fit_on.shape}; give a mask of the train items, ({len(self)},) bool"
            )
        tables, maps = {}, {}
        for column, (m, table) in enumerate(self.tables.items()):
            rows = table[self.presence[:, column] & fit_on].astype(np.float64)
            if not len(rows):
                raise DataError(f"no item of fit_on has {m!r}: there is nothing to fit on; leave the modality out")
            step = fit(rows)
            tables[m] = step(table)
            maps[m] = self.maps[m].then(step) if m in self.maps else step
        return FeatureTable(tables, self.presence, maps, self.reader)


def _principal(centred: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest variances (d,) and their directions (D, d) of centred rows (n, D), d <= dim; each direction's largest
    entry is positive, so that the result does not depend on the solver."""
    n, width = centred.shape
    small = centred.T @ centred if width <= n else centred @ centred.T
    size = len(small)
    first = max(size - dim, 0)
    try:
        values, vectors = scipy.linalg.eigh(small / n, subset_by_index=[first, size - 1])
    except scipy.linalg.LinAlgError:  # on some processors it gives up where most values are equal
        values, vectors = (x[..., first:] for x in scipy.linalg.eigh(small / n))
    values, vectors = values[::-1], vectors[:, ::-1]
    keep = max(int((values > 1e-6 * max(values[0], 1e-12)).sum()), 1)
    values, vectors = values[:keep], vectors[:, :keep]
    if width > n:  # from the items' side to the columns' side
        vectors = centred.T @ vectors / np.sqrt(n * np.maximum(values, 1e-12))
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(keep)]
    return values, vectors * np.where(largest < 0, -1.0, 1.0)

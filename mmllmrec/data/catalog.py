"""Catalog: what each item looks, reads, sounds and smells like, one row an item, and what of it is absent.

Legend: I items, M modalities, S pixels a side.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from mmllmrec.data.interactions import DataError, IdMap
from mmllmrec.runcard import content_hash
from mmllmrec.seed import dealt, generator

RAW = ("image", "text", "audio", "sensor")  # the order of modalities everywhere
MAX_PIXELS = 50_000_000  # a larger picture is refused before it is decoded


class Catalog:
    """Items' content on a ``datasets.Dataset``, aligned to the item id map, with presence masks.

    Columns read: ``item_id`` and ``title`` (str, for people), and of the modalities those that exist: ``image``
    (``datasets.Image(decode=False)``: bytes or a path), ``text`` (str), ``audio`` and ``sensor`` (lists of float).
    Other columns ride along. None, an empty text and an empty list are *absent*: never a zero vector, never a mean.
    The title is shown to people; models read it as part of ``text``, so only where ``text`` is present.

    ``features`` are tables computed elsewhere, {modality: (I, D)} float32, for sources that ship no raw content;
    ``absent`` names their missing rows, {modality: (I,) bool}.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        item_ids: IdMap,
        *,
        features: Mapping[str, np.ndarray] | None = None,
        absent: Mapping[str, np.ndarray] | None = None,
        name: str = "catalog",
    ):
        if "item_id" not in dataset.column_names:
            raise DataError(f"{name}: column 'item_id' is missing; it has {dataset.column_names}")
        if [str(i) for i in dataset["item_id"]] != item_ids.ids:
            raise DataError(f"{name}: its rows are not the {len(item_ids)} items of the id map, in that order")
        self.dataset, self.item_ids, self.name = dataset, item_ids, name
        self.features = {m: _checked(m, t, len(item_ids)) for m, t in (features or {}).items()}
        self._absent = {m: np.asarray(a, dtype=bool) for m, a in (absent or {}).items()}
        raw = [m for m in RAW if m in dataset.column_names]
        self.modalities: tuple[str, ...] = (*raw, *(m for m in self.features if m not in raw))
        self._rows: dict[str, np.ndarray] = {}  # modality -> the row that an item's content is read from (controls)
        self._pixels: dict[int, np.ndarray] = {}
        self._noise: dict[str, int] = {}
        self._blurred: dict[str, tuple[int, np.ndarray]] = {}  # modality -> seed and deviations of added noise
        self._holes: dict[str, tuple[int, float]] = {}  # modality -> seed and share of an item's channels that are gone

    def __len__(self) -> int:
        return len(self.item_ids)

    def __repr__(self) -> str:
        shares = ", ".join(f"{m} {self.present(m).mean():.0%}" for m in self.modalities)
        return f"Catalog({len(self):,} items; {shares})"

    # -- presence ---------------------------------------------------------------------------------------------------

    @cached_property
    def _raw_presence(self) -> dict[str, np.ndarray]:
        found = {}
        for m in self.modalities:
            if m in self.dataset.column_names:
                if m in ("audio", "sensor"):
                    found[m] = self._lengths(m) > 0
                    continue
                column = self.dataset[m]
                if m == "text":
                    here = [bool(v and v.strip()) for v in column]
                else:
                    here = [v is not None and bool(v.get("bytes") or v.get("path")) for v in column]
                found[m] = np.array(here, dtype=bool)
            else:
                found[m] = np.ones(len(self), dtype=bool)
        return found

    def present(self, modality: str) -> np.ndarray:
        """Which items have this modality, (I,) bool; all False for one the catalogue does not know."""
        if modality not in self.modalities:
            return np.zeros(len(self), dtype=bool)
        here = self._raw_presence[modality].copy()
        if modality in self._rows:
            here = here[self._rows[modality]]
        if modality in self._absent:
            here &= ~self._absent[modality]
        return here

    @property
    def presence(self) -> np.ndarray:
        """(I, M) bool, columns in the order of ``modalities``."""
        return (
            np.stack([self.present(m) for m in self.modalities], axis=1)
            if self.modalities
            else np.zeros((len(self), 0), bool)
        )

    def _list_column(self, modality: str) -> pa.ListArray:
        return self.dataset.with_format("arrow")[:].column(modality).combine_chunks()

    def _lengths(self, modality: str) -> np.ndarray:
        """Number of values an item has, 0 where absent, (I,) int64."""
        lengths = pc.fill_null(pc.list_value_length(self._list_column(modality)), 0)
        return lengths.to_numpy(zero_copy_only=False).astype(np.int64)

    # -- content ----------------------------------------------------------------------------------------------------

    @cached_property
    def titles(self) -> list[str]:
        """What to show to people; the external id where there is no title."""
        if "title" not in self.dataset.column_names:
            return self.item_ids.ids
        return [t or i for t, i in zip(self.dataset["title"], self.item_ids.ids, strict=True)]

    def _row(self, modality: str, item: int) -> int:
        return int(self._rows[modality][item]) if modality in self._rows else int(item)

    def words(self) -> list[dict[str, str]]:
        """The text fields models read, {'title', 'text'} an item; both empty where text is absent."""
        if "text" not in self.dataset.column_names:
            return [{"title": "", "text": ""} for _ in range(len(self))]
        texts, titles, present = self.dataset["text"], self.titles, self.present("text")
        rows = self._rows.get("text", np.arange(len(self)))
        found = [
            {"title": titles[r], "text": texts[r]} if here else {"title": "", "text": ""}
            for r, here in zip(rows, present, strict=True)
        ]
        if "text" in self._blurred:
            seed = self._blurred["text"][0]
            found = [
                {k: _half(v, generator(seed, "noised", k, item)) for k, v in fields.items()}
                for item, fields in enumerate(found)
            ]
        return found

    def image(self, item: int) -> Image.Image | None:
        """The decoded RGB picture of an item, or None where it is absent.

        Raises ``DataError`` naming the file for an unreadable, truncated, empty or too large picture.
        """
        if not self.present("image")[item]:
            return None
        cell = self.dataset[self._row("image", item)]["image"]
        return open_picture(
            cell.get("bytes") or cell["path"], what=cell.get("path") or f"picture of {self.item_ids[item]!r}"
        )

    def picture(self, item: int) -> bytes | None:
        """An item's picture as it is stored, encoded, or None where it is absent; with noise where it was ``noised``,
        and nothing else where it was ``randomised``."""
        if not self.present("image")[item]:
            return None
        if "image" in self._noise:
            return _png(generator(self._noise["image"], "image", item).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        if "image" in self._blurred:
            picture = self.image(item)
            assert picture is not None
            seed, spread = self._blurred["image"]
            return _png(_hazed(np.asarray(picture), spread[:, 0, 0], generator(seed, "noised image", item)))
        cell = self.dataset[self._row("image", item)]["image"]
        data: bytes = cell.get("bytes") or Path(cell["path"]).read_bytes()
        return data

    def pixels(self, size: int = 64) -> np.ndarray:
        """All pictures, cropped to a square and resized: (I, 3, S, S) uint8. Absent ones are zero: read ``present``."""
        if size not in self._pixels:
            table = np.zeros((len(self), 3, size, size), dtype=np.uint8)
            for item in np.flatnonzero(self.present("image")):
                picture = self.image(int(item))
                assert picture is not None
                fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BILINEAR)
                table[item] = np.asarray(fitted).transpose(2, 0, 1)
            if "image" in self._noise:
                table = generator(self._noise["image"], "image").integers(0, 256, table.shape, dtype=np.uint8)
            if "image" in self._blurred:
                seed, spread = self._blurred["image"]
                for item in np.flatnonzero(self.present("image")):
                    table[item] = _hazed(table[item], spread, generator(seed, "noised image", item))
            table.setflags(write=False)
            self._pixels[size] = table
        return self._pixels[size]

    def signal(self, modality: str) -> np.ndarray:
        """Sound or sensor readings, (I, T) float32; absent rows are zero: read ``present``. A channel that was taken
        away (``without_channels``) is NaN."""
        if modality in self.features and modality not in self.dataset.column_names:
            rows = self._rows.get(modality)
            return self._worn(modality, self.features[modality] if rows is None else self.features[modality][rows])
        present, lengths = self.present(modality), self._lengths(modality)
        rows = self._rows.get(modality, np.arange(len(self)))
        width = int(lengths.max(initial=0))
        here = np.flatnonzero(lengths)
        odd = here[lengths[here] != width]
        if odd.size:
            raise DataError(
                f"{self.name}: {modality} of item {self.item_ids[odd[0]]!r} has {lengths[odd[0]]} values, not {width}"
            )
        values = self._list_column(modality).flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        table = np.zeros((len(self), width), dtype=np.float32)
        table[here] = values
        table = table[rows]
        table[~present] = 0.0
        if modality in self._noise:
            table = generator(self._noise[modality], modality).normal(size=table.shape).astype(np.float32)
        return self._worn(modality, table)

    def _worn(self, modality: str, table: np.ndarray) -> np.ndarray:
        """A signal's table (I, T) as ``noised`` and ``without_channels`` leave it."""
        present = self.present(modality)[:, None]
        if modality in self._blurred:
            seed, spread = self._blurred[modality]
            noise = generator(seed, "noised", modality).normal(size=table.shape) * spread
            table = np.where(present, table + noise, table).astype(np.float32)
        if modality in self._holes:
            seed, share = self._holes[modality]
            place = generator(seed, "channels", modality).random(table.shape).argsort(axis=1).argsort(axis=1)
            table = np.where(present & (place < round(share * table.shape[1])), np.float32(np.nan), table)
        return table

    @cached_property
    def hash(self) -> str:
        """Hash of all content, pictures included (files by their bytes)."""
        parts: list[Any] = [self.item_ids.ids, self.presence, self.titles, self.words(), sorted(self._noise.items())]
        if "image" in self.modalities:
            digest = hashlib.sha256()
            for cell in self.dataset["image"]:
                if cell is not None:
                    digest.update(cell.get("bytes") or Path(cell["path"]).read_bytes())
            parts += [digest.digest(), self._rows.get("image", np.zeros(0))]
            parts += list(self._blurred.get("image", ()))
        parts += [self.signal(m) for m in self.modalities if m not in ("image", "text")]
        return content_hash(*parts)

    def joined(self, other: Catalog) -> Catalog:
        """The items of this catalogue and, after them, those of another one that shares none.

        A raw modality that only one of them has is absent in the other's items. Raises ``DataError`` for a shared item
        id, and for tables of features that only one has or that are of other widths.
        """
        if any(c._rows or c._noise or c._blurred or c._holes for c in (self, other)):
            raise DataError("a shuffled, noised or randomised catalogue cannot be joined: join first, then change it")
        widths = [{m: t.shape[1] for m, t in c.features.items()} for c in (self, other)]
        if widths[0] != widths[1]:
            raise DataError(f"catalogues with features {widths[0]} and {widths[1]} cannot be joined")
        rows = datasets.concatenate_datasets([self.dataset, other.dataset])
        ids = IdMap([*self.item_ids.ids, *other.item_ids.ids], what="item id")
        features = {m: np.concatenate([t, other.features[m]]) for m, t in self.features.items()}
        absent = {
            m: ~np.concatenate([self.present(m), other.present(m)]) for m in (*self.modalities, *other.modalities)
        }
        return Catalog(rows, ids, features=features, absent=absent, name=self.name)

    def with_features(self, name: str, table: np.ndarray, *, absent: np.ndarray | None = None) -> Catalog:
        """This catalogue with one more modality ``name``, features computed elsewhere: (I, D); ``absent`` (I,) bool are
        the items without. Raises ``DataError`` for a modality that is there already."""
        if name in self.modalities or name in self.dataset.column_names:
            raise DataError(f"modality {name!r} is in this catalogue already: give the new one another name")
        return self._copy(name, features={name: table}, absent={} if absent is None else {name: absent})

    # -- controls ---------------------------------------------------------------------------------------------------

    def _copy(
        self,
        changed: str,
        *,
        features: Mapping[str, np.ndarray] | None = None,
        absent: Mapping[str, np.ndarray] | None = None,
    ) -> Catalog:
        """A copy of which one modality is about to be changed, or with ``features`` (and who is ``absent``) of one
        more; pictures that are not changed are not decoded again."""
        features, absent = {**self.features, **(features or {})}, {**self._absent, **(absent or {})}
        other = Catalog(self.dataset, self.item_ids, features=features, absent=absent, name=self.name)
        other._rows, other._noise = dict(self._rows), dict(self._noise)
        other._blurred, other._holes = dict(self._blurred), dict(self._holes)
        if other.modalities == self.modalities:
            other.__dict__["_raw_presence"] = self._raw_presence
        if changed != "image":
            other._pixels = dict(self._pixels)
        return other

    def _known(self, modality: str) -> None:
        if modality not in self.modalities:
            raise DataError(f"modality {modality!r} is not in this catalogue; it has {list(self.modalities)}")

    def without(self, modality: str) -> Catalog:
        """This catalogue with one modality absent everywhere (a knock-out)."""
        self._known(modality)
        other = self._copy(modality)
        other._absent[modality] = np.ones(len(self), dtype=bool)
        return other

    def shuffled(self, modality: str, *, seed: int) -> Catalog:
        """One modality's content dealt to other items, among those that have it: same contents, no meaning."""
        self._known(modality)
        other = self._copy(modality)
        rows = self._rows.get(modality, np.arange(len(self)))
        other._rows[modality] = rows[dealt(self.present(modality), seed, "shuffled", modality)]
        return other

    def randomised(self, modality: str, *, seed: int) -> Catalog:
        """One modality's content replaced by noise where it is present (text: by the words of other items, drawn
        with replacement)."""
        self._known(modality)
        other = self._copy(modality)
        if modality == "text":
            here = np.flatnonzero(self.present(modality))
            rows = np.arange(len(self))
            rows[here] = generator(seed, "randomised", modality).choice(here, size=len(here))
            other._rows[modality] = rows
        elif modality in self.features:
            table = generator(seed, "randomised", modality).normal(size=self.features[modality].shape)
            other.features = {**self.features, modality: table.astype(np.float32)}
        else:
            other._noise[modality] = seed
        return other

    def noised(self, modality: str, *, seed: int) -> Catalog:
        """One modality made hard to perceive, not gone: gaussian noise of one standard deviation on pixels (a colour's,
        clipped to 0..255), sound (one for all) and readings or features (a column's), over the items that have it; of a
        text's words and a title's each time half, drawn at random, are left out."""
        self._known(modality)
        other = self._copy(modality)
        here = self.present(modality)
        if modality == "image":
            colours = self.pixels(64)[here].astype(np.float32).transpose(1, 0, 2, 3).reshape(3, -1)
            spread = colours.std(axis=1)[:, None, None]
        elif modality == "text":
            spread = np.zeros(0)
        else:
            rows = self.signal(modality)[here]
            spread = np.nanstd(rows) if modality == "audio" else np.nanstd(rows, axis=0)
        other._blurred[modality] = (seed, np.asarray(spread, dtype=np.float32))
        return other

    def thinned(self, share: float, *, seed: int) -> Catalog:
        """A ``share`` of the items, 0 to 1, without one modality more: which, drawn among those each has.

        One order of the items and one choice an item are drawn from ``seed``: what is gone at a smaller share is gone
        at a larger one too. Raises ``DataError`` for a share outside 0..1.
        """
        _share(share)
        rng = generator(seed, "thinned")
        order, luck = rng.permutation(len(self)), rng.random(self.presence.shape)
        chosen = np.where(self.presence, luck, -1.0).argmax(axis=1) if self.modalities else np.zeros(len(self), int)
        hit = np.zeros(len(self), dtype=bool)
        hit[order[: round(share * len(self))]] = True
        other = self._copy("image")
        for column, modality in enumerate(self.modalities):
            other._absent[modality] = ~self.present(modality) | (hit & (chosen == column))
        return other

    def without_channels(self, modality: str, share: float, *, seed: int) -> Catalog:
        """A ``share`` of each item's channels of a sensor missing (NaN in ``signal``), drawn an item; a larger share
        takes the same ones and more. Raises ``DataError`` for a modality that is not the catalogue's raw sensor, and
        for a share outside 0..1."""
        _share(share)
        self._known(modality)
        if modality != "sensor" or modality not in self.dataset.column_names:
            raise DataError(f"without_channels({modality!r}): only a raw 'sensor' has channels that can be missing")
        other = self._copy(modality)
        other._holes[modality] = (seed, float(share))
        return other


def _share(share: float) -> None:
    if not 0 <= share <= 1:
        raise DataError(f"share={share}: a share, from 0 to 1")


def _half(text: str, rng: np.random.Generator) -> str:
    """A text with half of its words, rounded down, left out; the others in their order."""
    words = text.split()
    kept = np.sort(rng.permutation(len(words))[: len(words) - len(words) // 2])
    return " ".join(words[n] for n in kept)


def _hazed(pixels: np.ndarray, spread: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels with gaussian noise of these deviations, (..., ) uint8."""
    return np.clip(pixels + rng.normal(size=pixels.shape) * spread, 0, 255).round().astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def open_picture(source: bytes | str | Path, *, what: str) -> Image.Image:
    """Decode one picture to RGB. Raises ``DataError`` naming ``what`` when it is empty, broken or over 50 Mpx."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise DataError(f"{what}: the file is empty; replace it, or remove it so that the picture counts as absent")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise DataError(
                        f"{what}: {picture.width} x {picture.height} pixels is over "
                        f"the limit of {MAX_PIXELS:,}; shrink it first"
                    )
                return picture.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{what}: too many pixels (limit {MAX_PIXELS:,}); shrink it first ({error})") from None
    except Exception as error:
        raise DataError(
            f"{what}: not a readable picture ({error}); replace it, or remove it so that it counts as absent"
        ) from None


def _checked(modality: str, table: np.ndarray, rows: int) -> np.ndarray:
    table = np.asarray(table, dtype=np.float32)
    if table.ndim != 2 or len(table) != rows:
        raise DataError(f"features {modality!r} have shape {table.shape}; expected ({rows}, D), one row an item")
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if bad.size:
        raise DataError(f"features {modality!r}, row {bad[0]}: NaN or infinite; mend it or mark the row absent")
    return table

"""Descriptors: what can be said of raw content without training a model. For floors and for the classical baselines.

Legend: I items, D width of a descriptor.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from mmllmrec.data.catalog import Catalog

WORDS = 512  # hashed word buckets
BINS = (12, 4, 4)  # hue, saturation, value


def describe(
    catalog: Catalog, *, fit_on: np.ndarray | None = None, modalities: Sequence[str] | None = None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A table and its presence for each modality with raw content, or some: {modality: ((I, D) float32, (I,) bool)}.

    image: an HSV histogram beside a thumbnail of 8 x 8 greys and edge strengths; text: TF-IDF of hashed lower-case
    words, L2-normalised, document frequencies counted on ``fit_on`` (I,) bool (all items without); audio: log energies
    of 32 frequency bands; sensor: its readings. Widths do not depend on the catalogue, so a changed catalogue's table
    can stand in for the original's. Absent rows are zero.
    """
    makers = {"image": _image, "text": _text, "audio": _audio, "sensor": _sensor}
    fit_on = np.ones(len(catalog), dtype=bool) if fit_on is None else fit_on
    found = {}
    for modality, make in makers.items():
        if modality in catalog.dataset.column_names and (modalities is None or modality in modalities):
            present = catalog.present(modality)
            table = make(catalog, fit_on & present).astype(np.float32)
            table[~present] = 0.0
            found[modality] = (table, present)
    return found


def _image(catalog: Catalog, fit_on: np.ndarray) -> np.ndarray:
    pixels = catalog.pixels(32).astype(np.float32) / 255
    value, low = pixels.max(1), pixels.min(1)
    spread = value - low
    r, g, b = pixels[:, 0], pixels[:, 1], pixels[:, 2]
    safe = np.where(spread > 0, spread, 1)
    hue = np.where(value == r, ((g - b) / safe) % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)) / 6
    saturation = np.where(value > 0, spread / np.where(value > 0, value, 1), 0)
    cells = np.zeros(hue.shape, dtype=np.int64)
    for channel, bins in zip((hue, saturation, value), BINS, strict=True):
        cells = cells * bins + np.minimum((channel * bins).astype(np.int64), bins - 1)
    count = int(np.prod(BINS))
    flat = (cells.reshape(len(cells), -1) + count * np.arange(len(cells))[:, None]).ravel()
    histogram = np.bincount(flat, minlength=count * len(cells)).reshape(len(cells), count) / cells[0].size
    grey = pixels.mean(1)
    edges = np.abs(np.diff(grey, axis=2, append=grey[:, :, -1:])) + np.abs(np.diff(grey, axis=1, append=grey[:, -1:]))
    thumbs = [x.reshape(len(x), 8, 4, 8, 4).mean((2, 4)).reshape(len(x), -1) for x in (grey, edges)]
    return np.concatenate([np.sqrt(histogram), *thumbs], axis=1)


def _text(catalog: Catalog, fit_on: np.ndarray) -> np.ndarray:
    table = np.zeros((len(catalog), WORDS), dtype=np.float32)
    for item, fields in enumerate(catalog.words()):
        for word in re.findall(r"\w+", f"{fields['title']} {fields['text']}".lower()):
            table[item, zlib.crc32(word.encode()) % WORDS] += 1
    known = table[fit_on] > 0
    weight = np.log((1 + len(known)) / (1 + known.sum(0))) + 1
    table = np.log1p(table) * weight
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)


def _audio(catalog: Catalog, fit_on: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.rfft(catalog.signal("audio"), axis=1)) ** 2
    # bands of equal width on a logarithmic axis, none narrower than one bin
    edges = np.unique(np.geomspace(4, power.shape[1], 33).astype(int))
    bands = np.add.reduceat(power[:, : edges[-1]], edges[:-1], axis=1)
    return np.log(bands + 1e-6)


def _sensor(catalog: Catalog, fit_on: np.ndarray) -> np.ndarray:
    return catalog.signal("sensor")

"""FeatureTable: what frozen extractors said of each item, a table a modality, and who has what.

Legend: I items, M modalities, D_m width of modality m, F width of all together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mmllmrec.data.interactions import DataError


@dataclass(frozen=True)
class Affine:
    """x -> (x - shift) @ matrix; shift (D,), matrix (D, d), float32."""

    shift: np.ndarray
    matrix: np.ndarray

    def __call__(self, table: np.ndarray) -> np.ndarray:
        result: np.ndarray = (table - self.shift) @ self.matrix
        return result

    def then(self, other: Affine) -> Affine:
        """This map and after it another one, as one."""
        # (x - s) M - t = (x - s - t M^+) M has no solution in general, so the later shift is carried back only where
        # it is zero; fits on already centred tables give a shift of rounding size, kept exact by an extra column
        raise_if = np.abs(other.shift).max(initial=0.0)
        if raise_if > 1e-3:
            raise DataError("the second map shifts a centred table: fit both on the same items")
        return Affine(self.shift, self.matrix @ other.matrix)


@dataclass(frozen=True)
class FeatureTable:
    """Frozen features: ``tables`` {modality: (I, D_m) float32} and ``presence`` (I, M) bool, columns in their order.

    An absent row is zero whatever was given, and no fit looks at it. ``maps`` are the affine maps that led here from
    the extractor's output, so that another catalogue's features can follow (``like``). Raises ``DataError`` on shapes
    that do not fit and on values of present rows that are not finite.
    """

    tables: Mapping[str, np.ndarray]
    presence: np.ndarray
    maps: Mapping[str, tuple[Affine, ...]] = field(default_factory=dict)

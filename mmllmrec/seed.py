"""Random numbers: one call that seeds everything, and named streams that do not disturb one another."""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices). Call it before anything is built: weights are drawn at building."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def stream(seed: int, *names: object) -> np.random.SeedSequence:
    """The seed of a named stream: the same (seed, names) gives the same numbers, other names independent ones."""
    return np.random.SeedSequence([seed % 2**32, *(zlib.crc32(str(name).encode()) for name in names)])


def generator(seed: int, *names: object) -> np.random.Generator:
    """A NumPy generator for the stream ``names`` of ``seed``.

    >>> float(generator(0, "a").random()) == float(generator(0, "a").random())
    True
    >>> float(generator(0, "a").random()) == float(generator(0, "b").random())
    False
    """
    return np.random.default_rng(stream(seed, *names))


def dealt(here: np.ndarray, seed: int, *names: object) -> np.ndarray:
    """Whose content each of N reads, (N,), when that of those ``here`` (N,) bool is dealt among them; the others keep
    theirs. Drawn from the stream ``names`` of ``seed``.

    >>> sorted(dealt(np.array([True, False, True, True]), 0, "a").tolist())
    [0, 1, 2, 3]
    """
    rows, some = np.arange(len(here)), np.flatnonzero(here)
    rows[some] = generator(seed, *names).permutation(some)
    return rows


def torch_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU PyTorch generator for the stream ``names`` of ``seed``."""
    import torch

    return torch.Generator().manual_seed(int(stream(seed, *names).generate_state(1, np.uint64)[0] >> np.uint64(1)))

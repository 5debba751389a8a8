"""What the planted worlds' items sound and smell like. Legend: I items, T samples, C channels."""

from __future__ import annotations

import numpy as np

RATE = 4000  # samples a second; the chime lasts one second
CHANNELS = 16
CHIMES = (392.0, 523.25, 659.25, 880.0)  # hertz
SCENTS = 4


def chimes(levels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A struck bell an item: (I,) levels -> (I, T) float32. Strength, decay, phase and hiss vary and mean nothing."""
    n = len(levels)
    t = np.arange(RATE, dtype=np.float32) / RATE
    pitch = np.array(CHIMES)[levels] * rng.uniform(0.985, 1.015, n)
    decay, phase, strength = rng.uniform(3, 6, n), rng.uniform(0, 2 * np.pi, n), rng.uniform(0.5, 0.9, n)
    angle = 2 * np.pi * pitch[:, None] * t + phase[:, None]
    wave = (np.sin(angle) + 0.4 * np.sin(2.01 * angle)) * np.exp(-decay[:, None] * t) * strength[:, None]
    return (wave + 0.02 * rng.normal(size=wave.shape)).astype(np.float32)


def scents(levels: np.ndarray, rng: np.random.Generator, *, nose: int) -> np.ndarray:
    """The answer of a 16-channel electronic nose: (I,) levels -> (I, C) float32 in [0, 1]. Each scent has its own
    signature (drawn from the seed ``nose``, a world's own); concentration and noise vary."""
    signature = np.random.default_rng(nose).uniform(0.1, 1.0, (SCENTS, CHANNELS))
    strength = rng.uniform(0.6, 1.0, (len(levels), 1))
    reading = signature[levels] * strength + 0.05 * rng.normal(size=(len(levels), CHANNELS))
    return np.clip(reading, 0, 1).astype(np.float32)

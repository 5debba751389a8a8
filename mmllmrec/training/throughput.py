"""How fast the backbone encodes and trains, beside the products of matrices it cannot do without.

Legend: C items of a batch, N size of the measured matrix product.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch
from mmllmrec.models.unified import Unified
from mmllmrec.runcard import RunCard
from mmllmrec.seed import generator, seed_everything

BACKBONES: dict[str, tuple[str, str]] = {
    "nano, end to end": ("nano", "end_to_end"),
    "nano, cached": ("nano", "cached"),
    "minilm, cached": ("minilm", "cached"),
}
N = 1024
SECONDS, ITEMS, FLOPS, RATE, FLOOR = "seconds", "items per second", "MFLOP an item", "GFLOP/s", "over the floor"


def throughput(
    *,
    item_batch: int = 128,
    world: dict[str, int] | None = None,
    backbones: Sequence[str] = tuple(BACKBONES),
    repeats: int = 5,
    threads: int = 1,
    folder: str | os.PathLike[str] | None = None,
) -> pd.DataFrame:
    """Items encoded and trained per second, beside the machine's floor; a row a backbone and what it does.

    The items are ``item_batch`` of Atelier's (``world``: other ``n_items``, ``n_users``, ``n_events``), with all their
    events. *encode* is ``Unified.content`` without gradients, *train* a step as ``fit`` takes it: the loss of these
    events, its backward, clipping, AdamW. Times are medians of ``repeats`` after one to warm up, on ``threads``. The
    floor is the floating-point operations of all products of matrices and convolutions in that work (``flops``; a
    multiplication and an addition are two), over the rate of a float32 product of two 1024 x 1024 matrices (GFLOP/s),
    timed in turn with the work, on the same threads; the last column is our time over it. ``folder`` gets ``card.json``
    and ``table.txt``. Raises ``DataError`` for an unknown backbone, for ``repeats`` or ``threads`` below 1, and for
    fewer items with events than ``item_batch``.
    """
    unknown = [b for b in backbones if b not in BACKBONES]
    if unknown:
        raise DataError(f"unknown backbone {unknown[0]!r}; backbones are {list(BACKBONES)}")
    if repeats < 1 or threads < 1:
        raise DataError(f"repeats={repeats}, threads={threads}: at least 1 of each")
    began, load = time.perf_counter(), os.getloadavg()[0]
    planted = atelier(**(world or {}))  # type: ignore[arg-type]
    data = planted.interactions
    batch = _batch(data, item_batch)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with _threads(threads):
        for name in backbones:
            preset, trainer = BACKBONES[name]
            seed_everything(0)
            model = Unified.from_preset(preset, data=data, catalog=planted.catalog, trainer=trainer)
            for what, work in _works(model, batch).items():
                found[name, what] = _measured(work, item_batch, repeats)
    columns = [SECONDS, ITEMS, FLOPS, RATE, FLOOR]
    lines = [[*where, *(one[c] for c in columns)] for where, one in found.items()]
    frame = pd.DataFrame(lines, columns=["backbone", "work", *columns])
    if folder is not None:
        card = RunCard(
            kind="bench",
            name="backbone",
            seed=0,
            data=f"{planted.name}: {item_batch} of {data.n_items:,} items, {len(batch):,} events of theirs",
            model={b: dict(zip(("preset", "trainer"), BACKBONES[b], strict=True)) for b in backbones},
            settings={"item_batch": item_batch, "repeats": repeats, "threads": threads, "load": round(load, 2)},
            metrics={f"{name}, {what}": one for (name, what), one in found.items()},
            seconds=round(time.perf_counter() - began, 3),
        )
        card.save_with(frame.to_string(index=False), folder)
    return frame


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the products of matrices and convolutions in ``work``, backward included.

    PyTorch's counter knows neither the fused attention of CPUs nor the fused layers of evaluation mode, which it counts
    as nothing: attention is computed in its plain form while counting.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Whole()  # type: ignore[assignment]
        with sdpa_kernel(SDPBackend.MATH), counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


class _Whole(AbstractContextManager["_Whole"]):
    """Counts all modules as one: telling them apart fails on views of parameters that were made without gradients."""

    parents = ("Global",)

    def __exit__(self, *error: object) -> None:
        pass


def _batch(data: Interactions, size: int) -> Batch:
    """All events of ``size`` items that have some."""
    warm = np.flatnonzero(data.item_counts > 0)
    if not 2 <= size <= len(warm):
        raise DataError(f"item_batch={size}: two or more, and no more than the {len(warm)} items with events")
    mine = np.isin(data.items, generator(0, "throughput").choice(warm, size, replace=False))
    return Batch(torch.from_numpy(data.users[mine]), torch.from_numpy(data.items[mine]), by_item=True)


def _works(model: Unified, batch: Batch) -> dict[str, Callable[[], object]]:
    """What is timed, by its name."""
    settings = model.fit_defaults
    optimiser = torch.optim.AdamW(model.parameter_groups(settings["lr"]), fused=True)
    pool = batch.pool

    def encode() -> None:
        with model.evaluating():
            model.content(pool)

    def train() -> None:
        model.train()
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(model.loss(batch).values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimiser.step()

    return {"encode": encode, "train": train}


def _measured(work: Callable[[], object], items: int, repeats: int) -> dict[str, Any]:
    """The columns of one row, and each single time."""
    counted = flops(work)
    square = torch.ones(N, N)
    times: dict[str, list[float]] = {"work": [], "product": []}
    for turn in range(repeats + 1):  # the first warms up; a machine that others use slows both alike
        for name, run in (("work", work), ("product", lambda: square @ square)):
            began = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - began)
    seconds, rate = statistics.median(times["work"]), 2 * N**3 / statistics.median(times["product"])
    return {
        SECONDS: round(seconds, 4),
        ITEMS: round(items / seconds, 1),
        FLOPS: round(counted / items / 1e6, 3),
        RATE: round(rate / 1e9, 1),
        FLOOR: round(seconds * rate / counted, 2),
        "times": [round(t, 5) for t in times["work"]],
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """So many threads inside, as many as before after."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

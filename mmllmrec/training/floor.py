"""What a training epoch cannot do without: bytes and products of matrices, at the rates that this machine reaches.

Legend: N size of the measured product, D width.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmllmrec.data.sampling import epoch
from mmllmrec.data.splits import Split
from mmllmrec.models.base import Recommender
from mmllmrec.seed import generator

N, COPIED = 1024, 1 << 26  # float32 values of the measured copy: 256 MiB, more than caches hold
ADAM = 7 * 4  # bytes a parameter and step: weight, gradient and two moments read, weight and moments written
aten = torch.ops.aten


class Count(TorchDispatchMode):
    """Counts, inside: ``flops`` of dense products of matrices (a multiplication and an addition are two), and
    ``bytes`` of sparse ones, which read an index, a value and a row of D a stored entry, and write the result."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            one, other = args[:2] if packet in (aten.mm, aten.bmm) else args[1:3]
            if one.layout in (torch.sparse_csr, torch.sparse_csc):  # the transposed CSR of a backward is a CSC
                index = one.col_indices() if one.layout == torch.sparse_csr else one.row_indices()
                self._sparse(one.values().numel(), index.element_size(), other, one.shape[0])
            else:
                self.flops += 2 * one.numel() * other.shape[-1]
        elif packet in (aten._embedding_bag, aten._embedding_bag_forward_only):  # ``encoders.graph.CSR``
            weight, columns, starts = args[:3]
            self._sparse(columns.numel(), columns.element_size(), weight, len(starts) - 1)
        return result

    def _sparse(self, entries: int, index: int, x: torch.Tensor, rows: int) -> None:
        width = x.shape[-1] * x.element_size()
        self.bytes += entries * (index + x.element_size() + width) + rows * width


def rates(*, repeats: int = 5, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Floating-point operations and bytes a second, float32, on the threads at hand or another ``device``: medians of a
    product of two 1024 x 1024 matrices, and of a copy of 256 MiB (each byte read and written)."""
    one, other = torch.ones(N, N, device=device), torch.ones(N, N, device=device)
    source, target = torch.ones(COPIED, device=device), torch.empty(COPIED, device=device)
    wait = torch.cuda.synchronize if one.is_cuda else lambda: None  # its work is only ordered when a call returns
    product = _median(lambda: (torch.mm(one, other), wait()), repeats)
    copied = _median(lambda: (target.copy_(source), wait()), repeats)
    return 2 * N**3 / product, 2 * 4 * COPIED / copied


def floor(model: Recommender, split: Split, *, batch_size: int, flops: float, bandwidth: float) -> float:
    """Seconds per epoch that a model's method needs at the least, at these ``rates``.

    Counted in one step of training, forward and backward: operations of its dense products over ``flops``, bytes of its
    sparse products and of Adam's pass over all trained parameters over ``bandwidth``; times the steps of an epoch.
    Sampling, gathering, softmaxes and whatever is not a product or Adam are not in it.
    """
    model.train()
    model.begin_epoch(generator(0, "floor"))
    batches = epoch(split.train, batch_size=batch_size, negatives=model.negatives, rng=generator(0, "floor"))
    batch = next(iter(batches)).to(model.device)
    with Count() as count:
        torch.stack(list(model.loss(batch).values())).sum().backward()
    model.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = math.ceil(len(split.train) / batch_size)
    return steps * (count.flops / flops + (count.bytes + ADAM * trained) / bandwidth)


def _median(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])  # the first warms up

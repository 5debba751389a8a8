"""Encoding the candidates of a batch: shared out over processes, and in chunks where memory is short.

Legend: C candidates, D width, n the candidates of one process, W processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import Batch

Encode = Callable[[Tensor], Tensor]


class _Gather(torch.autograd.Function):
    """Everyone's part, (n, D) -> (W, n, D); its backward is the sum of what all processes say of one's own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]


def encode_pool(encode: Encode, batch: Batch) -> Tensor:
    """Every candidate of a batch, encoded once among all processes: ``encode`` maps (n,) -> (n, D); gives (C, D).

    Process r of W encodes ``pool[r::W]`` and the parts are gathered *with* their gradients: the backward adds up, for
    each part, what the losses of all processes say of it. With each process's mean loss weighted by W n_r / N (its
    share of the batch's N events) and gradients averaged over processes, as ``fit`` and data-parallel training do, the
    step is that of one process with the whole batch. With one process it is ``encode(batch.pool)``; ``batch.chunk``
    bounds how many items are encoded at once (``in_chunks``). Raises ``DataError`` when a batch was shared among more
    processes than there are.
    """
    pool, rank, world = batch.pool, batch.rank, batch.world
    run: Encode = encode if batch.chunk is None else lambda items: in_chunks(encode, items, size=batch.chunk or 0)
    if world == 1:
        return run(pool)
    if not dist.is_initialized() or dist.get_world_size() != world:
        raise DataError(f"this batch is shared among {world} processes: start as many, as torchrun does")
    counts = [len(range(r, len(pool), world)) for r in range(world)]
    # a process without a candidate of its own encodes one and keeps nothing: all of them have to meet in the gather
    part = run(pool[rank::world] if counts[rank] else pool[:1])[: counts[rank]]
    padded = torch.cat([part, part.new_zeros(max(counts) - len(part), part.shape[1])])
    gathered: Tensor = _Gather.apply(padded)
    parts = [p[:n] for p, n in zip(gathered, counts, strict=True)]
    order = torch.cat([torch.arange(r, len(pool), world, device=pool.device) for r in range(world)])
    return torch.cat(parts)[order.argsort()]


def in_chunks(encode: Encode, items: Tensor, *, size: int) -> Tensor:
    """``encode(items)`` with the activations of at most ``size`` items alive at a time: (C,) -> (C, D), C > 0.

    What GradCache does for contrastive losses (Gao et al. 2021, algorithm 1): encode everything without activations,
    take the loss on the embeddings, then encode chunk by chunk again to carry the embeddings' gradient on. Checkpoints
    around each chunk give the same steps in the same order within one backward, so it needs no second pass of its own
    and costs the same: one more forward. Values and gradients are those of ``encode(items)`` for an encoder that treats
    rows one by one; a chunk meets the same random numbers (dropout) both times. Raises ``DataError`` for ``size < 1``.
    """
    if size < 1:
        raise DataError(f"chunk={size}: encode at least one item at a time")
    if not torch.is_grad_enabled() or len(items) <= size:
        return encode(items)
    parts: list[Tensor] = [checkpoint(encode, part, use_reentrant=False) for part in items.split(size)]
    return torch.cat(parts)

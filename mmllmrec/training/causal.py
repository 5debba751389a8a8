"""fit_causal(): a causal language model learns to give answers (instruction tuning), resumable, with Accelerate.

Legend: N rows, B rows of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import packed, sharing
from mmllmrec.features.towers import logits_at, sees_all
from mmllmrec.runcard import RunCard, content_hash, hash_of, peak_memory_mb, reset_peak_memory, write_json
from mmllmrec.seed import generator, seed_everything, stream
from mmllmrec.training import checkpoint
from mmllmrec.training.fit import DivergedError, Run, factor

Row = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and those of its answer, end mark included
Group = tuple[int, list[int]]  # how many tokens some rows begin with alike, and their numbers
MASKED = ("eager", "sdpa")  # attention that reads a mask of any shape
CHUNK = 64  # batches whose rows are sorted by length together: enough for batches of like length, drawn anew each epoch


class _Answering(nn.Module):
    """The summed loss of answers as a forward pass, which is where data-parallel training attaches its hooks."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, places: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        if mask.dim() == 4:
            mask = torch.zeros(mask.shape, dtype=base.dtype, device=ids.device).masked_fill_(
                ~mask, torch.finfo(base.dtype).min
            )
        before = F.pad(answers[:, 1:], (0, 1))  # the places that an answer's tokens are told from
        inputs = {"input_ids": ids, "position_ids": places, "attention_mask": mask, "use_cache": False}
        logits = logits_at(base, before, **inputs).logits
        return F.cross_entropy(logits.float(), ids[:, 1:][answers[:, 1:]], reduction="sum")


def fit_causal(
    model: Any,
    rows: Sequence[Row],
    *,
    valid: Sequence[Row],
    epochs: int = 1,
    batch_tokens: int = 8192,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: float = 0.05,
    clip: float = 1.0,
    patience: int | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = 200,
    resume: bool = True,
    name: str = "instruct",
    progress: bool = True,
) -> Run:
    """Train the parameters of a causal model that have a gradient (its LoRA) to give each row's answer.

    The loss is the mean negative log-likelihood of the answers' tokens, in nats a token; a prompt's tokens are read and
    not learned. What prompts that follow one another begin with alike is read once, with the same outcome: put
    questions about one history together. Batches hold rows of like length, at most ``batch_tokens`` tokens with their
    padding, in an order drawn every epoch. AdamW, linear ``warmup`` and half a cosine to zero; ``clip`` bounds the
    gradient's norm. After every epoch the loss on ``valid`` is measured, and the weights of the best epoch are kept;
    ``patience`` is how many epochs without a better one end it. With ``folder`` a checkpoint is written after every
    epoch and every ``checkpoint_every`` steps, and a run that was cut off goes on, to the same result (on a GPU as near
    as two whole runs are). Started by
    ``accelerate launch`` or torchrun every process takes its share of a batch.

    Returns a ``Run`` whose ``best_score`` is minus the validation loss. Raises ``DataError`` for rows without an
    answer, for a model without a trainable parameter and for a ``folder`` of another run, and ``DivergedError``.
    """
    for what, some in (("rows", rows), ("valid", valid)):
        bad = [n for n, (prompt, answer) in enumerate(some) if not prompt or not answer]
        if bad or not some:
            raise DataError(f"{what}: {f'row {bad[0]} has no prompt or no answer' if bad else 'there is none'}")
    if not any(p.requires_grad for p in model.parameters()):
        raise DataError("nothing would train: attach a LoRA first (features.adapters.attach)")
    began = time.perf_counter()
    reset_peak_memory()
    settings: dict[str, Any] = {"epochs": epochs, "batch_tokens": batch_tokens, "lr": lr, "weight_decay": weight_decay}
    settings |= {"warmup": warmup, "clip": clip, "patience": patience, "rows": len(rows), "valid": len(valid)}
    same = {**settings, "seed": seed, "data": content_hash([[list(p), list(a)] for p, a in (*rows, *valid)])}
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    kept = ((n, p) for n, p in model.named_parameters() if not p.requires_grad)
    frozen = (x for n, p in kept for x in (n, p.detach().float().cpu().numpy()))
    same["model"] = hash_of(chain([shapes], frozen))
    seed_everything(seed)
    place = None if folder is None else Path(folder)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay, fused=True
    )
    state: dict[str, Any] = {"epoch": 0, "step": 0, "best_epoch": -1, "best_score": -math.inf, "bad": 0, "history": []}
    state |= {"sum": 0.0, "tokens": 0, "spent": 0.0, "stopped": False, "key": content_hash(same), "settings": same}
    best = checkpoint.trained(model)
    moments: dict[int, dict[str, Any]] = {}
    if place is not None and resume and (found := checkpoint.resumed(place, model=model, same=same)) is not None:
        best, moments, state = found
    loss_of, optimiser = accelerator.prepare(_Answering(model), optimiser)
    inner = getattr(optimiser, "optimizer", optimiser)
    checkpoint.set_moments(inner, moments)
    groups = _groups(model, rows, batch_tokens)
    lengths = _lengths(rows, groups)
    # as many as a first epoch has: the schedule must not wait for later ones to be drawn
    an_epoch = len(_batches(lengths, batch_tokens, generator(seed, "rows", 0)))
    total, spent = epochs * an_epoch, state["spent"]
    rank, world = accelerator.process_index, accelerator.num_processes
    bar = tqdm(
        total=total,
        initial=state["epoch"] * an_epoch + state["step"],
        desc=name,
        disable=not (progress and accelerator.is_main_process),
    )

    def keep() -> None:
        state["spent"] = spent + time.perf_counter() - began
        if place is not None and accelerator.is_main_process:
            checkpoint.save(place, model=model, moments=checkpoint.moments(inner), best=best, state=state)

    while state["epoch"] < epochs and not state["stopped"]:
        number = state["epoch"]
        model.train()
        for position, batch in enumerate(_batches(lengths, batch_tokens, generator(seed, "rows", number))):
            if position < state["step"]:
                continue
            now = number * an_epoch + position
            for group in inner.param_groups:
                group["lr"] = lr * factor(min(now, total), total, "cosine", warmup)
            torch.manual_seed(int(stream(seed, "step", number, position, rank).generate_state(1)[0]))
            answered = sum(len(rows[n][1]) for g in batch for n in groups[g][1])
            share = batch[rank::world] or batch[:1]
            with accelerator.autocast():
                summed = loss_of(*_tensors(rows, [groups[g] for g in share], accelerator.device))
            if not bool(torch.isfinite(summed)):
                raise DivergedError(f"the loss is not finite in epoch {number}, step {position}: lower lr={lr}")
            optimiser.zero_grad(set_to_none=True)
            held = float(rank < len(batch))  # a process without a row of its own reads one, and it counts for nothing
            accelerator.backward(summed * (held * world / answered))
            accelerator.clip_grad_norm_(loss_of.parameters(), clip)
            optimiser.step()
            state["sum"] += float(accelerator.reduce(summed.detach().double() * held, reduction="sum"))
            state["tokens"] += answered
            state["step"] = position + 1
            bar.update()
            if position % 10 == 0:
                bar.set_postfix(epoch=number, nats=f"{state['sum'] / state['tokens']:.4f}")
            if checkpoint_every and state["step"] % checkpoint_every == 0:
                keep()
        row = {"epoch": number, "loss": state["sum"] / max(state["tokens"], 1)}
        row["valid loss"] = answer_loss(model, valid, batch_tokens=batch_tokens)
        row["seconds"] = spent + time.perf_counter() - began
        if -row["valid loss"] > state["best_score"]:
            best = checkpoint.trained(model)
            state |= {"best_epoch": number, "best_score": -row["valid loss"], "bad": 0}
        else:
            state["bad"] += 1
        state["stopped"] = patience is not None and state["bad"] >= patience
        state["history"].append(row)
        state |= {"epoch": number + 1, "step": 0, "sum": 0.0, "tokens": 0}
        keep()
    bar.close()
    checkpoint.restore(model, best)
    model.eval()
    card = RunCard(
        kind="fit",
        name=name,
        seed=seed,
        data=f"{len(rows):,} rows of instructions, {sum(len(a) for _, a in rows):,} tokens of answers",
        settings=settings,
        metrics={"valid loss": -state["best_score"], "best_epoch": state["best_epoch"]},
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=round(spent + time.perf_counter() - began, 3),
        peak_memory_mb=peak_memory_mb(),
    )
    if place is not None and accelerator.is_main_process:
        write_json(place / "card.json", card.as_dict())
    return Run(model, pd.DataFrame(state["history"]), state["best_epoch"], state["best_score"], card.seconds, card)


def is_main_process() -> bool:
    """Whether this is the process that writes files, of those that train together."""
    return bool(PartialState().is_main_process)


@torch.no_grad()
def answer_loss(model: Any, rows: Sequence[Row], *, batch_tokens: int = 8192) -> float:
    """Mean negative log-likelihood of the answers' tokens, in nats; in float32, on the model's device."""
    was, device = model.training, next(model.parameters()).device
    model.eval()
    groups = _groups(model, rows, batch_tokens)
    summed = 0.0
    try:
        for batch in _batches(_lengths(rows, groups), batch_tokens, None):
            summed += float(_Answering(model)(*_tensors(rows, [groups[g] for g in batch], device)))
    finally:
        model.train(was)
    return summed / sum(len(a) for _, a in rows)


def _groups(model: Any, rows: Sequence[Row], tokens: int) -> list[Group]:
    """Rows with what they begin with alike, in groups of at most ``tokens`` tokens; each alone where a model's
    attention cannot be told which of them a token sees."""
    whole = [[*prompt, *answer] for prompt, answer in rows]
    if getattr(model.config, "_attn_implementation", None) not in MASKED or not sees_all(model):
        return [(0, [n]) for n in range(len(rows))]
    # a prompt's last token is each row's own: what follows it is learned
    ends = [len(answer) + 1 for _, answer in rows]
    return sharing(whole, ends, lambda size, some: size + sum(len(whole[n]) - size for n in some) <= tokens)


def _lengths(rows: Sequence[Row], groups: Sequence[Group]) -> np.ndarray:
    """Tokens that are read of each group."""
    return np.array([size + sum(len(rows[n][0]) + len(rows[n][1]) - size for n in some) for size, some in groups])


def _batches(lengths: np.ndarray, tokens: int, rng: np.random.Generator | None) -> list[list[int]]:
    """Numbers of groups in batches of like length, drawn with ``rng``, in order of length without."""
    order = np.argsort(lengths, kind="stable") if rng is None else rng.permutation(len(lengths))
    size = max(int(CHUNK * tokens / max(lengths.mean(), 1)), 1)
    found: list[list[int]] = []
    known = dict(enumerate(lengths.tolist()))
    for part in np.split(order, range(size, len(order), size)):
        found += packed(part[np.argsort(lengths[part], kind="stable")].tolist(), known, tokens)
    return found if rng is None else [found[n] for n in rng.permutation(len(found))]


def _tensors(
    rows: Sequence[Row], groups: Sequence[Group], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A line a group, padded on the right: what its rows share, then the rest of each. Tokens, their places in their
    rows, and which are an answer's: (B, L) each; and, third, which are there, (B, L), or, where rows share something,
    which of the others each token sees, (B, 1, L, L)."""
    lines = [_line(rows, *group) for group in groups]
    ids, places, owners, answers = (
        pad_sequence([torch.tensor(line[n]) for line in lines], batch_first=True, padding_value=fill)
        for n, fill in enumerate((0, 0, -1, 0))
    )
    mask = owners >= 0
    if any(size for size, _ in groups):
        # what is shared, what is of the same row, and, for those that pad, themselves
        order = torch.arange(ids.shape[1])
        seen = (owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])
        mask = (seen & (order <= order[:, None]))[:, None]
    else:
        mask = mask.long()
    return ids.to(device), places.to(device), mask.to(device), answers.bool().to(device)


def _line(rows: Sequence[Row], size: int, some: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """A group's tokens, their places, whose they are (0: all rows'), and which are an answer's."""
    ids, places, owners, answers = list(rows[some[0]][0][:size]), list(range(size)), [0] * size, [0] * size
    for number, n in enumerate(some, 1):
        prompt, answer = rows[n]
        ids += [*prompt[size:], *answer]
        count = len(prompt) + len(answer) - size
        places += range(size, size + count)
        owners += [number] * count
        answers += [*[0] * (len(prompt) - size), *[1] * len(answer)]
    return ids, places, owners, answers

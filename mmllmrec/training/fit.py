"""fit(): the one training loop, and the only place that knows Accelerate.

Legend: B batch (of all processes together).
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import Batch, blocks_of, epoch, item_blocks
from mmllmrec.data.splits import Split
from mmllmrec.evaluation.calibration import cold_room
from mmllmrec.evaluation.protocols import validation_score
from mmllmrec.models.base import Recommender
from mmllmrec.runcard import (
    RunCard,
    content_hash,
    peak_device_memory_mb,
    peak_memory_mb,
    reset_peak_memory,
    write_json,
)
from mmllmrec.seed import generator, seed_everything, stream
from mmllmrec.training import checkpoint
from mmllmrec.training.pages import kept_pages


@dataclass
class Run:
    """A fitted model and how it came to be. ``history`` has a row an epoch: loss terms, validation score, seconds."""

    model: Recommender
    history: pd.DataFrame
    best_epoch: int
    best_score: float
    seconds: float
    card: RunCard

    @property
    def name(self) -> str:
        """The model's name in tables."""
        return self.model.name

    def __repr__(self) -> str:
        return f"Run({self.name}: best epoch {self.best_epoch}, {self.card.settings['monitor']} {self.best_score:.4f})"


class DivergedError(DataError):
    """A loss term is not finite any more: these settings cannot be trained."""


class _Loss(nn.Module):
    """The loss as a forward pass, which is where data-parallel training attaches its gradient hooks."""

    def __init__(self, model: Recommender):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.model.loss(batch)


@kept_pages()
def fit(
    model: Recommender,
    split: Split,
    *,
    epochs: int = 50,
    batch_size: int = 2048,
    item_batch: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup: float = 0.0,
    clip: float | None = None,
    stages: Mapping[str, float] | None = None,
    monitor: str = "ndcg@20",
    patience: int | None = None,
    min_epochs: int = 0,
    eval_every: int = 1,
    cold_cost: float | None = None,
    warm_floor: float | None = None,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    chunk: int | None = None,
    on_epoch: Callable[[dict[str, Any]], bool | None] | None = None,
    log_with: Any = None,
    progress: bool = True,
) -> Run:
    """Train a model on ``split.train``, choose its best epoch on ``split.valid``, and return it with those weights.

    AdamW over ``model.parameter_groups(lr)``; ``schedule`` is ``"constant"`` or ``"cosine"`` (to zero), after a linear
    ``warmup`` (share of all steps); ``clip`` bounds the gradient's norm. ``stages`` {group: share} lets a named group
    of ``parameter_groups`` start when that share of all steps is over, at the rate the schedule then has; before, its
    rate is 0 and it has neither gradients nor moments. With ``{"lora": 0.25}`` heads and IDs settle on the towers as
    they are, and no adapter learns from heads that know nothing. Every ``eval_every`` epochs ``monitor`` is measured at
    full precision; ``patience`` is how many measurements without a better one end the run, those of the first
    ``min_epochs`` not counted: graph models begin as popularity, and fall before they rise.
    ``batch_size`` is that of all processes together; with ``item_batch`` a batch is instead all events of that many
    items (``sampling.item_blocks``; for models with an in-batch loss). With ``folder``, a checkpoint is written after
    every epoch (and every ``checkpoint_every`` steps) and a run that was cut off goes on from it, to the same result;
    on a GPU, whose sums are in no fixed order, to one as near as two whole runs are.
    ``cold_cost`` chooses, once training is over, how new items stand against known ones: the share of the monitor on
    known items that room for new ones may cost, or as much as leaves ``warm_floor`` where that is more
    (``evaluation.calibration.cold_room``; for models that rank new items, on splits that have some). The run's score is
    measured after it; the history's are from before.
    ``chunk`` bounds how many items a model that reads content encodes at once (``encoders.gather.in_chunks``: the same
    gradients, less memory, one forward more). ``on_epoch`` is called in the main process with every row of the history;
    True ends the run there. ``log_with`` is any tracker of Accelerate. A model in closed form is only measured.

    Started by ``accelerate launch`` or torchrun it trains in that many processes, each with its share of every batch,
    in the precision that the launcher asks for, whole in each or sharded (FSDP2); validation is in float32.

    Raises ``DivergedError`` when a loss term is not finite, ``DataError`` when ``folder`` holds a checkpoint of other
    settings, for ``item_batch`` with a model that samples negatives, and for ``stages`` of a group that the model does
    not have, of a share outside [0, 1), or of every group, so that nothing would train at first.
    """
    if item_batch is not None and (item_batch < 2 or model.negatives):
        raise DataError(
            f"item_batch={item_batch}: two items or more, and a model with an in-batch loss; use batch_size"
        )
    if schedule not in ("constant", "cosine"):
        raise DataError(f"schedule={schedule!r}: use 'constant' or 'cosine'")
    starts = _starts(model, stages)
    began = time.perf_counter()
    reset_peak_memory()  # the card's peak is the fit's, of all resident then: what was loaded before counts
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "item_batch": item_batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "warmup": warmup,
        "clip": clip,
        "stages": starts,
        "monitor": monitor,
        "patience": patience,
        "eval_every": eval_every,
        "cold_cost": cold_cost,
        "warm_floor": warm_floor,
        **({"min_epochs": min_epochs} if min_epochs else {}),  # checkpoints of before are of the same settings
    }
    card = RunCard(
        kind="fit",
        name=model.name,
        seed=seed,
        data=split.data.name,
        loaded=split.data.about.get("loaded", {}),
        split=split.describe(),
        model={"class": type(model).__name__, "config": model.config, **model.provenance()},
        settings=settings,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        test_opened=split.test_opened,
    )
    if not model.trainable:
        score = validation_score(model, split.train, split.valid, metric=monitor)
        card.metrics, card.seconds = {monitor: score}, round(time.perf_counter() - began, 3)
        card.peak_memory_mb = peak_memory_mb()
        return Run(model, pd.DataFrame({"epoch": [0], monitor: [score]}), 0, score, card.seconds, card)

    seed_everything(seed)
    place = None if folder is None else Path(folder)
    # a process may hold no picture, or no word, in its share of a batch: what reads them has no gradient there
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    cpu = not torch.cuda.is_available()
    # torch.manual_seed looks for accelerators every time, a tenth of a millisecond a step
    reseed = torch.default_generator.manual_seed if cpu else torch.manual_seed
    accelerator = Accelerator(
        cpu=cpu, log_with=log_with, project_dir=place, kwargs_handlers=[unused] if model.modalities else []
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    if batch_size % world:
        raise DataError(f"batch_size={batch_size} is that of all {world} processes: make it divisible by {world}")
    if item_batch is None:
        steps_an_epoch = math.ceil(len(split.train) / batch_size)
    else:
        steps_an_epoch = blocks_of(split.train, item_batch)
    total = epochs * steps_an_epoch

    same = {**settings, "seed": seed, "split": split.hash, "model": card.model}
    state: dict[str, Any] = {"epoch": 0, "step": 0, "best_epoch": -1, "best_score": -math.inf, "bad": 0, "history": []}
    state |= {"terms": {}, "spent": 0.0, "stopped": False, "settings": same, "key": content_hash(same)}
    best = checkpoint.trained(model)
    moments: dict[int, dict[str, Any]] = {}
    if place is not None and resume and (found := checkpoint.resumed(place, model=model, same=same)) is not None:
        best, moments, state = found
    over = state["stopped"] or state["epoch"] >= epochs
    # FSDP cuts up what it is given: it gets a copy, and the model stays whole for validation and for the user
    sharded = accelerator.distributed_type == DistributedType.FSDP
    learner = copy.deepcopy(model) if sharded else model
    for p in learner.parameters() if sharded else ():
        p.data = torch.atleast_1d(p.data)  # nor does it take scalars
    named = learner.parameter_groups(lr)
    groups = [{k: v for k, v in g.items() if k != "name"} for g in named]
    first = [starts.get(g["name"], 0.0) * total for g in named]  # the step at which a group starts
    inner = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=not sharded)
    loss_of, wrapped = accelerator.prepare(_Loss(learner), inner)
    # the wrapper is for float16's scaler; without one it only looks for a package on disk, twice a step, a millisecond
    optimiser = inner if accelerator.scaler is None else wrapped
    checkpoint.set_moments(inner, moments)
    base = [group["lr"] for group in inner.param_groups]
    if log_with is not None:
        plain = {k: str(v) if isinstance(v, dict) else v for k, v in settings.items() if v is not None}
        accelerator.init_trackers("mmllmrec", config=plain)
    bar = tqdm(
        total=total,
        initial=state["epoch"] * steps_an_epoch + state["step"],
        desc=model.name,
        disable=not (progress and accelerator.is_main_process),
    )
    spent = state["spent"]

    local: dict[str, Tensor] = {}  # this process's share of the loss terms' sums since they were last added up

    def add_up() -> None:
        for name, value in local.items():
            total_value = float(accelerator.reduce(value, reduction="sum"))
            state["terms"][name] = state["terms"].get(name, 0.0) + total_value
        local.clear()

    def keep() -> None:
        add_up()
        state["spent"] = spent + time.perf_counter() - began
        state["peak"] = max(state.get("peak", 0.0), peak_memory_mb())
        if place is not None:
            gather()
            kept = checkpoint.moments(inner)
            if accelerator.is_main_process:
                checkpoint.save(place, model=model, moments=kept, best=best, state=state)

    def gather() -> None:
        if sharded:
            own = model.state_dict()
            checkpoint.restore(model, {k: v.view(own[k].shape) for k, v in checkpoint.trained(learner).items()})

    while state["epoch"] < epochs and not state["stopped"]:
        number = state["epoch"]
        # an epoch's batches depend on seed and number alone: a run cut off in the middle draws the same ones again
        rng = generator(seed, "epoch", number)
        if item_batch is None:
            batches = epoch(split.train, batch_size=batch_size, negatives=model.negatives, rng=rng)
        else:
            batches = item_blocks(split.train, size=item_batch, rng=rng)
        learner.train()
        learner.begin_epoch(generator(seed, "views", number), resumed=state["step"] > 0)
        for position, batch in enumerate(batches):
            if position < state["step"]:
                continue
            now = number * steps_an_epoch + position
            waiting: list[nn.Parameter] = []
            for group, full, start in zip(inner.param_groups, base, first, strict=True):
                group["lr"] = full * factor(now, total, schedule, warmup) if now >= start else 0.0
                waiting += group["params"] if now < start else []
            # what a model draws (dropout) depends on the step and the process, so a resumed run draws the same in each
            reseed(int(stream(seed, "step", number, position, rank).generate_state(1)[0]))
            held = len(range(rank, len(batch), world))
            share = replace(batch.share(rank, world), chunk=chunk).to(accelerator.device)
            # data-parallel hooks count on the gradients they were built for; one process can do without the backward
            with without_gradients(waiting if world == 1 and not sharded else ()):
                with accelerator.autocast():  # FSDP narrows weights to bf16, and not what meets them
                    terms = loss_of(share)
                loss = torch.stack(list(terms.values())).sum()
                if not bool(torch.isfinite(loss)):
                    raise DivergedError(_diverged(terms, number))
                optimiser.zero_grad(set_to_none=True)
                # shares of the last batch can differ in size; each counts by its number of positives
                accelerator.backward(loss * (held * world / len(batch)))
            for p in waiting:  # AdamW passes over what has no gradient: neither moments nor decay
                p.grad = None
            if clip is not None:
                accelerator.clip_grad_norm_(loss_of.parameters(), clip)
            optimiser.step()
            for name, value in terms.items():
                local[name] = local.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double() * held
            state["step"] = position + 1
            bar.update()
            if position % 10 == 0:
                bar.set_postfix(_postfix(model, batch, loss, number, state["best_score"], monitor))
            if checkpoint_every and state["step"] % checkpoint_every == 0 and state["step"] < steps_an_epoch:
                keep()
        add_up()
        row = {"epoch": number, **{k: v / len(split.train) for k, v in state["terms"].items()}}
        if (number + 1) % eval_every == 0 or number + 1 == epochs:
            gather()
            model.to(accelerator.device)
            row[monitor] = validation_score(model, split.train, split.valid, metric=monitor)
            if sharded:
                model.cpu()
        row["seconds"] = spent + time.perf_counter() - began
        stop = bool(on_epoch(row)) if on_epoch is not None and accelerator.is_main_process else False
        # processes that decide apart, on numbers that can differ in the last place, would wait on one another for ever
        row, stop = broadcast_object_list([row, stop])
        if row.get(monitor, -math.inf) > state["best_score"]:
            best = checkpoint.trained(model)
            state |= {"best_epoch": number, "best_score": row[monitor], "bad": 0}
        elif monitor in row:
            state["bad"] += number + 1 > min_epochs
        state["stopped"] = stop or (patience is not None and state["bad"] >= patience)
        state["history"].append(row)
        state |= {"epoch": number + 1, "step": 0, "terms": {}}
        accelerator.log({k: v for k, v in row.items() if k != "epoch"}, step=number)
        keep()
    bar.close()
    for tracker in accelerator.trackers:  # not end_training(), which would leave a second fit without its processes
        tracker.finish()
    checkpoint.restore(model, best)
    if cold_cost is not None and model.supports_cold_items:
        more = cold_room(model, split, cost=cold_cost, floor=warm_floor, metric=monitor)
        if more is not None:
            model.cold_offset += more
            state["best_score"] = validation_score(model, split.train, split.valid, metric=monitor)
    if over and place is not None and (place / "card.json").is_file():  # only read: it tells where it was trained
        card = RunCard.load(place / "card.json")
    else:
        card.seconds = round(spent + time.perf_counter() - began, 3)
        card.peak_memory_mb = state.get("peak", peak_memory_mb())
        card.peak_device_memory_mb = peak_device_memory_mb()
        card.metrics = {monitor: state["best_score"], "best_epoch": state["best_epoch"]}
        card.model["weights"] = content_hash(*(p for k, v in sorted(best.items()) for p in (k, v.float().numpy())))
        if place is not None and accelerator.is_main_process:
            write_json(place / "card.json", card.as_dict())
    history = pd.DataFrame(state["history"])
    return Run(model, history, state["best_epoch"], state["best_score"], card.seconds, card)


def factor(step: int, total: int, schedule: str, warmup: float) -> float:
    """What the learning rate is multiplied by at a step: linear warm-up, then constant or half a cosine to zero.

    >>> [round(factor(s, 10, "cosine", 0.2), 3) for s in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    first = warmup * total
    if step < first:
        return min(1.0, (step + 1) / first)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(total - first, 1)))


@contextmanager
def without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters without gradients inside, with them after: a checkpoint is to know them as trainable."""
    chosen = list(parameters)
    for p in chosen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in chosen:
            p.requires_grad_(True)


def _starts(model: Recommender, stages: Mapping[str, float] | None) -> dict[str, float]:
    """The share of all steps after which each staged group trains."""
    known = [str(g["name"]) for g in model.parameter_groups(1.0)] if model.trainable else []
    for name, share in (stages or {}).items():
        if name not in known:
            raise DataError(f"stages: {model.name} has no parameter group {name!r}; its groups are {known}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise DataError(f"stages[{name!r}]={share!r}: a share of the epochs, from 0 to below 1")
    starts = {name: float(share) for name, share in (stages or {}).items()}
    if starts and all(starts.get(name) for name in known):
        raise DataError(f"stages={starts}: nothing would train at first; let one of {known} start at 0")
    return starts


def _postfix(model: Recommender, batch: Batch, loss: Tensor, number: int, best: float, monitor: str) -> dict[str, str]:
    known = getattr(model, "log_candidates", None)
    candidates = known(batch) if known else math.log(1 + model.negatives)
    shown = {"epoch": str(number), "loss": f"{float(loss.detach()):.4f}", "log_candidates": f"{candidates:.3f}"}
    return shown if math.isinf(best) else {**shown, monitor: f"{best:.4f}"}


def _diverged(terms: dict[str, Tensor], number: int) -> str:
    bad = [k for k, v in terms.items() if not bool(torch.isfinite(v))]
    return (
        f"loss term {', '.join(bad) or 'sum'} is not finite in epoch {number}: lower lr, pass clip=1.0, "
        "or look for features that are not standardised"
    )

"""Checkpoints: everything a run needs to go on, as tensors (safetensors) and plain values (JSON).

Accelerate's ``save_state`` pickles and writes in place; a run killed while it writes would be lost with it. Here a
checkpoint is one folder, written beside and renamed, and loading it executes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash, write_atomically

NAME = "checkpoint"


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training moves: parameters with a gradient and persistent buffers. Frozen towers are not written again."""
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    fixed = {n for n, _ in model.named_parameters()} - moving
    return {k: _whole(v) for k, v in model.state_dict().items() if k not in fixed}


def _whole(value: Tensor) -> Tensor:
    """A copy on the CPU, put together where it lies in parts (all processes call it then)."""
    value = value.detach()
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.cpu().clone().contiguous()


def moments(optimiser: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """An optimiser's state by the place of the parameter: tensors whole and on the CPU, plain values as they are."""
    return {
        int(place): {k: _whole(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        for place, values in optimiser.state_dict()["state"].items()
    }


def set_moments(optimiser: torch.optim.Optimizer, found: dict[int, dict[str, Any]]) -> None:
    """Put back what ``moments`` took, divided as the parameters are."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def like(p: Tensor, value: Any) -> Any:
        if isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == p.shape:
            return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
        return value

    state = {n: {k: like(parameters[n], v) for k, v in values.items()} for n, values in found.items()}
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what ``trained`` took. Raises ``DataError`` when a name is not the model's."""
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise DataError(f"a checkpoint of another model: it has {unexpected[:3]}, which this one has not")


def save(
    folder: Path,
    *,
    model: nn.Module,
    moments: dict[int, dict[str, Any]],
    best: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Write ``folder/checkpoint`` at once: weights, best weights, the optimiser's moments, and ``state`` (JSON)."""
    tensors = {f"model/{k}": v for k, v in trained(model).items()}
    tensors |= {f"best/{k}": v.clone() for k, v in best.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for position, values in moments.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{position}/{key}"] = value
            else:
                numbers.setdefault(str(position), {})[key] = value

    def write(path: Path) -> None:
        path.mkdir()
        save_file(tensors, path / "state.safetensors")
        (path / "state.json").write_text(json.dumps({**state, "optimiser": numbers}), encoding="utf-8")

    write_atomically(folder / NAME, write)


def load(folder: Path, *, model: nn.Module) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]], dict[str, Any]]:
    """Put a checkpoint's weights back into the model; returns best weights, the optimiser's moments and ``state``."""
    tensors = load_file(folder / NAME / "state.safetensors")
    state = peek(folder)
    assert state is not None

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    restore(model, under("model/"))
    found: dict[int, dict[str, Any]] = {int(p): dict(v) for p, v in state.pop("optimiser").items()}
    for name, value in under("optimiser/").items():
        position, _, key = name.partition("/")
        found.setdefault(int(position), {})[key] = value
    return under("best/"), found, state


def resumed(
    folder: Path, *, model: nn.Module, same: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[int, dict[str, Any]], dict[str, Any]] | None:
    """``load`` of a run whose settings were ``same``, None where there is no checkpoint. Its ``state`` holds them, and
    their hash as ``key``. Raises ``DataError`` naming the settings that differ in a checkpoint of another run."""
    found = peek(folder)
    if found is None:
        return None
    if found["key"] != content_hash(same):
        other = [k for k, v in same.items() if content_hash(found["settings"].get(k)) != content_hash(v)]
        raise DataError(
            f"{folder} holds a checkpoint of a run with other {', '.join(other)}: pass another folder, or resume=False"
        )
    return load(folder, model=model)


def reopen(folder: Path) -> None:
    """Let a run that was ended from outside (``fit(on_epoch=)``) go on when it is fitted again, to where it would have
    ended by itself."""
    state = peek(folder)
    if state is not None:
        patience = state["settings"]["patience"]
        state["stopped"] = patience is not None and state["bad"] >= patience
        path = folder / NAME / "state.json"
        write_atomically(path, lambda beside: beside.write_text(json.dumps(state), encoding="utf-8"))


def peek(folder: Path) -> dict[str, Any] | None:
    """The plain values of a checkpoint, or None where there is none."""
    path = folder / NAME / "state.json"
    if not path.is_file():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value

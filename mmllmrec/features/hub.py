"""To the Hugging Face hub: a model card that says what a model was made from, and the upload of its folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import RunCard, write_atomically, write_json


def bases(module: Any) -> list[dict[str, Any]]:
    """The pretrained weights under a module's LoRA adapters: name, revision (None where none is known), rank."""
    from peft import PeftModel

    found = []
    for part in module.modules():
        if not isinstance(part, PeftModel):
            continue
        inner = part.get_base_model()
        about = getattr(inner, "config", None)
        config: Any
        for config in part.peft_config.values():
            name = str(config.base_model_name_or_path or getattr(about, "_name_or_path", "") or type(inner).__name__)
            # where a folder of one's own lies is nobody's business
            name = Path(name).name if Path(name).exists() else name
            revision = config.revision or getattr(about, "_commit_hash", None)
            found.append({"name": name, "revision": revision, "rank": config.r})
    return found


def write_card(folder: str | os.PathLike[str], *, card: RunCard, base: list[dict[str, Any]]) -> dict[str, Any]:
    """Write ``card.json`` and a model card, ``README.md`` with YAML metadata, into ``folder``; returns what they say.

    ``card`` is the run card of a fit or of a report: data and split with their hashes, hashes of towers and prompt,
    metrics with their intervals, and the command.
    """
    kept = {k: card.model.get(k) for k in ("class", "base", "prompt", "catalog", "weights") if k in card.model}
    of_split = {k: card.split[k] for k in ("name", "hash", "seed", "train", "valid") if k in card.split}
    about: dict[str, Any] = {"name": card.name, "base": base, "data": card.data, "split": of_split, "model": kept}
    about |= {"metrics": card.metrics, "command": card.settings.get("command", ""), "seed": card.seed}
    about |= {"versions": card.versions, "created": card.created, "test_opened": card.test_opened}
    named = [b["name"] for b in base if b["name"].count("/") == 1]  # owner/name; a folder is no name on the hub
    head = ModelCardData(
        library_name="mmllmrec",
        tags=["recommendation", "multimodal", *(["lora", "peft"] if base else [])],
        base_model=named or None,
    )
    lines = ["---", head.to_yaml(), "---", f"# {card.name}", "", f"Trained with mmllmrec on {card.data}.", ""]
    lines += ["| what | value |", "|---|---|"]
    rows: Mapping[str, Any] = {
        **{f"base {n + 1}": f"{b['name']}, revision {b['revision'] or '-'}" for n, b in enumerate(base)},
        "split": ", ".join(f"{k} {v}" for k, v in of_split.items()),
        **{k: json.dumps(v) for k, v in kept.items()},
        "command": f"`{about['command']}`" if about["command"] else "-",
    }
    lines += [f"| {k} | {v} |" for k, v in rows.items()]
    intervals = {k: v for k, v in card.metrics.items() if isinstance(v, list | tuple) and len(v) >= 3}
    lines += ["", "| metric | mean | 95% interval |", "|---|---|---|"]
    lines += [
        f"| {k.replace(' | ', ', ')} | {m:.4f} | {low:.4f} to {high:.4f} |"
        for k, (m, low, high, *_) in intervals.items()
    ]
    single = {k: v for k, v in card.metrics.items() if isinstance(v, int | float)}
    lines += [f"| {k} | {v:.4g} | - |" for k, v in single.items()]
    text = "\n".join([*lines, ""])
    write_atomically(Path(folder) / "README.md", lambda p: p.write_text(text, encoding="utf-8"))
    write_json(Path(folder) / "card.json", about)
    return about


def upload(
    repo_id: str,
    write: Callable[[Path], Any],
    *,
    card: RunCard,
    base: list[dict[str, Any]],
    private: bool = True,
    token: str | None = None,
) -> str:
    """Make the repository where it is not there, and upload what ``write(folder)`` writes, with its card; the address.

    Raises ``DataError`` for a ``repo_id`` that is not ``owner/name``.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise DataError(f"repo_id={repo_id!r}: give owner/name")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        write(place)
        write_card(place, card=card, base=base)
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(place), commit_message=f"{card.name}, trained with mmllmrec")
    return str(url)

"""LoRA adapters through PEFT: attach, save in PEFT's own format with a card, load, merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mmllmrec.data.interactions import DataError
from mmllmrec.features import hub
from mmllmrec.runcard import RunCard, write_json

# open_clip attends with nn.MultiheadAttention, whose projections are parameters and no linear modules: naming modules
# alone would miss them or, for out_proj, change nothing
VISION = {"target_modules": ["c_fc", "c_proj"], "target_parameters": ["attn.in_proj_weight"]}
LANGUAGE = {
    "llama": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "bert": {"target_modules": ["query", "key", "value", "intermediate.dense", "output.dense"]},
}


def attach(module: nn.Module, *, rank: int, kind: str, layers: list[int] | None = None) -> Any:
    """Put LoRA on a pretrained tower and freeze everything else in it; returns a ``peft.PeftModel``.

    W' = W + (alpha / rank) B A with alpha = 2 rank and B = 0 at the start (Hu et al. 2022, eq. 3), so nothing changes
    until it trains. ``kind`` is ``"vision"`` (an open_clip transformer) or ``"language"`` (a ``transformers`` model);
    of which all projections are adapted, and no embedding or head; ``layers`` limits the adapters to those layers.
    ``module`` itself is changed: pass a copy to keep it.
    Raises ``DataError`` when nothing was there to adapt.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise DataError(f"rank={rank}: at least 1")
    if kind == "vision":
        targets: dict[str, Any] = VISION
        if layers is not None:
            which = "|".join(map(str, layers))
            inside = [f"transformer.resblocks.{n}.{p}" for n in layers for p in VISION["target_parameters"]]
            named = rf"transformer\.resblocks\.({which})\..*\.?({'|'.join(VISION['target_modules'])})"
            targets = {"target_modules": named, "target_parameters": inside}
    else:
        leaves = {name.rpartition(".")[2] for name, _ in module.named_modules()}
        known = [t for t in LANGUAGE.values() if {p.rpartition(".")[2] for p in t["target_modules"]} <= leaves]
        targets = dict(known[0]) if known else {"target_modules": "all-linear"}  # but for the head
        if layers is not None:
            targets |= {"layers_to_transform": layers, "layers_pattern": ["layer", "layers"]}
    try:
        return get_peft_model(module, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", **targets))
    except ValueError as error:
        raise DataError(f"LoRA found nothing to adapt in a {type(module).__name__} as {kind}: {error}") from error


def save(adapted: Any, folder: Path, *, card: dict[str, Any]) -> None:
    """Write ``adapter_model.safetensors``, ``adapter_config.json`` (both PEFT's) and ``card.json`` to ``folder``.

    The configuration names the base as the card's ``base_model`` does, or by the last part of its folder: where a
    folder of one's own lies is nobody's business.
    """
    # no embedding is adapted, and "auto" would ask the hub whether one grew
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card: ours says what is known
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()  # whoever finds it finds an adapter that is whole
    name = str(card.get("base_model") or config["base_model_name_or_path"] or "")
    config["base_model_name_or_path"] = (Path(name).name if Path(name).exists() else name) or None
    write_json(folder / "card.json", card)
    write_json(path, config)


def push(adapted: Any, repo_id: str, *, card: RunCard, private: bool = True, token: str | None = None) -> str:
    """Upload one tower's LoRA, in PEFT's format, to ``owner/name`` on the Hugging Face hub; the repository's address.

    It holds no events and no ids. ``card`` is the run's or a report's: see ``Recommender.push_to_hub``.
    """

    def write(folder: Path) -> None:
        save(adapted, folder, card={})

    return hub.upload(repo_id, write, card=card, base=hub.bases(adapted), private=private, token=token)


def load(adapted: Any, folder: Path) -> None:
    """Read saved LoRA weights into a tower that ``attach`` prepared. Raises ``DataError`` when they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise DataError(f"{path} is missing: {folder} holds no adapter in PEFT's format")
    result: Any = set_peft_model_state_dict(adapted, load_file(path))
    lost = [k for k in result.missing_keys if "lora_" in k]
    if lost or result.unexpected_keys:
        raise DataError(f"{path} does not fit this tower: missing {lost[:3]}, unexpected {result.unexpected_keys[:3]}")


def merged(module: nn.Module, folder: Path) -> Any:
    """A model with a saved LoRA added into its weights. Raises ``DataError`` when the folder holds none that fits."""
    from peft import PeftConfig, get_peft_model

    if not (folder / "adapter_config.json").is_file():
        raise DataError(f"{folder / 'adapter_config.json'} is missing: {folder} holds no adapter in PEFT's format")
    try:
        adapted = get_peft_model(module, PeftConfig.from_pretrained(str(folder)))  # type: ignore[arg-type]
    except ValueError as error:
        raise DataError(f"{folder} does not fit a {type(module).__name__}: {error}") from error
    load(adapted, folder)
    return adapted.merge_and_unload()

"""The unified recommender: raw picture and words -> content; content and ID -> item; item and user -> score.

Legend: B batch, C distinct items of a batch, U users, I items, D width.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmllmrec import losses
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.data.sampling import Batch, in_batch
from mmllmrec.encoders.backbone import Backbone, Items, tokenise, unit
from mmllmrec.encoders.gather import encode_pool
from mmllmrec.encoders.graph import LightGraph
from mmllmrec.features import adapters
from mmllmrec.features.prompts import load_prompt
from mmllmrec.features.towers import load_language, load_vision
from mmllmrec.models.base import Recommender, read_tensors
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped


@dataclass(frozen=True)
class Preset:
    """Which towers, and what trains in them. ``vision`` and ``language``: a folder, a hub name (see
    ``features.towers``) or ``"nano"``, the shipped towers; ``enter``: the language layer where soft tokens come in, all
    below it frozen (``encoders.Backbone``); ``lora_layers``: language layers with LoRA, None for all from ``enter``."""

    vision: str = "nano"
    language: str = "nano"
    tokens: int = 48  # a row's longest, soft tokens included
    soft: int = 4
    rank: int = 8
    enter: int = 0
    lora_layers: tuple[int, ...] | None = None


PRESETS = {
    "nano": Preset(),
    "minilm": Preset(language="minilm", tokens=32, enter=4),
    "base": Preset(vision="ViT-B-32:laion2b_s34b_b79k", language="Qwen/Qwen2.5-0.5B", tokens=128, soft=8),
}


class Unified(Recommender):
    """One backbone from pixels and words to recommendations, LoRA on both towers.

    q_i = c_i / |c_i| + present_i * id_i, where c is ``encoders.Backbone``'s content and an item's ID is present when it
    has a training event; in training it is dropped with probability ``id_dropout``, so that content learns to stand
    alone. IDs of users and items are smoothed over the graph of training events (``encoders.LightGraph``).
    score(u, i) = cos(p_u, q_i) / temperature, learned. Loss: in-batch sampled softmax over the batch's distinct items,
    corrected by log(1 - (1 - p)^B), with the user's other training positives and copies of the positive (same words and
    picture) masked. A user is its smoothed ID here: one without a training event scores every item the same.
    """

    supports_cold_items: ClassVar[bool] = True
    negatives: int = 0
    loss_name: str = "softmax"
    fit_defaults: ClassVar[dict[str, Any]] = {
        "epochs": 24,
        "item_batch": 128,
        "eval_every": 2,
        "lr": 2e-3,
        "schedule": "cosine",
        "warmup": 0.05,
        "clip": 1.0,
        "weight_decay": 0.0,
    }

    def __init__(
        self,
        train: Interactions,
        *,
        catalog: Catalog,
        preset: Preset | dict[str, Any] = PRESETS["nano"],
        dim: int = 64,
        id_dropout: float = 0.3,
        graph_layers: int = 2,
        prompt: str = "item",
    ):
        preset = Preset(**preset) if isinstance(preset, dict) else preset
        super().__init__(
            train, preset=asdict(preset), dim=dim, id_dropout=id_dropout, graph_layers=graph_layers, prompt=prompt
        )
        if catalog.item_ids != train.item_ids:
            raise DataError("Unified: the catalogue's item ids are not those of the training events")
        nano = shipped("adapters/nano-base") if "nano" in (preset.vision, preset.language) else Path()
        self._vision = load_vision(str(nano / "clip") if preset.vision == "nano" else preset.vision)
        self._language = load_language(str(nano / "language") if preset.language == "nano" else preset.language)
        self.base_hash = content_hash(self._vision.hash, self._language.hash)
        self.preset, self.prompt, self.catalog = preset, load_prompt(prompt), catalog
        self._vision.model = adapters.attach(self._vision.model, rank=preset.rank, kind="vision")
        layers = None if preset.lora_layers is None else list(preset.lora_layers)
        language: Any = self._language.model
        depth = int(language.config.num_hidden_layers)
        if not 0 <= preset.enter < depth:
            raise DataError(f"enter={preset.enter}: the language model has layers 0 to {depth - 1}")
        if layers is None and preset.enter:
            layers = list(range(preset.enter, depth))
        if layers is not None and min(layers, default=preset.enter) < preset.enter:
            raise DataError(f"lora_layers={layers}: a LoRA below enter={preset.enter} would never be reached")
        self._language.model = adapters.attach(self._language.model, rank=preset.rank, kind="language", layers=layers)
        self.backbone = Backbone(self._vision, self._language, dim=dim, soft=preset.soft, enter=preset.enter)
        if (preset.vision, preset.language, preset.soft) == ("nano", "nano", 4):
            state = read_tensors(nano / "resampler.safetensors")
            self.backbone.read.data.copy_(state.pop("read"))
            self.backbone.resampler.load_state_dict(state)
        self.item_ids_table = nn.Embedding(self.n_items, dim)
        self.user_ids_table = nn.Embedding(self.n_users, dim)
        nn.init.normal_(self.item_ids_table.weight, std=0.3 / dim**0.5)
        nn.init.normal_(self.user_ids_table.weight, std=0.3 / dim**0.5)
        self.graph = LightGraph(train, layers=graph_layers)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.id_dropout = id_dropout
        self.modalities = tuple(m for m in ("image", "text") if m in catalog.modalities)
        warm = torch.from_numpy(train.item_counts > 0)
        self.register_buffer("item_present", warm, persistent=False)
        self.register_buffer("user_present", torch.from_numpy(train.user_counts > 0), persistent=False)
        self._read(catalog)

    item_present: Tensor
    user_present: Tensor

    @classmethod
    def from_preset(cls, preset: str | Preset, *, data: Interactions, catalog: Catalog, **options: Any) -> Unified:
        """A model on pretrained towers: ``"nano"`` (shipped), ``"minilm"`` (its extra), ``"base"`` (the hub), or a
        ``Preset`` of your own. ``options`` go to the constructor."""
        if isinstance(preset, str) and preset not in PRESETS:
            raise DataError(f"unknown preset {preset!r}; presets are {sorted(PRESETS)}, or pass a Preset")
        return cls(data, catalog=catalog, preset=PRESETS[preset] if isinstance(preset, str) else preset, **options)

    def _read(self, catalog: Catalog) -> None:
        """Raw content as tensors, and which items show the same thing."""
        image = torch.from_numpy(catalog.present("image"))
        text = torch.from_numpy(catalog.present("text"))
        fields = catalog.words()
        tokens, words = tokenise(
            self._language, self.prompt, fields, image, soft=self.preset.soft, length=self.preset.tokens
        )
        size = self._vision.size
        shape = (len(catalog), 3, size, size)
        pixels = catalog.pixels(size) if "image" in catalog.modalities else np.zeros(shape, np.uint8)
        # plain attributes, moved with the batch: a large catalogue's pixels need not lie on the accelerator
        before: Items | None = getattr(self, "items", None)
        states = None
        if before is not None and torch.equal(tokens, before.tokens):  # another catalogue with the same words
            states = before.states
        elif self.preset.enter:  # what frozen layers say of an item is computed once
            states = torch.cat([self.backbone.below(t.to(self.device)).cpu() for t in tokens.split(256)])
        self.items = Items(torch.from_numpy(pixels.copy()), tokens, words, image, text, states)
        looks: dict[Any, int] = {}
        same = [
            looks.setdefault((f["title"], f["text"], p.tobytes()), i)
            for i, (f, p) in enumerate(zip(fields, pixels, strict=True))
        ]
        self.same = torch.tensor(same)

    def with_catalog(self, catalog: Catalog) -> Unified:
        """This model, same weights, reading another catalogue of the same items (controls)."""
        other = copy.copy(self)
        other.catalog = catalog
        other._read(catalog)
        return other

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """ID tables at 5 lr (each row gets few gradients), LoRA and heads at lr."""
        ids = [self.item_ids_table.weight, self.user_ids_table.weight]
        known = {id(p) for p in ids}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": ids, "lr": 5 * lr, "name": "ids"}, {"params": rest, "lr": lr, "name": "adapters and heads"}]

    def content(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Content of some items, (C,) -> (C, D) of unit length, and the backbone's parts."""
        content, parts = self.backbone(self.items.take(index.cpu()).to(self.device))
        return unit(content), parts

    def ids(self) -> tuple[Tensor, Tensor]:
        """ID embeddings of users (U, D) and items (I, D), smoothed over the graph of the training events."""
        users, items = self.graph(self.user_ids_table.weight, self.item_ids_table.weight)
        return users, items

    def encode(self, index: Tensor, ids: Tensor) -> Tensor:
        """Items (C,) with all items' IDs (I, D) -> q (C, D): content, and the ID where present."""
        content, _ = self.content(index)
        present = self.item_present[index]
        if self.training and self.id_dropout:
            present = present & (torch.rand(len(index), device=index.device) >= self.id_dropout)
        return content + present[:, None] * ids[index]

    def tastes(self, ids: Tensor) -> Tensor:
        """Users' IDs (U, D) -> p (U, D) of unit length; zero for users without a training event."""
        return unit(ids) * self.user_present[:, None]

    def forward(self) -> tuple[Tensor, Tensor]:
        blocks = torch.arange(self.n_items, device=self.device).split(512)
        users, ids = self.ids()
        items = torch.cat([unit(self.encode(b, ids)) for b in blocks])
        return self.tastes(users) * self.log_scale.clamp(max=4.6).exp(), items

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The in-batch sampled softmax of the class's docstring."""
        found = in_batch(self.train_data, batch, same=self.same)
        users, ids = self.ids()
        q, p = unit(encode_pool(lambda items: self.encode(items, ids), batch)), self.tastes(users)[batch.users]
        scale = self.log_scale.clamp(max=4.6).exp()
        value = losses.sampled_softmax(p * scale, q, found.target, log_q=found.log_q, mask=found.mask)
        return {"softmax": value}

    def log_candidates(self, batch: Batch) -> float:
        """log of the number of candidates a positive is picked from: the loss of a model that knows nothing."""
        return float(np.log(len(batch.pool)))  # type: ignore[arg-type]

    # -- saving -----------------------------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """Hashes of the towers' weights, of the prompt and of the content that was read."""
        prompt = {"id": self.prompt.id, "version": self.prompt.version, "hash": self.prompt.hash}
        return {"base": self.base_hash, "prompt": prompt, "catalog": self.catalog.hash}

    def weights(self) -> dict[str, Tensor]:
        """Everything that is not a tower: heads, resampler, gate, ID tables. LoRA is saved in PEFT's format beside."""
        towers = ("backbone.vision.", "backbone.language.")
        return {k: v for k, v in super().weights().items() if not k.startswith(towers)}

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        about = self.provenance()
        for name in ("vision", "language"):
            source = getattr(self.preset, name)
            card = {"base_model": source, "rank": self.preset.rank, "trained_on_events": self.train_data.hash, **about}
            adapters.save(getattr(self.backbone, name), folder / "adapters" / name, card=card)
        (folder / "base.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _restore(cls, folder: Path, train: Interactions, catalog: Catalog | None, about: dict[str, Any]) -> Unified:
        if catalog is None:
            raise DataError(f"{folder}: a Unified reads items' content; pass catalog=")
        model = cls(train, catalog=catalog, **about["config"])
        base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        if (base["base"], base["prompt"]["hash"]) != (model.base_hash, model.prompt.hash):
            raise DataError(f"{folder} was trained on other tower weights or another prompt than are installed here")
        for name in ("vision", "language"):
            adapters.load(getattr(model.backbone, name), folder / "adapters" / name)
        lost = model.load_state_dict(read_tensors(folder / "model.safetensors"), strict=False)
        missing = [k for k in lost.missing_keys if not k.startswith(("backbone.vision.", "backbone.language."))]
        if missing or lost.unexpected_keys:
            raise DataError(f"{folder / 'model.safetensors'}: missing {missing}, unexpected {lost.unexpected_keys}")
        return model

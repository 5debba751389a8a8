"""The unified recommender: raw content -> one backbone -> items, beside IDs -> users -> score.

Legend: C items asked for, I items, D width.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, Interactions
from mmllmrec.encoders.backbone import JOINT, Backbone, Items, Told, scattered, tokenise, word_means, worded
from mmllmrec.encoders.frozen import Frozen
from mmllmrec.encoders.heads import EARLY, KEEP, SHRINK, Content
from mmllmrec.features import adapters
from mmllmrec.features.audio import AudioEncoder, FeatureEncoder
from mmllmrec.features.prompts import load_prompt
from mmllmrec.features.sensor import SensorEncoder
from mmllmrec.features.store import Store
from mmllmrec.features.table import FeatureTable
from mmllmrec.features.towers import load_language, load_vision, randomised_language, randomised_vision
from mmllmrec.models.base import read_tensors
from mmllmrec.models.hybrid import Hybrid, check_rate
from mmllmrec.models.twostage import TwoStage
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped


@dataclass(frozen=True)
class Preset:
    """Which towers, and what trains in them. ``vision`` and ``language``: a folder, a hub name (see
    ``features.towers``) or ``"nano"``, the shipped towers; ``look`` and ``enter``: how many layers of the vision tower
    are frozen, and the language layer where soft tokens come in, all below it frozen (``encoders.Backbone``);
    ``cached``: the two numbers that the cached trainer puts there (an ``enter`` of 0 freezes no language layer: what it
    says is then kept for as long as its adapters wait); ``rank`` of LoRA, on every layer above."""

    vision: str = "nano"
    language: str = "nano"
    tokens: int = 48  # a row's longest, soft tokens included
    soft: int = 4
    rank: int = 8
    keep: int = KEEP  # axes of each state of a tower that the heads hear
    look: int = 0
    enter: int = 0
    cached: tuple[int, int] = (3, 2)
    wait: float = 0.75  # of the cached trainer's steps, before the adapters join
    measured: int = 4  # the cached trainer looks at validation every so many epochs
    rate: int = 4000  # hertz, of raw sound


PRESETS = {
    "nano": Preset(),
    "minilm": Preset(language="minilm", tokens=32, keep=96, cached=(3, 0), wait=0.9, measured=20),
    "base": Preset(
        vision="ViT-B-32:laion2b_s34b_b79k", language="Qwen/Qwen2.5-0.5B", tokens=128, soft=8, keep=96, cached=(11, 22)
    ),
}
TRAINERS = ("cached", "end_to_end")


class Unified(Hybrid):
    """One backbone from pixels, words, sound and sensors to recommendations, LoRA on both towers.

    Content is ``encoders.Backbone``'s; score, IDs, users and losses are ``Hybrid``'s. Its modalities are those of the
    catalogue: ``image`` and ``text`` through the towers, raw ``audio`` and ``sensor`` through small encoders that are
    trained here, and a table of features through a perceptron. ``modalities`` limits them; ``paths`` and ``fusion`` say
    what is fused and how (``Backbone``). ``lr_lora`` is the adapters' learning rate, in multiples of the one
    that ``fit`` is given. ``store`` keeps what the frozen layers say of an item (see ``from_preset``); it is no part of
    a saved model. ``whiten=False`` leaves the heads' whitening to weights that are loaded next.
    ``random_weights`` is a control: the towers' architectures without what pretraining gave them, drawn by their
    libraries' own initialisers at building; such a model is not loaded again, since saved adapters bring no towers.
    """

    fit_defaults: ClassVar[dict[str, Any]] = {
        "epochs": 20,
        "item_batch": 128,
        "eval_every": 4,
        "lr": 5e-3,
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
        modalities: tuple[str, ...] | None = None,
        paths: tuple[str, ...] | None = None,
        fusion: str = "concat",
        prompt: str = "item",
        lr_lora: float = 0.2,
        store: Store | str | os.PathLike[str] | None = None,
        whiten: bool = True,
        random_weights: bool = False,
        **options: Any,
    ):
        preset = Preset(**preset) if isinstance(preset, dict) else preset
        preset = replace(preset, cached=(preset.cached[0], preset.cached[1]))
        reads = catalog.modalities if modalities is None else tuple(m for m in catalog.modalities if m in modalities)
        unknown = [m for m in modalities or () if m not in catalog.modalities]
        if unknown or not reads:
            raise DataError(f"modalities={modalities}: the catalogue has {list(catalog.modalities)}")
        senses = [m for m in reads if m not in ("image", "text")]
        everything = (EARLY, "image", "text", *senses)
        paths = everything if paths is None else tuple(paths)
        super().__init__(
            train,
            dim=dim,
            paths=paths,
            preset=asdict(preset),
            modalities=None if modalities is None else list(reads),
            fusion=fusion,
            prompt=prompt,
            lr_lora=lr_lora,
            random_weights=random_weights,
            **options,
        )
        self.config["paths"] = list(paths)
        check_rate("lr_lora", lr_lora)
        self.lr_lora = lr_lora
        self.store = store if store is None or isinstance(store, Store) else Store(store)
        if catalog.item_ids != train.item_ids:
            raise DataError("Unified: the catalogue's item ids are not those of the training events")
        nano = shipped("adapters/nano-base") if "nano" in (preset.vision, preset.language) else Path()
        self._vision = load_vision(str(nano / "clip") if preset.vision == "nano" else preset.vision)
        self._language = load_language(str(nano / "language") if preset.language == "nano" else preset.language)
        if random_weights:
            self._vision, self._language = randomised_vision(self._vision), randomised_language(self._language)
        self.base_hash = content_hash(self._vision.hash, self._language.hash)
        self.preset, self.prompt, self.catalog = preset, load_prompt(prompt), catalog
        self.modalities = reads
        self._adapt()
        self.backbone = Backbone(
            self._vision,
            self._language,
            dim=dim,
            soft=preset.soft,
            enter=preset.enter,
            look=preset.look,
            keep=preset.keep,
            senses={m: self._sense(m) for m in senses},
            paths=paths,
            fusion=fusion,
        )
        if (preset.vision, preset.language, preset.soft) == ("nano", "nano", 4) and not random_weights:
            state = read_tensors(nano / "resampler.safetensors")
            self.backbone.read.data.copy_(state.pop("read"))
            self.backbone.resampler.load_state_dict(state)
        self._read(catalog)
        if whiten:
            warm = self.item_present.nonzero()[:, 0]
            with self.evaluating():
                self.backbone.fit_whitening(self.items.take(block) for block in warm.split(256))

    @classmethod
    def settings(cls, trainer: str, preset: str | Preset = "nano") -> dict[str, Any]:
        """The keywords of ``fit`` that models of a trainer and preset ask for. With the cached one heads, IDs and
        senses settle on the towers as they are, whose states are computed once for all of that time (``Preset.wait``);
        then the adapters join."""
        chosen = PRESETS[preset] if isinstance(preset, str) else preset
        if trainer != "cached":
            return cls.fit_defaults
        return cls.fit_defaults | {"stages": {"lora": chosen.wait}, "eval_every": chosen.measured}

    @classmethod
    def from_preset(
        cls, preset: str | Preset, *, data: Interactions, catalog: Catalog, trainer: str = "end_to_end", **options: Any
    ) -> Unified:
        """A model on pretrained towers: ``"nano"`` (shipped), ``"minilm"`` (its extra), ``"base"`` (the hub), or a
        ``Preset`` of your own. ``trainer="end_to_end"`` puts LoRA on every layer; ``"cached"`` on the last ones alone,
        what the frozen layers below say is computed once, and by its ``fit_defaults`` these wait for the heads to
        settle (``settings``). With ``store=`` (a ``features.store.Store`` or its folder) it is kept on disk, an entry
        an item: a second building, another catalogue or ``with_catalog`` runs the layers on what is new alone, whatever
        LoRA is above them. ``options`` go to the constructor."""
        if isinstance(preset, str) and preset not in PRESETS:
            raise DataError(f"unknown preset {preset!r}; presets are {sorted(PRESETS)}, or pass a Preset")
        if trainer not in TRAINERS:
            raise DataError(f"trainer={trainer!r}: one of {TRAINERS}")
        chosen = PRESETS[preset] if isinstance(preset, str) else preset
        if trainer == "cached":
            chosen = replace(chosen, look=chosen.cached[0], enter=chosen.cached[1])
        model = cls(data, catalog=catalog, preset=chosen, **options)
        if trainer == "cached":
            model.fit_defaults = cls.settings(trainer, chosen)  # type: ignore[misc]
        return model

    def _adapt(self) -> None:
        """LoRA on the layers of both towers that are not frozen."""
        preset = self.preset
        towers: dict[str, tuple[Any, int, int]] = {
            "vision": (self._vision, preset.look, len(self._vision.model.transformer.resblocks)),  # type: ignore
            "language": (self._language, preset.enter, int(self._language.model.config.num_hidden_layers)),  # type: ignore
        }
        for kind, (tower, frozen, depth) in towers.items():
            limit = depth if kind == "vision" else depth - 1
            if not 0 <= frozen <= limit:
                name = "look" if kind == "vision" else "enter"
                raise DataError(f"{name}={frozen}: the {kind} tower has {depth} layers; give 0 to {limit}")
            layers = None if frozen == 0 else list(range(frozen, depth))
            if layers == []:
                tower.model.requires_grad_(False)
            else:
                tower.model = adapters.attach(tower.model, rank=preset.rank, kind=kind, layers=layers)

    def _sense(self, modality: str) -> nn.Module:
        """The encoder of a modality that is neither picture nor text, standardised on the items that training knows."""
        catalog = self.catalog
        rows = torch.from_numpy(catalog.signal(modality))
        known = torch.from_numpy(catalog.present(modality)) & self.item_present
        if not bool(known.any()):
            raise DataError(f"no item with a training event has {modality!r}: leave it out (modalities=)")
        if modality not in catalog.dataset.column_names:
            return FeatureEncoder.fit(rows[known])
        if modality == "audio":
            return AudioEncoder.fit(rows[known], self.preset.rate)
        return SensorEncoder.fit(rows[known])

    def _read(self, catalog: Catalog) -> None:
        """Raw content as tensors, and which items show the same thing."""
        present = {
            m: torch.from_numpy(catalog.present(m) if m in self.modalities else np.zeros(len(catalog), dtype=bool))
            for m in ("image", "text", *self.backbone.senses)
        }
        fields = catalog.words() if "text" in self.modalities else [{"title": "", "text": ""}] * len(catalog)
        senses = {m: present[m] for m in ("image", *self.backbone.senses)}
        soft = {"image": self.preset.soft} | dict.fromkeys(self.backbone.senses, 1)
        known = worded(self._language, self.prompt, fields)
        tokens, words = tokenise(self._language, known, senses, soft=soft, length=self.preset.tokens + len(soft) - 1)
        size = self._vision.size
        has_pixels = "image" in self.modalities
        pixels = catalog.pixels(size) if has_pixels else np.zeros((len(catalog), 3, 1, 1), np.uint8)
        raw = {"image": torch.from_numpy(pixels.copy())}
        raw |= {m: torch.from_numpy(catalog.signal(m)) for m in self.backbone.senses}
        self.stood: tuple[int, Told] | None = None
        self.read_last = None
        # plain attributes, moved with the batch: a large catalogue's pixels need not lie on the accelerator
        before: Items | None = getattr(self, "items", None)
        self.items = Items(tokens, words, raw, present, word_means(self._language, known))
        frozen = Frozen(
            self.backbone, self._vision, self._language, (self.preset.vision, self.preset.language), self.store
        )
        self.items.states = frozen.states(self.items, before, device=self.device)
        self.items.seen = frozen.seen(self.items, before, device=self.device) if has_pixels else None
        looks: dict[Any, int] = {}
        shown = [pixels.reshape(len(pixels), -1), *(raw[m].numpy() for m in self.backbone.senses)]
        same = [
            looks.setdefault((f["title"], f["text"], *(s[i].tobytes() for s in shown)), i) for i, f in enumerate(fields)
        ]
        self.same = torch.tensor(same)

    def with_catalog(self, catalog: Catalog) -> Unified:
        """This model, same weights, reading another catalogue of the same items (controls)."""
        other = copy.copy(self)
        other.catalog, other.said = catalog, None
        other._read(catalog)
        return other

    def add_items(self, catalog: Catalog) -> Unified:
        """This model with the items of another catalogue after its own: a forward pass reads them, nothing is trained.

        Their IDs are absent, as those of all items without a training event are. The weights are shared; ids of users
        and of old items stay where they are. Raises ``DataError`` for an item id that is there already and for tables
        of features of other widths.
        """
        joined, old = self.catalog.joined(catalog), self.train_data
        other = self._grown(Interactions(old.users, old.items, old.times, old.user_ids, joined.item_ids))
        other.catalog = joined
        other._read(joined)
        return other

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """``ids``: IDs and biases, at ``lr_ids`` lr; ``heads``: what is new, at lr; ``lora``: adapters, the picture's
        resampler and the read-out, at ``lr_lora`` lr: what the heads read must not move faster than they follow."""
        ids, rest = super().parameter_groups(lr)
        lora = {id(p) for p in self._moving if p.requires_grad}
        heads = [p for p in rest["params"] if id(p) not in lora]
        adapted = [p for p in rest["params"] if id(p) in lora]
        groups = [
            ids,
            {"params": heads, "lr": lr, "name": "heads"},
            {"params": adapted, "lr": self.lr_lora * lr, "name": "lora"},
        ]
        return [g for g in groups if g["params"]]

    @property
    def _moving(self) -> list[nn.Parameter]:
        """What trains in the pretrained towers, unless it is made to wait: adapters, resampler, read-out."""
        bone = self.backbone
        lora = [p for t in (bone.vision, bone.language) for n, p in t.named_parameters() if "lora_" in n]
        return [*lora, *bone.resampler.parameters(), bone.read]

    @property
    def _written(self) -> int:
        """How often what trains in the towers was written to."""
        return sum(p._version for p in self._moving)

    def reading(self) -> Any:
        """How often each tensor of the backbone that trains, and each buffer, was written to; other items are read anew
        (``_read``). Frozen weights do not count: an adapter on one writes it and puts it back in every pass."""
        trained = (p for p in self.backbone.parameters() if p.requires_grad)
        return tuple(t._version for t in (*trained, *self.backbone.buffers())), self.device

    def content(self, index: Tensor) -> Content:
        """What the backbone makes of some items, (C,)."""
        if self.training:
            self.read_last = None  # a step will follow, and a fused optimiser does not count what it writes
        index = index.cpu()
        found: Content = self.backbone(self.items.take(index).to(self.device), self._standing(index))
        return found

    def _standing(self, index: Tensor) -> Told | None:
        """What the pretrained towers say of some items as long as nothing in them moves: it is computed once
        (``Backbone.towers``), and not of what a run that is resumed cannot know. None where they learn, and outside
        training where it is not known yet, or where further senses have a part in what they say."""
        known = self.stood is not None and self.stood[0] == self._written
        if self.training and any(p.requires_grad for p in self._moving):
            self.stood = None  # as in ``content``
            return None
        if not self.training and (self.backbone.senses or not known):
            return None
        if not known:
            with self.evaluating():
                self.stood = self._written, self._of_all(self.backbone.towers)
        assert self.stood is not None
        found = {}
        for kind, (rows, here) in self.stood[1].items():
            present = here[index]
            found[kind] = rows[index][present].to(self.device), present.to(self.device)
        return {k: v for k, v in found.items() if len(v[0])}

    def _of_all(self, say: Callable[[Items], Told]) -> Told:
        """What is said of every item, on the CPU: rows (I, V), zero where there is nothing, and who has them."""
        blocks = torch.arange(self.n_items).split(256)
        found = [say(self.items.take(b).to(self.device)) for b in blocks]
        whole: Told = {}
        for kind in dict.fromkeys(k for f in found for k in f):
            parts = [f.get(kind) for f in found]
            width = next(p[0].shape[1] for p in parts if p is not None)
            nothing = [(torch.zeros(0, width), torch.zeros(len(b), dtype=torch.bool)) for b in blocks]
            both = [
                (p[0].float().cpu(), p[1].cpu()) if p is not None else n for p, n in zip(parts, nothing, strict=True)
            ]
            here = torch.cat([p[1] for p in both])
            whole[kind] = scattered(torch.cat([p[0] for p in both]), here), here
        return whole

    def tower_features(self, *, keep: int = KEEP) -> FeatureTable:
        """What the towers say of every item as they are now, as frozen features of other models.

        Tables ``image`` (pooled) and ``patches`` (their mean), ``text`` (mean of the words' embeddings) and ``context``
        (of their states at language layer ``enter``, above 0), ``joint`` (the language model's read-out over picture
        and words) and ``tokens`` (the mean of its states), each whitened on train items to ``keep`` columns as before
        the heads; a sense that has no pretrained tower has its descriptors. Before ``fit`` these are the features of
        the two-stage twin. Another catalogue's follow (``FeatureTable.of``) as long as the towers stay as they are.
        """
        warm, version = self.train_data.item_counts > 0, self._written

        def again(catalog: Catalog) -> FeatureTable:
            if self._written != version:
                raise DataError(
                    "the towers behind these features were trained since: features of another catalogue would be those "
                    "of other towers; take them of a model that is not trained"
                )
            found = self.with_catalog(catalog)._told_by_towers()
            unseen = {m: np.zeros((len(found), width)) for m, width in own.widths.items() if m not in found.tables}
            return found.beside(FeatureTable(unseen, np.zeros((len(found), len(unseen)), dtype=bool)))

        own = self._told_by_towers()
        table = replace(own, reader=again)
        others = [m for m in self.modalities if m not in ("image", "text")]
        if others:
            table = table.beside(FeatureTable.from_catalog(self.catalog, fit_on=warm, modalities=others))
        return table.whiten(warm, keep, shrink=SHRINK)

    def twin(self, *, keep: int = KEEP, **options: Any) -> TwoStage:
        """The two-stage twin: the same heads, IDs and losses over ``tower_features`` as they are now, which is what is
        left where the towers do not train. Take it before ``fit``; ``options`` go to ``TwoStage``."""
        features = self.tower_features(keep=keep)
        early = tuple(m for m in features.modalities if m not in self.backbone.senses)  # as the heads here read
        return TwoStage(self.train_data, features=features, early=early, **options)

    @torch.no_grad()
    def _told_by_towers(self) -> FeatureTable:
        with self.evaluating():
            told = self._of_all(self.backbone.states)
        names = {"image": ("image", "patches"), "text": ("text", "context"), JOINT: ("joint", "tokens")}
        tables, presence = {}, []
        for path, parts in names.items():
            if path in told:
                rows, here = told[path]
                widths: tuple[int, ...] = self.backbone.whiten[path].widths  # type: ignore[assignment]
                for name, table in zip(parts, rows.split(widths, dim=1), strict=False):
                    tables[name] = table.numpy()
                    presence.append(here.numpy())
        return FeatureTable(tables, np.stack(presence, axis=1))

    # -- saving -----------------------------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        """Hashes of the towers' weights, of the prompt and of the content that was read."""
        prompt = {"id": self.prompt.id, "version": self.prompt.version, "hash": self.prompt.hash}
        return {"base": self.base_hash, "prompt": prompt, "catalog": self.catalog.hash}

    @property
    def _adapted(self) -> list[str]:
        """Towers with LoRA."""
        return [n for n in ("vision", "language") if hasattr(getattr(self.backbone, n), "peft_config")]

    def weights(self) -> dict[str, Tensor]:
        """Everything that is not a tower: heads, resampler, gate, ID tables. LoRA is saved in PEFT's format beside."""
        towers = ("backbone.vision.", "backbone.language.")
        return {k: v for k, v in super().weights().items() if not k.startswith(towers)}

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        about = self.provenance()
        for name in self._adapted:
            source = getattr(self.preset, name)
            card = {"base_model": source, "rank": self.preset.rank, "trained_on_events": self.train_data.hash, **about}
            adapters.save(getattr(self.backbone, name), folder / "adapters" / name, card=card)
        (folder / "base.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def _restore(cls, folder: Path, train: Interactions, catalog: Catalog | None, about: dict[str, Any]) -> Unified:
        if catalog is None:
            raise DataError(f"{folder}: a Unified reads items' content; pass catalog=")
        model = cls(train, catalog=catalog, whiten=False, **about["config"])
        base = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        if (base["base"], base["prompt"]["hash"]) != (model.base_hash, model.prompt.hash):
            raise DataError(f"{folder} was trained on other tower weights or another prompt than are installed here")
        for name in model._adapted:
            adapters.load(getattr(model.backbone, name), folder / "adapters" / name)
        lost = model.load_state_dict(read_tensors(folder / "model.safetensors"), strict=False)
        known = ("backbone.vision.", "backbone.language.", "bank")
        missing = [k for k in lost.missing_keys if not k.startswith(known)]
        if missing or lost.unexpected_keys:
            raise DataError(f"{folder / 'model.safetensors'}: missing {missing}, unexpected {lost.unexpected_keys}")
        return model

"""Frozen image towers: a picture -> pooled (B, D) and patch tokens (B, N, W).

Legend: B batch, S pixels a side, N patches, D pooled width, W token width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmllmrec.data.catalog import open_picture
from mmllmrec.data.interactions import DataError
from mmllmrec.features.extractor import Extractor, source_name
from mmllmrec.features.towers import Vision, is_clip, load_transformer, load_vision, still, weights_hash
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped

if TYPE_CHECKING:
    from mmllmrec.data.catalog import Catalog

POOLINGS = ("own", "mean")
Look = Callable[[Tensor], tuple[Tensor, Tensor]]  # (B, 3, S, S) -> pooled (B, D), patches (B, N, W)


def image_extractor(source: str | Vision, *, pooling: str = "own", device: str = "cpu") -> Extractor:
    """A frozen image tower with its own preprocessing (size, crop, mean, deviation, from its config).

    ``source``: ``"nano"``; a CLIP (``towers.load_clip`` says which names); a ``transformers`` folder or hub id such as
    ``"microsoft/resnet-50"`` or ``"google/vit-base-patch16-224"``; or a ``Vision`` at hand, adapters included.
    ``pooling`` ``"own"`` is CLIP's projected state, a vision transformer's class token (of the last norm, no pooling
    head) and the mean over a convolutional map; ``"mean"`` is the mean over the patch tokens. Raises ``DataError`` for
    what cannot be loaded and, from ``extract``, for a picture that cannot be read.
    """
    if pooling not in POOLINGS:
        raise DataError(f"pooling={pooling!r}: one of {list(POOLINGS)}")
    look: Look
    if isinstance(source, Vision) or source == "nano" or is_clip(source):
        where = str(shipped("adapters/nano-base") / "clip") if source == "nano" else source
        vision = where if isinstance(where, Vision) else load_vision(where)
        model, look = vision.model, vision.model
        prepare, preprocessing = _clip_preprocessing(vision)
        name = "clip" if isinstance(source, Vision) else source_name(source, pooling)
    else:
        model = load_transformer(source, what="image model")
        prepare, preprocessing = _preprocessing(source)
        look, name = _looking(model), source_name(source, pooling)
    model.to(device)
    settings = {"preprocessing": preprocessing, "pooling": pooling}

    def encode(pictures: list[Any], names: list[str], tokens: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        opened = [open_picture(p, what=n) for p, n in zip(pictures, names, strict=True)]
        with still(model):
            pooled, patches = look(prepare(opened).to(device))
        if pooling == "mean":
            pooled = patches.mean(dim=1)
        return pooled.float().cpu().numpy(), list(patches.float().cpu().numpy()) if tokens else []

    return Extractor(name, "image", content_hash("image", weights_hash(model), settings), _pictures, encode, settings)


def _pictures(catalog: Catalog) -> Callable[[int], bytes]:
    return lambda item: catalog.picture(item) or b""


def _clip_preprocessing(vision: Vision) -> tuple[Callable[[list[Image.Image]], Tensor], dict[str, Any]]:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    about: dict[str, Any] = dict(getattr(vision.model, "preprocess_cfg", {}))
    known = {f.name for f in fields(PreprocessCfg)}
    about = {k: v for k, v in about.items() if k in known}
    config = PreprocessCfg(**(about | {"size": vision.size, "mean": vision.mean, "std": vision.std}))
    transform: Any = image_transform_v2(config, is_train=False)
    return lambda pictures: torch.stack([transform(p) for p in pictures]), asdict(config)


def _preprocessing(source: str) -> tuple[Callable[[list[Image.Image]], Tensor], dict[str, Any]]:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"image model {source!r}: its preprocessor_config.json cannot be loaded: {error}") from error

    def prepare(pictures: list[Image.Image]) -> Tensor:
        pixels: Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels

    return prepare, processor.to_dict()


def _looking(model: Any) -> Look:
    """Class token and patches of a vision transformer, or the map of a convolutional network as tokens."""

    def look(pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = model(pixel_values=pixels)
        x: Tensor = out.last_hidden_state
        if x.ndim == 4:  # a map, with the network's own pooling over it
            return out.pooler_output.flatten(1), x.flatten(2).transpose(1, 2)
        side = getattr(model.config, "patch_size", 1)
        patches = (pixels.shape[2] // side) * (pixels.shape[3] // side) if isinstance(side, int) else x.shape[1]
        before = max(x.shape[1] - patches, 0)  # class, distillation and register tokens stand first
        return x[:, 0] if before else x.mean(dim=1), x[:, before:]

    return look

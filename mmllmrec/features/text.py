"""Frozen text towers: an item's words, rendered by a prompt -> pooled (B, D) and token states (B, L, W).

Legend: B batch, L tokens, D pooled width, W width of a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmllmrec.data.interactions import DataError
from mmllmrec.features.extractor import Extractor, source_name
from mmllmrec.features.prompts import IMAGE, Prompt, load_prompt
from mmllmrec.features.towers import Language, is_clip, load_clip, load_language, still, weights_hash
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped

if TYPE_CHECKING:
    from mmllmrec.data.catalog import Catalog

POOLINGS = ("mean", "cls", "last")
Read = Callable[[list[str]], tuple[Tensor, Tensor, Tensor]]  # texts -> pooled (B, D), states (B, L, W), lengths (B,)


def text_extractor(
    source: str | Language,
    *,
    pooling: str | None = None,
    layer: int | None = None,
    prompt: str | Path | Prompt = "item",
    length: int = 128,
    device: str = "cpu",
) -> Extractor:
    """A frozen text tower over the title and text of each item, rendered by ``prompt`` without its picture mark.

    ``source``: ``"nano"``, ``"minilm"``, a ``transformers`` folder or hub id (BERT, Sentence-Transformers, a causal
    LLM), a ``Language`` at hand, adapters included, or a CLIP (``towers.load_clip`` says which names), whose text tower
    gives its projected state. ``layer=k`` takes ``hidden_states[k]`` (0 the input embeddings; before any final norm but
    for the last), none the last state. ``pooling``: ``"mean"`` over the tokens, special ones included; ``"cls"``, the
    first; ``"last"``, the last token that is no padding; where not given, what a Sentence-Transformers folder says,
    else last for a causal model and mean for another. Nothing is L2-normalised. ``length`` in tokens cuts long texts.
    Raises ``DataError`` for what cannot be loaded and for choices that the model cannot give.
    """
    rendered = prompt if isinstance(prompt, Prompt) else load_prompt(prompt)
    settings: dict[str, Any] = {"prompt": rendered.hash, "length": length}
    if not isinstance(source, Language) and source != "nano" and is_clip(source):
        if pooling is not None or layer is not None:
            raise DataError(f"text {source!r}: a CLIP's text tower pools by itself; leave pooling and layer out")
        model, read, settings["tokenizer"] = _clip_text(source, length, device)
        name = source_name(source, "text")
    else:
        where = str(shipped("adapters/nano-base") / "language") if source == "nano" else source
        language = where if isinstance(where, Language) else load_language(where)
        model, read = language.model, reader(language, layer, length, device)
        pooling = pooling or _declared(where) or ("last" if language.causal else "mean")
        if pooling not in POOLINGS:
            raise DataError(f"pooling={pooling!r}: one of {list(POOLINGS)}")
        if pooling == "cls" and language.causal:
            raise DataError("pooling='cls': the first token of a causal model sees no other; take 'last' or 'mean'")
        settings |= {"pooling": pooling, "layer": layer, "tokenizer": _tokenizer_hash(language.tokenizer)}
        name = source_name(
            "language" if isinstance(source, Language) else source, pooling, *(() if layer is None else (layer,))
        )
    model.to(device)

    def encode(texts: list[Any], names: list[str], tokens: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        with still(model):
            pooled, states, lengths = read(texts)
        if pooling is not None:
            pooled = pool(states, lengths, pooling)
        words = [s[:n].float().cpu().numpy() for s, n in zip(states, lengths.tolist(), strict=True)] if tokens else []
        return pooled.float().cpu().numpy(), words

    def texts_of(catalog: Catalog) -> Callable[[int], str]:
        words = catalog.words()

        def text(item: int) -> str:
            fields = {k: v for k, v in words[item].items() if k in rendered.inputs}
            found = " ".join(rendered.render(**fields).replace(IMAGE, " ").split())
            if not found:
                raise DataError(f"prompt {rendered.id!r} renders text of item {catalog.item_ids[item]!r} to nothing")
            return found

        return text

    return Extractor(name, "text", content_hash("text", weights_hash(model), settings), texts_of, encode, settings)


def pool(states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """States (B, L, W) of rows of ``lengths`` (B,) valid tokens, at the left -> (B, W). ``pooling`` as above."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), lengths - 1]
    valid = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
    return states.masked_fill(~valid[..., None], 0.0).sum(dim=1) / lengths[:, None]


def reader(language: Language, layer: int | None, length: int, device: str) -> Read:
    """What turns texts into the states of a language model: padding on the right, ``layer`` as above, at most
    ``length`` tokens. Raises ``DataError`` for a layer that the model has not."""
    model: Any = language.model
    depth = int(model.config.num_hidden_layers)
    if layer is not None and not 0 <= layer <= depth:
        raise DataError(f"layer={layer}: the language model has hidden states 0 to {depth}")
    length = min(length, language.tokenizer.model_max_length)

    def read(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        rows = language.tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        lengths = torch.tensor([len(row) for row in rows], device=device)
        # what stands in the padding is masked out, so it need not be a token that the tokenizer knows as padding
        ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True).to(device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=layer is not None)
        states = out.last_hidden_state if layer is None else out.hidden_states[layer]
        return states[:, 0], states, lengths

    return read


def _declared(source: str | Language) -> str | None:
    """The pooling that a Sentence-Transformers model asks for, if it is one of ours."""
    from transformers.utils import cached_file

    if isinstance(source, Language) or source == "minilm":
        return None
    try:
        path = cached_file(source, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    about = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    if about.get("pooling_mode_cls_token"):
        return "cls"
    if about.get("pooling_mode_lasttoken"):
        return "last"
    return "mean" if about.get("pooling_mode_mean_tokens") else None


def _tokenizer_hash(tokenizer: Any) -> str:
    """Hash of all that decides token ids; padding and truncation are the call's."""
    if hasattr(tokenizer, "backend_tokenizer"):
        about = json.loads(tokenizer.backend_tokenizer.to_str())
        return content_hash({k: v for k, v in about.items() if k not in ("padding", "truncation")})
    return content_hash(type(tokenizer).__name__, tokenizer.get_vocab())


def _clip_text(source: str, length: int, device: str) -> tuple[nn.Module, Read, str]:
    import open_clip

    clip, name = load_clip(source)
    tower: Any = clip if hasattr(clip, "ln_final") else getattr(clip, "text", None)
    if not hasattr(tower, "ln_final"):
        raise DataError(f"text {source!r}: its text tower is not CLIP's transformer; load it as a transformers model")
    clip.visual = nn.Identity()  # neither its memory nor its hash is needed
    try:
        tokenizer: Any = open_clip.get_tokenizer(name)
    except Exception as error:
        raise DataError(f"text {source!r}: its tokenizer cannot be loaded: {error}") from error
    inner = getattr(tokenizer, "tokenizer", None)
    size = len(inner) if inner is not None else tokenizer.vocab_size
    if size > tower.token_embedding.num_embeddings:
        raise DataError(
            f"text {source!r}: the tokenizer has {size} tokens, the tower {tower.token_embedding.num_embeddings}"
        )
    about = _tokenizer_hash(inner) if inner is not None else content_hash(sorted(tokenizer.encoder))
    seen: list[Tensor] = []
    tower.ln_final.register_forward_hook(lambda module, given, out: seen.append(out))
    blank = int(getattr(tower, "pad_id", 0) or 0)
    context = min(length, tokenizer.context_length)

    def read(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        ids = tokenizer(texts, context_length=context)
        # the tower was built for its full context: what is cut off is filled up with padding
        ids = nn.functional.pad(ids, (0, tokenizer.context_length - context), value=blank).to(device)
        seen.clear()
        pooled: Tensor = clip.encode_text(ids)
        lengths = ids.shape[1] - (ids != blank).flip(1).int().argmax(dim=1)
        return pooled, seen.pop(), lengths

    return clip, read, about

"""The CLIP-plus-LLM backbone: an item's raw picture and words -> one embedding, trainable end to end.

Legend: B batch, S pixels a side, N patches, L tokens, K soft tokens, W width of the language model, D output width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.features.prompts import IMAGE, Prompt
from mmllmrec.features.towers import Language, Vision, layers_of
from mmllmrec.fusion import Gate

SOFT, READ, PAD = -1, -2, -3  # places in a token row that are no vocabulary: a soft token, the read-out, padding


@dataclass
class Items:
    """Raw items as tensors: pixels (B, 3, S, S) uint8, tokens (B, L) int64 (see ``tokenise``), words (B, L) bool (which
    tokens are the item's own text), image and text (B,) bool presence."""

    pixels: Tensor
    tokens: Tensor
    words: Tensor
    image: Tensor
    text: Tensor
    states: Tensor | None = None  # (B, L, W): what frozen layers made of the tokens (``Backbone.below``)

    def to(self, device: torch.device | str) -> Items:
        """The same items on ``device``."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v if v is None else v.to(device) for k, v in held.items()}
        return Items(**moved)

    def take(self, index: Tensor) -> Items:
        """Rows of all tensors; token columns that are all padding are dropped."""
        tokens, words = self.tokens[index], self.words[index]
        length = int((tokens != PAD).sum(1).max()) if len(index) else 0
        states = None if self.states is None else self.states[index, :length]
        tokens, words = tokens[:, :length], words[:, :length]
        return Items(self.pixels[index], tokens, words, self.image[index], self.text[index], states)


def tokenise(
    language: Language, prompt: Prompt, fields: list[dict[str, str]], image: Tensor, *, soft: int, length: int
) -> tuple[Tensor, Tensor]:
    """Token rows of items: -> tokens (I, L) int64, words (I, L) bool.

    ``[prompt | soft tokens | words | read-out]`` for a causal model; for a bidirectional one its own start and end
    tokens go around and there is no read-out place. An item without a picture has no soft tokens: nothing stands in for
    them. ``length`` cuts the words, never the soft tokens or the read-out.
    """
    tok = language.tokenizer
    rows, own = [], []
    empty = prompt.render(**dict.fromkeys(prompt.inputs, "")).partition(IMAGE)[2].strip()
    for item, has_image in zip(fields, image.tolist(), strict=True):
        before, _, after = prompt.render(**item).partition(IMAGE)
        head = tok(before, add_special_tokens=False)["input_ids"]
        tail = tok(after, add_special_tokens=False)["input_ids"] if after.strip() != empty else []
        middle = [SOFT] * soft if has_image else []
        start, end = ([], [READ]) if language.causal else ([tok.cls_token_id], [tok.sep_token_id])
        tail = tail[: max(length - len(start) - len(head) - len(middle) - len(end), 0)]
        rows.append([*start, *head, *middle, *tail, *end])
        own.append([False] * (len(start) + len(head) + len(middle)) + [True] * len(tail) + [False] * len(end))
    width = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), width), PAD)
    words = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, mark) in enumerate(zip(rows, own, strict=True)):
        tokens[i, : len(row)] = torch.tensor(row)
        words[i, : len(row)] = torch.tensor(mark)
    return tokens, words


class Resampler(nn.Module):
    """K learned queries cross-attend the patches: (B, N, V) -> (B, K, W) soft tokens.

    One attention block of a perceiver resampler (Alayrac et al. 2022, section 3.1.1), with a modality embedding added.
    """

    def __init__(self, width_in: int, width: int, *, tokens: int = 4, heads: int = 4):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.modality = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width_in)
        self.attend = nn.MultiheadAttention(width, heads, kdim=width_in, vdim=width_in, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, patches: Tensor) -> Tensor:
        patches = self.norm(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        x = queries + self.attend(queries, patches, patches, need_weights=False)[0]
        out: Tensor = x + self.mlp(x) + self.modality
        return out


class Backbone(nn.Module):
    """Vision tower, resampler and language model under one read-out, with a late path around the language model.

    early: [prompt | soft tokens | words | EMB] -> language model -> e = LN(W h_EMB); a bidirectional model gives the
    mean over its tokens. late: l_image = LN(W v0) of the pooled picture, l_text = LN(W t0) of the mean of the words'
    states where they enter. fused: ``fusion.Gate`` over {e, l_image, l_text}, masked by presence. The towers come
    frozen or with LoRA; resampler, heads and gate train.

    ``enter`` is the language layer at which soft tokens and read-out come in: the layers below it are frozen and read
    the words alone, so what they give an item never changes and can be kept (``below``, ``Items.states``). With 0 they
    come in with the input embeddings.
    """

    def __init__(self, vision: Vision, language: Language, *, dim: int = 64, soft: int = 4, enter: int = 0):
        super().__init__()
        self.vision, self.language, self.enter = vision.model, language.model, enter
        self.causal, width = language.causal, language.width
        self.resampler = Resampler(vision.token_width, width, tokens=soft)
        self.read = nn.Parameter(torch.randn(width) * 0.02)
        self.early = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.late_image = nn.Sequential(nn.Linear(vision.pooled_width, dim), nn.LayerNorm(dim))
        self.late_text = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.gate = Gate(dim, 3)
        self.register_buffer("mean", torch.tensor(vision.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vision.std).view(1, 3, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor
    vision: nn.Module
    language: Any

    def look(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> pooled (B, V), patches (B, N, V)."""
        pooled, patches = self.vision((pixels.float() / 255 - self.mean) / self.std)
        return pooled, patches

    def below(self, tokens: Tensor) -> Tensor:
        """States of the words where soft tokens enter: tokens (B, L) -> (B, L, W), with no gradient above layer 0."""
        x: Tensor = self.language.get_input_embeddings()(tokens.clamp(min=0))
        if not self.enter:
            return x
        with torch.no_grad():
            part = layers_of(self._language(), 0, self.enter)
            read: Tensor = part(inputs_embeds=x, attention_mask=(tokens >= 0).long()).last_hidden_state
            return read

    def _language(self) -> Any:
        """The language model itself, out of PEFT's wrapping (its adapters are inside its layers)."""
        return self.language.get_base_model() if hasattr(self.language, "get_base_model") else self.language

    def assemble(self, items: Items, soft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the language model (B, L, W), attention mask (B, L) and the mean of the words' states (B, W)."""
        x = self.below(items.tokens) if items.states is None else items.states
        words = items.words[..., None]
        pooled = (x * words).sum(1) / words.sum(1).clamp(min=1)
        place = items.tokens == SOFT
        # rows of ``soft`` are those of the items with a picture, in order, as are the places for them
        x = x.masked_scatter(place[..., None], soft.to(x.dtype)) if soft.numel() else x
        x = torch.where((items.tokens == READ)[..., None], self.read, x)
        return x, items.tokens != PAD, pooled

    def forward(self, items: Items) -> tuple[Tensor, dict[str, Tensor]]:
        """Content c (B, D), and its parts: early, image, text (B, D) each, and the gate's weights (B, 3)."""
        if items.image.any():
            pooled, patches = self.look(items.pixels[items.image])
            soft, seen = self.resampler(patches), self.late_image(pooled)
        else:
            soft = seen = self.read.new_zeros(0)
        x, mask, words = self.assemble(items, soft)
        model = layers_of(self._language(), self.enter) if self.enter else self.language
        h = model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
        if self.causal:  # rows are padded on the right, so the read-out is the last valid token
            h = h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
        else:
            h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        early, text = self.early(h), self.late_text(words)
        image = torch.zeros_like(early).masked_scatter(items.image[:, None], seen.to(early.dtype))
        present = torch.stack([items.image | items.text, items.image, items.text], dim=1)
        content, weights = self.gate(torch.stack([early, image, text], dim=1), present)
        return content, {"early": early, "image": image, "text": text, "weights": weights}


def unit(x: Tensor) -> Tensor:
    """L2-normalised rows; a zero row stays zero."""
    return F.normalize(x, dim=-1)

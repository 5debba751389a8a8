"""The CLIP-plus-LLM backbone: an item's raw content -> one embedding, trainable end to end.

Legend: B batch, S pixels a side, N patches, L tokens, K soft tokens, M paths, W width of the language model, D output
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllmrec.data.interactions import DataError
from mmllmrec.features.prompts import IMAGE, Prompt
from mmllmrec.features.towers import Language, Vision, layers_of, look_above, look_below
from mmllmrec.fusion import FUSIONS

READ, PAD = -2, -3  # places in a token row that are no vocabulary: the read-out, and padding
SOFT = -1  # the soft tokens of a picture; those of the next modalities are -4, -5, ... (``place``)
EARLY = "early"


def place(number: int) -> int:
    """The mark of the soft tokens of the modality with this number: the picture's is 0."""
    return SOFT if number == 0 else PAD - number


@dataclass
class Items:
    """Raw items as tensors: tokens (B, L) int64 (see ``tokenise``), words (B, L) bool (which tokens are the item's own
    text), raw {modality: (B, ...)} (the picture as (B, 3, S, S) uint8), present {modality: (B,) bool} with ``text``.

    What frozen layers make of them never changes and can be kept: states (B, L, W) of the language model
    (``Backbone.below``), seen (B, N + 1, V) of the vision tower (``towers.look_below``).
    """

    tokens: Tensor
    words: Tensor
    raw: dict[str, Tensor]
    present: dict[str, Tensor]
    states: Tensor | None = None
    seen: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Items:
        """The same items on ``device``."""
        return Items(
            self.tokens.to(device),
            self.words.to(device),
            {m: t.to(device) for m, t in self.raw.items()},
            {m: t.to(device) for m, t in self.present.items()},
            None if self.states is None else self.states.to(device),
            None if self.seen is None else self.seen.to(device),
        )

    def take(self, index: Tensor) -> Items:
        """Rows of all tensors; token columns that are all padding are dropped."""
        tokens = self.tokens[index]
        length = int((tokens != PAD).sum(1).max()) if len(index) else 0
        return Items(
            tokens[:, :length],
            self.words[index, :length],
            {m: t[index] for m, t in self.raw.items()},
            {m: t[index] for m, t in self.present.items()},
            None if self.states is None else self.states[index, :length],
            None if self.seen is None else self.seen[index],
        )


def tokenise(
    language: Language,
    prompt: Prompt,
    fields: list[dict[str, str]],
    senses: Mapping[str, Tensor],
    *,
    soft: int | Mapping[str, int],
    length: int,
) -> tuple[Tensor, Tensor]:
    """Token rows of items: -> tokens (I, L) int64, words (I, L) bool.

    ``[prompt | soft tokens | words | read-out]`` for a causal model; for a bidirectional one its own start and end
    tokens go around and there is no read-out place. ``senses`` {modality: (I,) bool} are the modalities that come as
    soft tokens, ``soft`` of them each, and who has which: an item without one has no soft tokens of it, and nothing
    stands in for them. ``length`` cuts the words, never the soft tokens or the read-out.
    """
    tok = language.tokenizer
    rows, own = [], []
    empty = prompt.render(**dict.fromkeys(prompt.inputs, "")).partition(IMAGE)[2].strip()
    counts = {m: soft if isinstance(soft, int) else soft[m] for m in senses}
    here = {m: p.tolist() for m, p in senses.items()}
    for i, item in enumerate(fields):
        before, _, after = prompt.render(**item).partition(IMAGE)
        head = tok(before, add_special_tokens=False)["input_ids"]
        tail = tok(after, add_special_tokens=False)["input_ids"] if after.strip() != empty else []
        middle = [place(n) for n, m in enumerate(senses) if here[m][i] for _ in range(counts[m])]
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
    """K learned queries cross-attend a modality's tokens: (B, N, V) -> (B, K, W) soft tokens.

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


class Head(nn.Module):
    """LN(W whiten(x)), and with ``hidden`` LN(W y + V gelu(U y)), y = whiten(x): (B, V) -> (B, D).

    The whitening is fitted once, on what the towers say before they train.

    States of pretrained towers share a large mean and vary in few directions: a linear map on them as they are hardly
    trains. whiten(x) = (x - mean) V_k diag(lambda_k + eps tr/V)^-1/2 with the k largest eigenpairs of the covariance;
    until ``fit`` it is the identity. Mean and map are buffers: they are saved, and do not train.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, width: int, dim: int, *, hidden: int = 0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whiten", torch.eye(width))
        self.linear = nn.Linear(width, dim)
        self.bend = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dim)) if hidden else None
        self.norm = nn.LayerNorm(dim)

    @torch.no_grad()
    def fit(self, rows: Tensor, *, eps: float = 0.01) -> None:
        """Fit mean and whitening on rows (n, V)."""
        rows = rows.double()
        mean = rows.mean(dim=0)
        centred = rows - mean
        variance, axes = torch.linalg.eigh(centred.T @ centred / max(len(rows), 1))
        floor = eps * variance.mean() + 1e-12
        # an axis without variance gets no say, however the solver turned it
        scale = torch.where(variance > 1e-9 * variance.max(), (variance.clamp(min=0) + floor).rsqrt(), 0.0)
        self.mean.copy_(mean)
        self.whiten.copy_((axes * scale) @ axes.T)

    def forward(self, x: Tensor) -> Tensor:
        y = (x - self.mean) @ self.whiten
        out: Tensor = self.norm(self.linear(y) if self.bend is None else self.linear(y) + self.bend(y))
        return out


@dataclass
class Content:
    """What the backbone makes of items: fused (B, D), and its parts: vectors {path: (B, D)} (``early`` and a path a
    modality, zero where absent), present {path: (B,) bool}, and the fusion's weights (B, M)."""

    fused: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None


class Backbone(nn.Module):
    """Vision tower, further senses and language model under one read-out, with late paths around the language model.

    early: [prompt | soft tokens | words | EMB] -> language model -> e = head(h_EMB), a ``Head`` with a hidden layer,
    because tastes for combinations are not linear in what is said; a bidirectional model gives the mean over its
    tokens. late: l_image = head of the pooled picture and its patches' mean, l_text of the mean of the words' states
    where they enter, l_m of each further modality, all linear. fused: a fusion over {e, l_1, ..., l_M} masked by
    presence. The towers come frozen or with LoRA; resamplers, further senses, heads and fusion train.

    ``senses`` are encoders of modalities besides pictures and words: called on what is present they give pooled (B, P)
    and tokens (B, N, P), and have ``pooled_width`` and ``token_width``. ``paths`` limits what is fused ("early" and
    modalities): without "early" the language model is not run. ``fusion`` is one of ``fusion.FUSIONS``.

    ``enter`` is the language layer at which soft tokens and read-out come in: the layers below it are frozen and read
    the words alone. ``look`` is how many layers of the vision tower are frozen. What frozen layers give an item never
    changes and can be kept (``below``, ``Items``). With 0 nothing is frozen.
    """

    def __init__(
        self,
        vision: Vision,
        language: Language,
        *,
        dim: int = 64,
        soft: int = 4,
        enter: int = 0,
        look: int = 0,
        senses: Mapping[str, nn.Module] | None = None,
        paths: tuple[str, ...] | None = None,
        fusion: str = "gate",
    ):
        super().__init__()
        self.vision, self.language, self.enter, self.frozen_layers = vision.model, language.model, enter, look
        self.causal, width, self.dim = language.causal, language.width, dim
        self.senses = nn.ModuleDict(dict(senses or {}))
        self.resampler = Resampler(vision.token_width, width, tokens=soft)
        self.resamplers = nn.ModuleDict(
            {m: Resampler(s.token_width, width, tokens=1) for m, s in self.senses.items()}  # type: ignore[arg-type]
        )
        self.read = nn.Parameter(torch.randn(width) * 0.02)
        widths = {EARLY: width, "image": vision.pooled_width + vision.token_width, "text": width}
        widths |= {m: s.pooled_width for m, s in self.senses.items()}  # type: ignore[misc]
        self.heads = nn.ModuleDict({m: Head(w, dim, hidden=2 * dim if m == EARLY else 0) for m, w in widths.items()})
        everything = (EARLY, "image", "text", *self.senses)
        self.paths = everything if paths is None else paths
        unknown = [p for p in self.paths if p not in everything]
        if unknown or not self.paths:
            raise DataError(f"paths={self.paths}: choose among {everything}")
        if fusion not in FUSIONS:
            raise DataError(f"fusion={fusion!r}: one of {sorted(FUSIONS)}")
        self.gate = FUSIONS[fusion](dim, len(self.paths))
        self.register_buffer("mean", torch.tensor(vision.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vision.std).view(1, 3, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor
    vision: Any
    language: Any

    def seen(self, pixels: Tensor) -> Tensor:
        """What the frozen layers of the vision tower make of pictures: (B, 3, S, S) uint8 -> (B, N + 1, V)."""
        with torch.set_grad_enabled(self.frozen_layers == 0 and torch.is_grad_enabled()):
            return look_below(_own(self.vision), (pixels.float() / 255 - self.mean) / self.std, self.frozen_layers)

    def look(self, pixels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) uint8 -> pooled (B, V), patches (B, N, V); ``seen`` spares the frozen layers."""
        return look_above(_own(self.vision), self.seen(pixels) if seen is None else seen, self.frozen_layers)

    def below(self, tokens: Tensor) -> Tensor:
        """States of the words where soft tokens enter: tokens (B, L) -> (B, L, W), with no gradient above layer 0."""
        x: Tensor = self.language.get_input_embeddings()(tokens.clamp(min=0))
        if not self.enter:
            return x
        with torch.no_grad():
            part = layers_of(_own(self.language), 0, self.enter)
            read: Tensor = part(inputs_embeds=x, attention_mask=(tokens >= 0).long()).last_hidden_state
            return read

    def assemble(self, items: Items, soft: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the language model (B, L, W), attention mask (B, L) and the mean of the words' states (B, W).

        ``soft`` are each modality's soft tokens, of the items that have it, in order.
        """
        x = self.below(items.tokens) if items.states is None else items.states
        words = items.words[..., None]
        pooled = (x * words).sum(1) / words.sum(1).clamp(min=1)
        for number, modality in enumerate(("image", *self.senses)):
            tokens = soft.get(modality)
            if tokens is not None and tokens.numel():
                # rows of ``tokens`` are those of the items that have it, in order, as are the places for them
                x = x.masked_scatter((items.tokens == place(number))[..., None], tokens.to(x.dtype))
        x = torch.where((items.tokens == READ)[..., None], self.read, x)
        return x, items.tokens != PAD, pooled

    def states(self, items: Items) -> dict[str, tuple[Tensor, Tensor]]:
        """What the towers say on each path, before the heads: {path: (rows (n, V), present (B,) bool)}, a row an item
        that has it."""
        soft: dict[str, Tensor] = {}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        early_runs = EARLY in self.paths
        image = items.present["image"]
        if ("image" in self.paths or early_runs) and bool(image.any()):
            pooled, patches = self.look(items.raw["image"][image], None if items.seen is None else items.seen[image])
            found["image"] = torch.cat([pooled, patches.mean(dim=1)], dim=1), image
            if early_runs:
                soft["image"] = self.resampler(patches)
        for m, sense in self.senses.items():
            here = items.present[m]
            if (m in self.paths or early_runs) and bool(here.any()):
                pooled, tokens = sense(items.raw[m][here])
                found[m] = pooled, here
                if early_runs:
                    soft[m] = self.resamplers[m](tokens)
        x, mask, words = self.assemble(items, soft)
        text = items.present["text"]
        found["text"] = words[text], text
        if early_runs:
            model = layers_of(_own(self.language), self.enter) if self.enter else self.language
            h = model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
            if self.causal:  # rows are padded on the right, so the read-out is the last valid token
                h = h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
            else:
                h = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            some = torch.stack(list(items.present.values())).any(dim=0)
            found[EARLY] = h[some], some
        return found

    @torch.no_grad()
    def fit_heads(self, blocks: Iterable[Items]) -> None:
        """Fit every head's whitening on what the towers say of these items as they are: give train items, once, before
        training."""
        rows: dict[str, list[Tensor]] = {}
        for items in blocks:
            for path, (states, _) in self.states(items).items():
                rows.setdefault(path, []).append(states)
        for path, parts in rows.items():
            self.heads[path].fit(torch.cat(parts))  # type: ignore[operator]

    def forward(self, items: Items) -> Content:
        """Content of items, by all paths; a path's vector is zero where an item has it not."""
        found = self.states(items)
        vectors, present = {}, {}
        for path in self.paths:
            vectors[path] = self.read.new_zeros(len(items), self.dim)
            present[path] = torch.zeros(len(items), dtype=torch.bool, device=self.read.device)
            if path in found:
                states, here = found[path]
                rows = self.heads[path](states)
                vectors[path] = vectors[path].to(rows.dtype).masked_scatter(here[:, None], rows)
                present[path] = here
        fused, weights = self.gate(torch.stack(list(vectors.values()), dim=1), torch.stack(list(present.values()), 1))
        return Content(fused, vectors, present, weights)


def _own(tower: Any) -> Any:
    """The tower itself, out of PEFT's wrapping (its adapters are inside its layers)."""
    return tower.get_base_model() if hasattr(tower, "get_base_model") else tower


def unit(x: Tensor) -> Tensor:
    """L2-normalised rows; a zero row stays zero."""
    return F.normalize(x, dim=-1)

"""The CLIP-plus-LLM backbone: an item's raw content -> one embedding, trainable end to end.

Legend: B batch, S pixels a side, N patches, L tokens, K soft tokens, M paths, W width of the language model, D output
width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmllmrec.encoders.heads import EARLY, KEEP, Content, Heads, Whiten
from mmllmrec.features.prompts import IMAGE, Prompt
from mmllmrec.features.towers import Language, Vision, layers_of, look_above, look_below

READ, PAD = -2, -3  # places in a token row that are no vocabulary: the read-out, and padding
SOFT = -1  # the soft tokens of a picture; those of the next modalities are -4, -5, ... (``place``)
JOINT = "joint"  # states of the language model over all of an item


def place(number: int) -> int:
    """The mark of the soft tokens of the modality with this number: the picture's is 0."""
    return SOFT if number == 0 else PAD - number


@dataclass
class Items:
    """Raw items as tensors: tokens (B, L) int64 (see ``tokenise``), words (B, L) bool (which tokens are the item's own
    text), raw {modality: (B, ...)} (the picture as (B, 3, S, S) uint8), present {modality: (B,) bool} with ``text``,
    said (B, W) the mean embedding of all words (``word_means``), which the heads read.

    What frozen layers make of them never changes and can be kept: states (B, L, W) of the language model
    (``Backbone.below``), seen (B, N + 1, V) of the vision tower (``towers.look_below``).
    """

    tokens: Tensor
    words: Tensor
    raw: dict[str, Tensor]
    present: dict[str, Tensor]
    said: Tensor | None = None
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
            None if self.said is None else self.said.to(device),
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
            None if self.said is None else self.said[index],
            None if self.states is None else self.states[index, :length],
            None if self.seen is None else self.seen[index],
        )


Worded = Sequence[tuple[str, list[int]]]  # of each item, see ``worded``
# {kind: (rows (n, V), present (B,) bool)}: what is said of B items, a row an item of which there is something to say
Told = dict[str, tuple[Tensor, Tensor]]


def worded(language: Language, prompt: Prompt, fields: list[dict[str, str]]) -> Worded:
    """What a prompt says of each item before the picture's place, and the tokens after it, none where all is empty."""
    empty = prompt.render(**dict.fromkeys(prompt.inputs, "")).partition(IMAGE)[2].strip()
    rows = []
    for item in fields:
        before, _, after = prompt.render(**item).partition(IMAGE)
        # no model reads the row as it is: a text longer than the model's context is no mistake here
        known = language.tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append((before, known if after.strip() != empty else []))
    return rows


def tokenise(
    language: Language,
    items: Worded,
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
    counts = {m: soft if isinstance(soft, int) else soft[m] for m in senses}
    here = {m: p.tolist() for m, p in senses.items()}
    for i, (before, tail) in enumerate(items):
        head = tok(before, add_special_tokens=False)["input_ids"]
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


@torch.no_grad()
def word_means(language: Language, items: Worded) -> Tensor:
    """The mean of the input embeddings of each item's words, however many: -> (I, W), zero for an item without words.

    A bag of words costs nothing, and it does not end where the language model's row does.
    """
    table = language.model.get_input_embeddings().weight  # type: ignore[operator]
    rows = [torch.tensor(tail, dtype=torch.long) for _, tail in items]
    lengths = torch.tensor([len(r) for r in rows])
    starts = lengths.cumsum(0) - lengths
    ids = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    found: Tensor = torch.nn.functional.embedding_bag(ids.to(table.device), table, starts.to(table.device), mode="mean")
    return found.float().cpu()


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


class Backbone(nn.Module):
    """Vision tower, further senses and language model under one set of heads.

    [prompt | soft tokens | words | EMB] -> language model -> joint states: the read-out h_EMB and the mean over the
    item's own tokens (a bidirectional model gives the mean alone). Beside them, around the language model: the pooled
    picture and its patches' mean, the mean of the words' embeddings (and of their states above frozen layers), and each
    further modality's pooled state. All are whitened (``Whiten``, fitted on what the towers say before they train) and
    go to ``Heads``: early over those of the pretrained towers, late over each modality alone. The towers come frozen or
    with LoRA; resamplers, further senses and heads train.

    ``senses`` are encoders of modalities besides pictures and words: called on what is present they give pooled (B, P)
    and tokens (B, N, P), and have ``pooled_width`` and ``token_width``. ``paths`` limits what is fused ("early" and
    modalities): without "early" the language model is not run. ``fusion`` is one of ``fusion.FUSIONS``; ``keep`` is
    how many axes of a state the heads hear.

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
        keep: int = KEEP,
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
        widths = {"image": [vision.pooled_width, vision.token_width], "text": [width, width] if enter else [width]}
        widths |= {m: [s.pooled_width] for m, s in self.senses.items()}  # type: ignore[list-item]
        everything = (EARLY, *widths)
        self.paths = everything if paths is None else tuple(paths)
        if EARLY in self.paths:
            widths = {JOINT: [width] * (1 + self.causal)} | widths
        else:
            widths = {m: w for m, w in widths.items() if m in self.paths}
        self.whiten = nn.ModuleDict({m: Whiten(w, keep=keep) for m, w in widths.items()})
        told: dict[str, int] = {m: w.width for m, w in self.whiten.items()}  # type: ignore[misc]
        pretrained = [m for m in told if m not in self.senses]
        self.heads = Heads(told, dim, paths=self.paths, fusion=fusion, early=pretrained)
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

    def entering(self, items: Items) -> Tensor:
        """States of the rows where soft tokens come in, without them: (B, L, W)."""
        return self.below(items.tokens) if items.states is None else items.states

    def assemble(self, items: Items, soft: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What enters the language model (B, L, W), and the attention mask (B, L). ``soft`` are each modality's soft
        tokens, of the items that have it, in order."""
        x = self.entering(items)
        for number, modality in enumerate(("image", *self.senses)):
            tokens, here = soft.get(modality), (items.tokens == place(number))[..., None]
            if tokens is None:
                x = x.masked_fill(here, 0.0)
            elif tokens.numel():
                # rows of ``tokens`` are those of the items that have it, in order, as are the places for them
                x = x.masked_scatter(here, tokens.to(x.dtype))
        x = torch.where((items.tokens == READ)[..., None], self.read, x)
        return x, items.tokens != PAD

    def _heard(self, items: Items) -> Tensor:
        """The mean of the words' embeddings, (B, W); above frozen layers that of their states beside it, (B, 2 W)."""
        assert items.said is not None  # see ``word_means``
        if not self.enter:
            return items.said
        # what a word is by itself is lost on the way up: both are kept
        x, words = self.entering(items), items.words[..., None]
        context = (x * words).sum(1) / words.sum(1).clamp(min=1)
        return torch.cat([items.said.to(context.dtype), context], dim=1)

    def states(self, items: Items) -> Told:
        """What the towers say, before whitening and heads; kinds are the modalities and ``joint``."""
        sensed, tokens = self._sensed(items)
        soft = {m: self.resamplers[m](t) for m, t in tokens.items()} if EARLY in self.paths else {}
        return sensed | self._towered(items, soft)

    def towers(self, items: Items) -> Told:
        """What the pretrained towers say with nothing at the places of further senses: no encoder that is trained from
        nothing has a part in it."""
        return self._towered(items, {})

    def _sensed(self, items: Items) -> tuple[Told, dict[str, Tensor]]:
        """What the further senses say, and their tokens (n, N, P)."""
        found: Told = {}
        every: dict[str, Tensor] = {}
        for m, sense in self.senses.items():
            here = items.present[m]
            if (m in self.paths or EARLY in self.paths) and bool(here.any()):
                pooled, every[m] = sense(items.raw[m][here])
                found[m] = pooled, here
        return found, every

    def _towered(self, items: Items, soft: Mapping[str, Tensor]) -> Told:
        """What the pretrained towers say, ``soft`` being the soft tokens of the senses."""
        found: Told = {}
        early = EARLY in self.paths
        image, text = items.present["image"], items.present["text"]
        if ("image" in self.paths or early) and bool(image.any()):
            pooled, patches = self.look(items.raw["image"][image], None if items.seen is None else items.seen[image])
            found["image"] = torch.cat([pooled, patches.mean(dim=1)], dim=1), image
            if early:
                soft = {"image": self.resampler(patches), **soft}
        if ("text" in self.paths or early) and bool(text.any()):
            found["text"] = self._heard(items)[text], text
        if early:
            x, mask = self.assemble(items, soft)
            model = layers_of(_own(self.language), self.enter) if self.enter else self.language
            h = model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state
            some = torch.stack(list(items.present.values())).any(dim=0)
            found[JOINT] = self._read_out(h, items.tokens, mask)[some], some
        return found

    def _read_out(self, h: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Output states (B, L, W) -> joint states (B, W), of a causal model (B, 2 W)."""
        if not self.causal:
            return (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        # rows are padded on the right, so the read-out is the last valid token; one state that was trained to foretell
        # a word holds little of an item, so the mean over its tokens stands beside
        last = h[torch.arange(len(h), device=h.device), mask.sum(1) - 1]
        own = (mask & (tokens != READ))[..., None]
        return torch.cat([last, (h * own).sum(1) / own.sum(1).clamp(min=1)], dim=1)

    @torch.no_grad()
    def fit_whitening(self, blocks: Iterable[Items]) -> None:
        """Fit the whitening on what the towers say of these items as they are: give train items, before training."""
        rows: dict[str, list[Tensor]] = {}
        for items in blocks:
            for kind, (states, _) in self.states(items).items():
                rows.setdefault(kind, []).append(states)
        for kind, parts in rows.items():
            self.whiten[kind].fit(torch.cat(parts))  # type: ignore[operator]

    def forward(self, items: Items, towers: Told | None = None) -> Content:
        """Content of items, by all paths; a path's vector is zero where an item has it not. ``towers`` is what the
        pretrained ones say of these items, where it is known already."""
        found = self.states(items) if towers is None else self._sensed(items)[0] | towers
        states, present = {}, {}
        for kind, whiten in self.whiten.items():
            if kind in found:
                rows, present[kind] = found[kind]
                states[kind] = scattered(whiten(rows), present[kind])
            else:
                states[kind] = self.read.new_zeros((len(items), self.heads.widths[kind]))
                present[kind] = torch.zeros(len(items), dtype=torch.bool, device=self.read.device)
        content: Content = self.heads(states, present)
        return content


def scattered(rows: Tensor, here: Tensor) -> Tensor:
    """Rows (n, V) of the items that have something, at their places, zeros elsewhere: here (B,) bool -> (B, V)."""
    return rows.new_zeros(len(here), rows.shape[1]).masked_scatter(here[:, None], rows)


def _own(tower: Any) -> Any:
    """The tower itself, out of PEFT's wrapping (its adapters are inside its layers)."""
    return tower.get_base_model() if hasattr(tower, "get_base_model") else tower

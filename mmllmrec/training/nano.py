"""Makes ``adapters/nano-base``: a small CLIP, a small causal language model, their tokenizer and resampler.

``python -m mmllmrec.training.nano adapters/nano-base`` trains all of it on catalogues of both planted worlds, made with
seeds that no dataset in notebooks or benchmarks uses. No interaction is read. Three stages: contrastive (picture and a
caption that says what is to be seen), next token on the worlds' words, and next token after an item's soft tokens.

Legend: B batch, L tokens, K soft tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmllmrec import losses
from mmllmrec.data.atelier import atelier
from mmllmrec.encoders.backbone import PAD, READ, SOFT, Backbone, Items, tokenise, worded
from mmllmrec.features.prompts import load_prompt
from mmllmrec.features.towers import Language, load_language, load_vision, normalise, save_clip
from mmllmrec.runcard import RunCard, write_atomically
from mmllmrec.seed import generator, seed_everything

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
SIZES: dict[str, Any] = {
    "vision": {"image_size": 64, "layers": 4, "width": 96, "head_width": 24, "patch_size": 16},
    "text": {"context_length": 32, "width": 64, "heads": 4, "layers": 2},
    "language": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    },
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    items: int = 3000  # a world
    seeds: tuple[int, int] = (1_000_003, 1_000_033)  # of the two worlds' catalogues
    vocabulary: int = 1024
    clip_steps: int = 600
    clip_batch: int = 256
    language_steps: int = 500
    language_batch: int = 128
    soft: int = 4
    tokens: int = 64
    lr: float = 2e-3
    seed: int = 0


def pretrain(folder: Path, recipe: Recipe) -> RunCard:
    """Train all parts and write ``folder`` at once: clip/, language/, resampler.safetensors and card.json."""
    began = time.perf_counter()
    seed_everything(recipe.seed)
    worlds = [
        atelier(name, seed=seed, n_items=recipe.items, n_users=20, n_events=200, missing=0.0)
        for name, seed in zip(("atelier", "atelier-b"), recipe.seeds, strict=True)
    ]
    pixels = torch.from_numpy(np.concatenate([w.catalog.pixels(64) for w in worlds]))
    fields = [f for w in worlds for f in w.catalog.words()]
    captions = [c for w in worlds for c in w.captions()]

    def make(beside: Path) -> RunCard:
        beside.mkdir(parents=True)
        corpus = [*captions, *(f"{f['title']} {f['text']}" for f in fields)]
        tokenizer(beside / "language", corpus, vocabulary=recipe.vocabulary)
        clip = contrastive(beside, pixels, captions, recipe)
        spoken = next_token(beside, pixels, fields, captions, recipe)
        card = RunCard(
            kind="pretrain",
            name="nano-base",
            seed=recipe.seed,
            data=f"catalogues of atelier and atelier-b, seeds {recipe.seeds}, {recipe.items} items each",
            settings={**asdict(recipe), **SIZES, "command": "python -m mmllmrec.training.nano adapters/nano-base"},
            metrics={**clip, **spoken},
            seconds=round(time.perf_counter() - began, 1),
        )
        card.save(beside / "card.json")
        return card

    made: list[RunCard] = []
    write_atomically(folder, lambda beside: made.append(make(beside)))
    return made[0]


def tokenizer(folder: Path, corpus: list[str], *, vocabulary: int) -> None:
    """A lower-case BPE tokenizer of the worlds' words, in ``transformers``' format."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def causal(tok: Any, sizes: dict[str, Any]) -> Any:
    """A causal language model of random weights for a tokenizer of ``tokenizer``'s."""
    from transformers import LlamaConfig, LlamaForCausalLM

    marks = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}  # places in SPECIAL
    about: dict[str, Any] = {"vocab_size": len(tok), "tie_word_embeddings": True, **marks, **sizes}
    return LlamaForCausalLM(LlamaConfig(**about))


def _padded(rows: list[list[int]], length: int) -> Tensor:
    table = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        table[i, : min(len(row), length)] = torch.tensor(row[:length])
    return table


def _optimiser(parameters: Any, steps: int, lr: float) -> tuple[torch.optim.Optimizer, Any]:
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps + 1, pct_start=0.1)
    return optimiser, schedule


def contrastive(folder: Path, pixels: Tensor, captions: list[str], recipe: Recipe) -> dict[str, float]:
    """The CLIP: symmetrical softmax over a batch, with equal captions no negatives of each other. One item in 16 is
    kept aside; returns how often the right caption, among the distinct captions of those, is the nearest one."""
    from open_clip.model import CLIP

    tok = _tokenizer(folder / "language")
    about = {
        "embed_dim": 64,
        "vision_cfg": SIZES["vision"],
        "text_cfg": {**SIZES["text"], "vocab_size": len(tok), "pool_type": "argmax"},
    }
    clip = CLIP(**about)
    # open_clip reads a caption at its highest token id: the end mark is given the last id of the vocabulary
    end = len(tok) - 1
    length = SIZES["text"]["context_length"]
    rows = [[*tok(c)["input_ids"][: length - 1], end] for c in captions]
    tokens = _padded(rows, length)
    numbers: dict[str, int] = {}
    same = torch.tensor([numbers.setdefault(c, len(numbers)) for c in captions])
    aside = torch.arange(len(captions)) % 16 == 15
    train = torch.nonzero(~aside)[:, 0]
    optimiser, schedule = _optimiser(clip.parameters(), recipe.clip_steps, recipe.lr)
    rng = generator(recipe.seed, "clip")
    bar = tqdm(range(recipe.clip_steps), desc="contrastive")
    for _ in bar:
        pick = train[torch.from_numpy(rng.choice(len(train), recipe.clip_batch, replace=False))]
        image, text, scale = clip(normalise(pixels[pick]), tokens[pick])[:3]
        target, mask = torch.arange(len(pick)), same[pick][:, None] == same[pick][None]
        loss = (
            sum(losses.sampled_softmax(a * scale, b, target, mask=mask) for a, b in ((image, text), (text, image))) / 2
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss):.3f}", log_candidates=f"{np.log(len(pick)):.3f}")
    clip.eval()
    with torch.no_grad():
        held = torch.nonzero(aside)[:, 0]
        distinct = {int(s): int(i) for i, s in zip(held, same[held], strict=True)}
        texts = F.normalize(clip.encode_text(tokens[list(distinct.values())]), dim=-1)
        images = F.normalize(torch.cat([clip.encode_image(normalise(pixels[p])) for p in held.split(256)]), dim=-1)
        nearest = torch.tensor(list(distinct))[(images @ texts.T).argmax(1)]
        hit = float((nearest == same[held]).float().mean())
    save_clip(folder / "clip", clip, about)
    return {"caption_recall_at_1": round(hit, 4), "caption_chance": round(1 / len(distinct), 5)}


def next_token(
    folder: Path, pixels: Tensor, fields: list[dict[str, str]], captions: list[str], recipe: Recipe
) -> dict[str, float]:
    """The language model and the resampler: half of the rows say the item's words, half also what is seen in it, after
    the soft tokens of its picture (the vision tower is frozen). Returns the loss a token, in nats, on
    items kept aside."""
    tok = _tokenizer(folder / "language")
    model = causal(tok, SIZES["language"])
    config = model.config
    vision = load_vision(str(folder / "clip"))
    language = Language(model.model, tok, causal=True, width=config.hidden_size, hash="")
    backbone = Backbone(vision, language, dim=8, soft=recipe.soft)
    backbone.vision.requires_grad_(False).eval()
    seen = [{"title": c, "text": f"{f['title']}. {f['text']}"} for f, c in zip(fields, captions, strict=True)]
    everyone = torch.ones(len(fields), dtype=torch.bool)
    prompt = load_prompt("item")
    kinds = []
    for words, image in ((fields, ~everyone), (seen, everyone)):
        tokens, own = tokenise(
            language, worded(language, prompt, words), {"image": image}, soft=recipe.soft, length=recipe.tokens
        )
        kinds.append(Items(tokens, own, {"image": pixels}, {"image": image, "text": everyone}))
    aside = np.arange(len(fields)) % 16 == 15
    train = np.flatnonzero(~aside)
    trained = [*model.parameters(), *backbone.resampler.parameters(), backbone.read]
    optimiser, schedule = _optimiser(trained, recipe.language_steps, recipe.lr)
    rng = generator(recipe.seed, "language")

    def loss_of(items: Items) -> Tensor:
        soft: dict[str, Tensor] = {}
        if items.present["image"].any():
            with torch.no_grad():
                _, patches = backbone.look(items.raw["image"])
            soft["image"] = backbone.resampler(patches)
        x, mask = backbone.assemble(items, soft)
        logits = model.lm_head(model.model(inputs_embeds=x, attention_mask=mask.long()).last_hidden_state)
        target = items.tokens.masked_fill((items.tokens == READ) | (items.tokens == SOFT), PAD)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten(), ignore_index=PAD)

    bar = tqdm(range(recipe.language_steps), desc="next token")
    for step in bar:
        pick = torch.from_numpy(rng.choice(train, recipe.language_batch, replace=False))
        loss = loss_of(kinds[step % 2].take(pick))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{float(loss):.3f}", log_vocabulary=f"{np.log(len(tok)):.3f}")
    model.eval()
    with torch.no_grad():
        held = torch.from_numpy(np.flatnonzero(aside))
        values = [float(loss_of(kind.take(held))) for kind in kinds]
    model.model.save_pretrained(folder / "language")
    state = {f"{k}": v.detach().contiguous() for k, v in backbone.resampler.state_dict().items()}
    save_file({**state, "read": backbone.read.detach()}, folder / "resampler.safetensors")
    load_language(str(folder / "language"))  # what was written can be read
    return {"words_nats": round(values[0], 4), "seen_and_words_nats": round(values[1], 4)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    print(json.dumps(pretrain(parser.parse_args().folder, Recipe()).as_dict(), indent=1))

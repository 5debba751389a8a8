"""Tiny towers with random weights in the shipped layout, for tests of plumbing (never of quality)."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import IdMap, Interactions
from mmllmrec.models.unified import Preset
from mmllmrec.seed import seed_everything
from mmllmrec.shipped import shipped

WORDS = ["<pad>", "<unk>", "An", "item", "called", "red", "blue", "green", "lamp", "vase", "bowl", "of", "."]


def tiny_preset(folder: Path) -> Preset:
    """Write a CLIP (17 patches) and a two-layer causal language model; both about 30,000 parameters."""
    seed_everything(0)
    vocabulary = {w: i for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(folder / "language")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **sizes)).save_pretrained(folder / "language")
    about = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": len(WORDS), "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "clip").mkdir()
    save_file(CLIP(**about).state_dict(), folder / "clip" / "open_clip_model.safetensors")
    config = {"model_cfg": about, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    return Preset(vision=str(folder / "clip"), language=str(folder / "language"), rank=3, tokens=16, soft=2)


def random_causal(folder: Path, *, context: int = 512) -> Path:
    """A causal language model of random weights, as a user's own model would lie in a folder; its words are nano's."""
    seed_everything(0)
    sizes = {"hidden_size": 16, "intermediate_size": 23, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=720, max_position_embeddings=context, bos_token_id=2, eos_token_id=3, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped("adapters/nano-base") / "language" / name, folder)
    return folder


def tiny_world(users: int = 7, items: int = 11) -> tuple[Interactions, Catalog]:
    """Events that leave item 5 cold and user 3 without one; item 2 has no picture, item 4 no text, item 6 neither."""
    rng = np.random.default_rng(1)
    cells = rng.choice(users * items, 40, replace=False)
    cells = cells[(cells % items != 5) & (cells // items != 3)]
    item_ids = IdMap([f"i{n}" for n in range(items)], what="item id")
    train = Interactions(cells // items, cells % items, None, IdMap([f"u{n}" for n in range(users)]), item_ids)

    def picture() -> dict:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    nouns, colours = ["lamp", "vase", "bowl"], ["red", "blue", "green"]
    rows = {
        "item_id": item_ids.ids,
        "title": [f"{colours[n % 3]} {nouns[n // 3 % 3]}" for n in range(items)],
        "text": ["" if n in (4, 6) else f"{nouns[n % 3]} of {colours[n % 2]} ." for n in range(items)],
        "image": [None if n in (2, 6) else picture() for n in range(items)],
    }
    string = datasets.Value("string")
    features = datasets.Features(item_id=string, title=string, text=string, image=datasets.Image(decode=False))
    return train, Catalog(datasets.Dataset.from_dict(rows, features=features), item_ids)


def sensing_world() -> tuple[Interactions, Catalog]:
    """``tiny_world`` with a second of sound, four sensor channels, and a table of features called ``taste``; items 1
    and 6, 3, and 8 have none of it."""
    train, catalog = tiny_world()
    rng = np.random.default_rng(2)
    n = len(catalog)
    sound = [None if i in (1, 6) else rng.normal(size=4000).astype(np.float32).tolist() for i in range(n)]
    smell = [None if i == 3 else rng.random(4).astype(np.float32).tolist() for i in range(n)]
    numbers = datasets.List(datasets.Value("float32"))
    rows = catalog.dataset.add_column("audio", sound, feature=numbers).add_column("sensor", smell, feature=numbers)
    absent = {"taste": np.arange(n) == 8}
    taste = {"taste": rng.normal(size=(n, 6)).astype(np.float32)}
    return train, Catalog(rows, catalog.item_ids, features=taste, absent=absent)

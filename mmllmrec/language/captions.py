"""What a picture shows, in words: an image tower's soft tokens, read by the language model that was trained with them.

Legend: B pictures, S pixels a side, K soft tokens, N patches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError
from mmllmrec.encoders.backbone import Resampler
from mmllmrec.features.prompts import IMAGE, load_prompt
from mmllmrec.features.towers import load_causal, load_vision, look_above, look_below, normalise
from mmllmrec.models.base import read_tensors
from mmllmrec.shipped import shipped

BATCH = 256
MARK = "\ue000"  # stands where the caption goes, and in no text


@torch.no_grad()
def captions(
    catalog: Catalog, *, source: str | Path = "nano", max_tokens: int = 24, progress: bool = True
) -> list[str]:
    """One sentence about each picture, empty where an item has none: greedy, up to the first full stop.

    ``source`` is ``"nano"`` (shipped; it knows the planted worlds' pictures) or a folder as ``mmllmrec.training.nano``
    writes it: ``clip/``, ``language/`` and ``resampler.safetensors``. Raises ``DataError`` for a folder without them
    and for a catalogue without pictures.
    """
    folder = shipped("adapters/nano-base") if source == "nano" else Path(source)
    missing = [n for n in ("clip", "language", "resampler.safetensors") if not (folder / n).exists()]
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}: give 'nano', or a folder of mmllmrec.training.nano")
    if "image" not in catalog.modalities:
        raise DataError(f"{catalog.name} has no pictures: its modalities are {list(catalog.modalities)}")
    vision = load_vision(str(folder / "clip"))
    model, tokenizer = load_causal(str(folder / "language"))
    state = read_tensors(folder / "resampler.safetensors")
    state.pop("read")
    resampler = Resampler(vision.token_width, model.config.hidden_size, tokens=len(state["queries"]))
    resampler.load_state_dict(state)
    resampler.eval()
    before, _, after = load_prompt("item").render(title=MARK, text="").partition(IMAGE)
    table = model.get_input_embeddings()
    around = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, after.split(MARK)[0].rstrip())]
    ends = [table(torch.tensor(ids)) for ids in around]
    found, pixels = [""] * len(catalog), catalog.pixels(vision.size)
    here = np.flatnonzero(catalog.present("image"))
    for part in tqdm(np.split(here, range(BATCH, len(here), BATCH)), desc="captions", disable=not progress):
        seen = normalise(torch.from_numpy(pixels[part]))
        _, patches = look_above(vision.model, look_below(vision.model, seen, 0), 0)
        rows: list[Tensor] = [ends[0].expand(len(part), -1, -1), resampler(patches), ends[1].expand(len(part), -1, -1)]
        x = torch.cat(rows, dim=1)
        written = model.generate(
            inputs_embeds=x,
            attention_mask=torch.ones(x.shape[:2], dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for item, tokens in zip(part, written, strict=True):
            found[item] = tokenizer.decode(tokens, skip_special_tokens=True).split(".")[0].strip()
    return found

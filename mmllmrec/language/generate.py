"""Text from a local language model: batched, held to a prompt's schema, kept on disk and taken up again.

Legend: N rows, A answers, B rows of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, TemperatureLogitsWarper, TopPLogitsWarper

from mmllmrec.data.interactions import DataError
from mmllmrec.data.sampling import packed, sharing
from mmllmrec.features import adapters
from mmllmrec.features.prompts import Prompt
from mmllmrec.features.towers import load_causal, logits_at, sees_all, still, weights_hash
from mmllmrec.language.schema import Grammar, Held
from mmllmrec.runcard import content_hash, drop_torn_line
from mmllmrec.seed import generator as numbers
from mmllmrec.shipped import shipped

SHIPPED = {"nano": "adapters/nano-base/language", "nano-writer": "adapters/nano-writer"}
TOKENS = 8192  # of a batch on a CPU, those to be written among them
MORE = 8  # times as many elsewhere
CONTEXT = 1024  # of ``nano``: its rotary positions have no end, and its instruction adapters were trained this far
ANSWER = ("text", "tokens_in", "tokens_out", "cut", "seconds")  # what is kept of one
HISTORY = "history"  # the field of a prompt whose first entries are the oldest


@dataclass(frozen=True)
class Generated:
    """One answer: its text; its value, parsed where the prompt has a schema, else the text; tokens read and written;
    ``cut`` where the budget of tokens ended it; ``seconds``, its share of its batch's when it was written."""

    text: str
    value: Any
    tokens_in: int
    tokens_out: int
    cut: bool
    seconds: float = field(default=0.0, compare=False)


@dataclass
class Generator:
    """A causal language model that writes. ``hash`` is that of its weights and adapter; ``context`` the most tokens it
    reads and writes in a row. ``read`` counts the tokens of all prompts so far, and ``seconds`` what was spent on them;
    an answer that was kept counts what it took when it was written."""

    model: Any
    tokenizer: Any
    name: str
    hash: str
    context: int
    read: int = 0
    seconds: float = 0.0

    @classmethod
    def load(
        cls,
        source: str = "nano",
        *,
        adapter: str | os.PathLike[str] | None = None,
        context: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Self:
        """``"nano"`` or ``"nano-writer"`` (shipped: both speak the planted worlds' language, and the second was taught
        to answer this library's prompts), or a ``transformers`` folder or hub id.

        ``adapter`` is a LoRA's folder in PEFT's format, merged into the weights; ``context`` is the configuration's
        unless given. Raises ``DataError`` for what is not there, has no tokenizer, is no causal model, or would need
        code or pickles.
        """
        where = str(shipped(SHIPPED[source])) if source in SHIPPED else source
        model, tokenizer = load_causal(where)
        if adapter is not None:
            model = adapters.merged(model, Path(adapter))
        limit = int(getattr(model.config, "max_position_embeddings", 0) or CONTEXT)
        context = context or (CONTEXT if source == "nano" else limit)
        name = source if not Path(source).exists() else Path(source).name
        model = model.to(device=device, dtype=dtype).eval()
        # what fills up a configuration of ours: a model's own may hold beams, or penalties that look at the padding
        model.generation_config = GenerationConfig(eos_token_id=getattr(model.generation_config, "eos_token_id", None))
        return cls(model, tokenizer, name, identity(model, tokenizer), context)

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those that the model's own settings name."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        listed = own if isinstance(own, list) else [own]
        return list(dict.fromkeys(t for t in (self.tokenizer.eos_token_id, *listed) if t is not None))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        found: torch.device = next(self.model.parameters()).device
        return found

    def adapted(self, folder: str | os.PathLike[str]) -> Self:
        """The same with a LoRA's folder (PEFT's format) merged into a copy of the weights."""
        model = adapters.merged(copy.deepcopy(self.model), Path(folder)).eval()
        return replace(self, model=model, hash=identity(model, self.tokenizer), read=0, seconds=0.0)

    @cached_property
    def _marks(self) -> list[str]:
        # those that are not called special (``<think>``) are read as one token too; runs of blanks are no marks
        added = (str(t) for t in self.tokenizer.added_tokens_decoder.values())
        return sorted({*self.tokenizer.all_special_tokens, *(t for t in added if len(t) > 1 and not t.isspace())})

    def _plain(self, text: str) -> str:
        """A text in which the tokenizer's own marks (``<eos>``, ``<|im_end|>``) are spelled out and are none."""
        for mark in self._marks:
            text = text.replace(mark, f"{mark[:1]} {mark[1:]}")
        return text

    def said(self, answer: str) -> list[int]:
        """An answer's tokens, as they follow a prompt; marks that it holds are spelled out."""
        return list(self.tokenizer(self._plain(answer), add_special_tokens=False)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """A prompt's tokens: in the model's chat format where its tokenizer has one. What a text holds of the
        tokenizer's own marks (``<eos>``, ``<|im_end|>``) is spelled out and is none."""
        text = self._plain(text)
        if getattr(self.tokenizer, "chat_template", None):
            said = [{"role": "user", "content": text}]
            found = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
            return list(found["input_ids"])
        return list(self.tokenizer(text)["input_ids"])

    def generate(
        self,
        prompt: Prompt,
        rows: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = 256,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_tokens: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        shorten: bool = False,
        progress: bool = True,
    ) -> list[Generated]:
        """An answer a row, ``rows`` being the prompt's fields.

        Greedy, unless ``sample``: then from the softmax over ``temperature``, cut to ``top_p`` of its mass, by numbers
        that are drawn for each row alone (``seed`` and the row), whatever is asked beside it.
        Where the prompt has an ``output`` schema the text is held to it while it is written (``llguidance``), so that
        any model, trained or not, gives JSON that parses and validates; at ``max_tokens`` open strings, lists and
        objects are closed. Rows are batched by length, at most ``batch_tokens`` tokens a batch (unless given
        8,192 on a CPU and 65,536 elsewhere; four times as many in the cache, where they begin alike); equal rows are
        answered once, and what rows that follow one another begin with alike is read once. With ``folder`` answers are
        kept in a JSON-lines file by model, prompt and settings, written batch by batch: a run that was killed goes on
        there. A line that was cut off is dropped and written anew. ``shorten``: a row that renders longer than the
        ``context`` allows loses the oldest of its history, the last of its other lists and the ends of its texts, the
        longest first, until it fits.

        Raises ``DataError`` for a row that is too long all the same, for a schema that cannot be held, and for a file
        of answers with a broken line in its middle.
        """
        if max_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1:
            raise DataError(
                f"max_tokens={max_tokens} is 1 or more, temperature={temperature} above 0, top_p={top_p} a share"
            )
        # as it stands: the order of a schema's properties is that in which they are written
        settings: dict[str, Any] = {"max_tokens": max_tokens, "schema": json.dumps(prompt.output)}
        if sample:
            settings["sample"] = [temperature, top_p, seed]
        asked = self._asked(prompt, rows, max_tokens, shorten=shorten)
        keys = [content_hash(self.hash, ids, settings) for ids in asked]
        kept = _Kept(folder, content_hash(self.hash, prompt.hash, settings), ANSWER)
        grammar = None if prompt.output is None else Grammar(self, prompt.output)
        left = {key: ids for key, ids in zip(keys, asked, strict=True) if key not in kept.found}
        names, distinct = list(left), list(left.values())
        bar = self._bar(prompt, keys, left, unit="answer", progress=progress)
        written = 0
        for group in _grouped(
            distinct, [1] * len(distinct), self._room(batch_tokens), more=max_tokens, share=self._shares
        ):
            some = [names[n] for _, part in group for n in part]
            drawn = _Drawn(seed, some, temperature, top_p) if sample else None
            began = time.perf_counter()
            with still(self.model):
                answers = self._write(group, distinct, max_tokens, grammar, drawn)
            share = round((time.perf_counter() - began) / len(some), 6)
            kept.add({key: {**one, "seconds": share} for key, one in zip(some, answers, strict=True)})
            written += sum(a["tokens_out"] for a in answers)
            bar.update(len(some))
            if bar.format_dict["elapsed"] > 0:
                bar.set_postfix_str(f"{written / bar.format_dict['elapsed']:.0f} tokens/s")
        bar.close()
        self.seconds += kept.seconds(keys)
        return [self._told(prompt, kept.found[key]) for key in keys]

    def likelihoods(
        self,
        prompt: Prompt,
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[str],
        *,
        batch_tokens: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        shorten: bool = False,
        progress: bool = True,
    ) -> Tensor:
        """log p(answer | prompt) of each of ``answers`` after each row, (N, A) float32; a sum over an answer's tokens.

        Answers of one token each are read off one pass a row. ``folder`` and ``shorten`` as in ``generate``. Raises
        ``DataError`` for an answer without a token and for a row that is too long.
        """
        said = [self.said(a) for a in answers]
        if not said or not all(said):
            raise DataError(f"answers={list(answers)}: give one or more, each with a token")
        asked = self._asked(prompt, rows, max(map(len, said)), shorten=shorten)
        keys = [content_hash(self.hash, ids, said) for ids in asked]
        kept = _Kept(folder, content_hash(self.hash, prompt.hash, said), ("values", "seconds"))
        left = {key: ids for key, ids in zip(keys, asked, strict=True) if key not in kept.found}
        names, distinct = list(left), list(left.values())
        single = all(len(end) == 1 for end in said)
        ends: list[list[int]] = [said[0]] if single else said
        whole = [[*ids, *end[:-1]] for ids in distinct for end in ends]
        counts = [len(end) for _ in distinct for end in ends]
        part: dict[str, list[float]] = {key: [0.0] * len(said) for key in names}
        due = dict.fromkeys(names, len(ends))
        bar = self._bar(prompt, keys, left, unit="row", progress=progress)
        for group in _grouped(whole, counts, self._room(batch_tokens), share=self._shares):
            began, done = time.perf_counter(), []
            with still(self.model):
                told = self._read(group, whole, counts)
            for place, steps in told:
                n, a = divmod(place, len(ends))
                if single:
                    part[names[n]] = steps[-1, [end[0] for end in said]].tolist()
                else:
                    part[names[n]][a] = float(steps.gather(1, torch.tensor(ends[a])[:, None]).sum())
                due[names[n]] -= 1
                if not due[names[n]]:
                    done.append(names[n])
            share = round((time.perf_counter() - began) / len(told) * len(ends), 6)
            kept.add({key: {"values": part[key], "seconds": share} for key in done})
            bar.update(len(done))
        bar.close()
        self.seconds += kept.seconds(keys)
        return torch.tensor([kept.found[key]["values"] for key in keys]).reshape(len(keys), len(said))

    def permutations(
        self,
        prompt: Prompt,
        rows: Sequence[Mapping[str, Any]],
        labels: Sequence[Sequence[str]],
        *,
        batch_tokens: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        shorten: bool = False,
        progress: bool = True,
    ) -> list[Generated]:
        """Each row's ``labels``, in the order in which the model writes them: greedy, but that only those are open that
        are left, a comma after each. ``value`` is that order, always all of the labels, each once. ``folder`` and
        ``shorten`` as in ``generate``.

        Raises ``DataError`` for labels of which one begins with another, for a row that is too long, and for a model
        that keeps no cache.
        """
        if getattr(self.model, "_is_stateful", False):
            raise DataError(f"{self.name} keeps a state and no cache: it cannot be held to a permutation")
        known = sorted({label for some in labels for label in some})
        spelled = {t: tuple(self.said(f" {t}")) for t in known}
        # the comma as it stands after a label: alone, it can be another token
        after = {t: self.said(f" {t},")[len(spelled[t]) :] for t in known}
        comma = next((more[0] for more in after.values() if more), self.said(",")[-1])
        for one, other in product(known, known):
            if one != other and spelled[other][: len(spelled[one])] == spelled[one]:
                raise DataError(f"labels {one!r} and {other!r}: {self.name} cannot tell where the first one ends")
        more = {n: sum(len(spelled[t]) + 1 for t in some) for n, some in enumerate(labels)}
        asked = self._asked(prompt, rows, max(more.values(), default=0), shorten=shorten)
        keys = [content_hash(self.hash, ids, list(some)) for ids, some in zip(asked, labels, strict=True)]
        kept = _Kept(folder, content_hash(self.hash, prompt.hash, "permutations"), ANSWER)
        left = {key: n for n, key in enumerate(keys) if key not in kept.found}
        bar = self._bar(prompt, keys, left, unit="list", progress=progress)
        for group in _batches({n: len(asked[n]) + more[n] for n in left.values()}, self._room(batch_tokens)):
            began = time.perf_counter()
            with still(self.model):
                orders = self._ordered([asked[n] for n in group], [labels[n] for n in group], spelled, comma)
            share = round((time.perf_counter() - began) / len(group), 6)
            about = [{"tokens_in": len(asked[n]), "tokens_out": more[n], "cut": False, "seconds": share} for n in group]
            answers = zip(group, orders, about, strict=True)
            kept.add({keys[n]: {"text": json.dumps(order), **one} for n, order, one in answers})
            bar.update(len(group))
        bar.close()
        self.seconds += kept.seconds(keys)
        found = []
        for key in keys:
            answer = dict(kept.found[key])
            order = json.loads(answer.pop("text"))
            found.append(Generated(", ".join(order), order, **answer))
        return found

    # -- inside -----------------------------------------------------------------------------------------------------

    def _ordered(
        self,
        rows: Sequence[list[int]],
        labels: Sequence[Sequence[str]],
        spelled: Mapping[str, tuple[int, ...]],
        comma: int,
    ) -> list[list[str]]:
        """The labels of a batch in the order in which they are written, a token a step."""
        left, orders = [list(some) for some in labels], [list[str]() for _ in labels]
        begun: list[tuple[int, ...]] = [() for _ in labels]  # what of a label is written
        ids, mask = self._padded(rows)
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        past: Any = None
        while any(left):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "past_key_values": past}
            scores, past = self._last(1, **inputs, use_cache=True)
            scores = scores[:, 0]
            written, before = [], ids[:, -1].tolist()
            for row, (some, order) in enumerate(zip(left, orders, strict=True)):
                size = len(begun[row])
                open_ = sorted({spelled[t][size] for t in some if spelled[t][:size] == begun[row]})
                # after a label, a comma; and commas, which nobody reads, when a row is through
                if not some or (order and not size and before[row] != comma):
                    written.append(comma)
                    continue
                written.append(open_[int(scores[row, open_].argmax())])
                begun[row] = (*begun[row], written[-1])
                if done := [t for t in some if spelled[t] == begun[row]]:
                    order.append(some.pop(some.index(done[0])))
                    begun[row] = ()
            ids = torch.tensor(written, device=self.device)[:, None]
            mask = torch.cat([mask, mask.new_ones(ids.shape)], dim=1)
            places = places[:, -1:] + 1
        return orders

    def _asked(self, prompt: Prompt, rows: Sequence[Mapping[str, Any]], more: int, *, shorten: bool) -> list[list[int]]:
        """The tokens of every row, checked against the context, or made to fit."""
        asked, began = [], time.perf_counter()
        for n, row in enumerate(rows):
            ids = self.ids(prompt.render(**row))
            while shorten and len(ids) + more > self.context and (shorter := _shorter(row)) is not None:
                row = shorter
                ids = self.ids(prompt.render(**row))
            if not ids or len(ids) + more > self.context:
                raise DataError(
                    f"row {n} of prompt {prompt.id!r} has {len(ids)} tokens, and {more} to write: {self.name} holds "
                    f"{self.context}; give shorter or fewer texts"
                )
            asked.append(ids)
            self.read += len(ids)
        self.seconds += time.perf_counter() - began
        return asked

    def _bar(self, prompt: Prompt, keys: Sequence[str], left: Collection[str], *, unit: str, progress: bool) -> Any:
        """A progress bar over distinct rows, of which those that are not ``left`` are done."""
        asked = len(set(keys))
        named = f"{self.name}, {prompt.id}"
        bar = tqdm(total=asked, desc=named, disable=not progress, unit=unit)
        bar.update(asked - len(left))
        return bar

    def _room(self, batch_tokens: int | None) -> int:
        """How many tokens a batch holds."""
        if batch_tokens is not None:
            return batch_tokens
        return TOKENS if self.device.type == "cpu" else MORE * TOKENS

    @cached_property
    def _shares(self) -> bool:
        """Whether what rows begin with alike can be read once."""
        return sees_all(self.model)

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Tokens padded on the left, and the mask of what is none: (B, L) each."""
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
        length = ids.shape[1]
        mask = torch.arange(length) >= length - torch.tensor([len(row) for row in rows])[:, None]
        return ids.to(self.device), mask.long().to(self.device)

    def _read(
        self, group: Sequence[tuple[int, list[int]]], rows: Sequence[list[int]], counts: Sequence[int]
    ) -> list[tuple[int, Tensor]]:
        """Log-probabilities of the tokens that follow the last ``counts`` places of some rows, each (count, V).

        ``group`` are numbers of tokens that rows share at their beginning, and the numbers of these rows: what they
        share is read once.
        """
        places = [n for _, some in group for n in some]
        past, _, mask = self._opened(group, rows)
        rest = [rows[n][size:] for size, some in group for n in some]
        ids, own = self._padded(rest)
        order = mask.sum(dim=1, keepdim=True) + (own.cumsum(dim=1) - 1).clamp(min=0)
        mask = torch.cat([mask, own], dim=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": order}
        inputs |= {} if past is None else {"past_key_values": past}
        steps, _ = self._last(max(counts[n] for n in places), **inputs, use_cache=past is not None)
        return [(n, steps[row, -counts[n] :]) for row, n in enumerate(places)]

    def _opened(self, group: Sequence[tuple[int, list[int]]], rows: Sequence[list[int]]) -> tuple[Any, Tensor, Tensor]:
        """What the rows of a batch share with others, read once: the cache, a line a row, or None where they share
        nothing; its tokens, and which of them are there, (B, P) each."""
        count = sum(len(some) for _, some in group)
        if not any(size for size, _ in group):
            none = torch.zeros(count, 0, dtype=torch.long, device=self.device)
            return None, none, none
        ids, mask = self._padded([rows[some[0]][:size] for size, some in group])
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = self.model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
        owner = torch.tensor([g for g, (_, some) in enumerate(group) for _ in some], device=self.device)
        out.past_key_values.batch_select_indices(owner)
        return out.past_key_values, ids[owner], mask[owner]

    def _last(self, count: int, **inputs: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the next token after each of the last ``count`` places of some inputs, (B, count, V) on
        the CPU, and the cache."""
        here = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        here[:, -count:] = True
        out = logits_at(self.model, here, **inputs)
        logits = out.logits.reshape(len(here), count, -1).float()
        return torch.log_softmax(logits, dim=-1).cpu(), getattr(out, "past_key_values", None)

    def _write(
        self,
        group: Sequence[tuple[int, list[int]]],
        rows: Sequence[list[int]],
        max_tokens: int,
        grammar: Grammar | None,
        drawn: _Drawn | None,
    ) -> list[dict[str, Any]]:
        """Answers of a batch, as they are kept."""
        past, begun, shared = self._opened(group, rows)
        ids, mask = self._padded([rows[n][size:] for size, some in group for n in some])
        ids, mask = torch.cat([begun, ids], dim=1), torch.cat([shared, mask], dim=1)
        held = None if grammar is None else Held(grammar, *ids.shape)
        ends, pad = self.ends, self.tokenizer.pad_token_id
        asked = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=pad if pad is not None else ends[0] if ends else 0,
        )
        whole = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past,
            generation_config=asked,
            logits_processor=[one for one in (held, drawn) if one is not None],
        )
        answers, lengths = [], [len(rows[n]) for _, some in group for n in some]
        for n, row in enumerate(whole[:, ids.shape[1] :].tolist()):
            over = next((k for k, token in enumerate(row) if token in ends), None)
            mine, cut = (row, True) if over is None else (row[:over], False)
            if grammar is not None:
                mine, cut = grammar.finished(mine)
            text = self.tokenizer.decode(mine, skip_special_tokens=grammar is None).strip()
            answers.append({"text": text, "tokens_in": lengths[n], "tokens_out": len(mine) + (not cut), "cut": cut})
        return answers

    def _told(self, prompt: Prompt, answer: Mapping[str, Any]) -> Generated:
        value = answer["text"] if prompt.output is None else json.loads(answer["text"])
        if prompt.output is not None:
            prompt.check(value)
        return Generated(value=value, **answer)


def identity(model: Any, tokenizer: Any) -> str:
    """Hash of a model's weights, their precision, its configuration, its tokenizer and what ends its answers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = {} if backend is None else json.loads(backend.to_str())
    words = {k: v for k, v in own.items() if k not in ("padding", "truncation")}  # they are of the call before
    ends = getattr(model.generation_config, "eos_token_id", None)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parts = weights_hash(model), str(next(model.parameters()).dtype), json.dumps(config, default=str)
    return content_hash(*parts, json.dumps(words), getattr(tokenizer, "chat_template", None) or "", str(ends))


class _Drawn:
    """A logits processor that draws each row's next token by numbers of the row's own, and leaves no other open."""

    def __init__(self, seed: int, keys: Sequence[str], temperature: float, top_p: float):
        self.numbers = [numbers(seed, "generate", key) for key in keys]
        self.shapers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shaped: Tensor = scores.float()
        for shaper in self.shapers:
            shaped = shaper(input_ids, shaped)
        mass = shaped.double().softmax(dim=-1).cumsum(dim=-1)
        point = torch.tensor([[rng.random()] for rng in self.numbers], dtype=torch.float64, device=mass.device)
        token = torch.searchsorted(mass, point * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


class _Kept:
    """What was answered by key, each with ``fields``, and the JSON-lines file it is written to, if any."""

    def __init__(self, folder: str | os.PathLike[str] | None, name: str, fields: Sequence[str]):
        self.path = None if folder is None else Path(folder) / f"{name}.jsonl"
        self.found: dict[str, dict[str, Any]] = {}
        if self.path is None or not self.path.is_file():
            return
        drop_torn_line(self.path)
        for number, line in enumerate(self.path.read_bytes().splitlines(), 1):
            try:
                one = json.loads(line)
                self.found[one.pop("key")] = {k: one[k] for k in fields}
            except (ValueError, KeyError, AttributeError, TypeError):
                raise DataError(f"{self.path}, line {number}: no answer; remove that line, or the file") from None

    def seconds(self, keys: Sequence[str]) -> float:
        """What distinct answers took when they were made."""
        return float(sum(self.found[key]["seconds"] for key in set(keys)))

    def add(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the answers that are new, on disk before anything else is done."""
        new = {k: dict(v) for k, v in answers.items() if k not in self.found}
        self.found |= new
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"key": k, **v}) + "\n" for k, v in new.items())
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())


def _batches(lengths: dict[Any, int], tokens: int) -> Iterator[list[Any]]:
    """Keys in batches of like length, the longest first: what does not fit is known at once."""
    return packed(sorted(lengths, key=lambda k: -lengths[k]), lengths, tokens)


def _grouped(
    rows: Sequence[list[int]], counts: Sequence[int], tokens: int, *, share: bool, more: int = 0
) -> Iterator[list[tuple[int, list[int]]]]:
    """Rows that follow one another and begin alike, told as (how many tokens they share, their numbers), in batches,
    those that share most first, then the longest: what does not fit is known at once. Nothing is shared without
    ``share``.

    ``counts`` are how many places at a row's end must be read apart, ``more`` how many tokens are written after it. A
    batch's rows hold at most 4 ``tokens`` tokens with what they share, which is a cache and not read again, or are one
    group.
    """

    def longest(some: Sequence[int]) -> int:
        return max(len(rows[n]) for n in some) + more

    groups = sharing(rows, counts, lambda _, some: share and len(some) * longest(some) <= 4 * tokens)
    batch: list[tuple[int, list[int]]] = []
    widest = held = 0
    for size, some in sorted(groups, key=lambda g: (-g[0], -len(rows[g[1][0]]))):
        widest = max(widest, longest(some))
        # those that share nothing are read as they are, and kept apart from those that do
        limit = 4 * tokens if size else tokens
        if batch and ((held + len(some)) * widest > limit or bool(size) != bool(batch[0][0])):
            yield batch
            batch, widest, held = [], longest(some), 0
        batch.append((size, some))
        held += len(some)
    if batch:
        yield batch


def _shorter(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A prompt's fields with the longest cut: a history loses its oldest quarter, another list of texts its last one,
    a text (alone in its list, or in a list of rows the longest) its second half. None where nothing is left to cut."""

    def size(value: Any) -> int:
        return len(value) if isinstance(value, str) else sum(map(size, _inside(value)))

    name = max(row, key=lambda field: size(row[field]), default="")
    value = row.get(name, "")
    if not size(value):
        return None
    if isinstance(value, str):
        cut: Any = value[: len(value) // 2]
    elif len(value) > 1 and isinstance(value[0], str):
        count = max(len(value) // 4, 1)
        cut = value[count:] if name == HISTORY else value[:-count]
    else:
        longest = max(range(len(value)), key=lambda n: size(value[n]))
        one = value[longest]
        shorter = one[: len(one) // 2] if isinstance(one, str) else _shorter(one)
        cut = [*value[:longest], shorter, *value[longest + 1 :]]
    return {**row, name: cut}


def _inside(value: Any) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()

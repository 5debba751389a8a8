"""A JSON schema as what a language model may write next, so that any model, trained or not, gives JSON that validates.

Legend: B rows of a batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from mmllmrec.data.interactions import DataError
from mmllmrec.seed import generator as numbers

if TYPE_CHECKING:
    from mmllmrec.language.generate import Generator

CLOSING = 4096  # steps in which an answer that was cut must come to an end
LETTERS = b"abcdefghijklmnopqrstuvwxyz0123456789@.:/-"  # what a pattern that is not yet met is tried with first
CLOSERS = (b'"', b"]", b"}")  # what ends a string, a list, an object, in the order in which it is tried


class Grammar:
    """A JSON schema as what may come next, for one tokenizer."""

    def __init__(self, writer: Generator, schema: Mapping[str, Any]):
        from llguidance import LLMatcher, LLTokenizer

        backend, ends = getattr(writer.tokenizer, "backend_tokenizer", None), writer.ends
        if backend is None:
            raise DataError(f"{writer.name}: only a fast tokenizer can be held to a schema")
        width = writer.model.get_output_embeddings().weight.shape[0]
        about = _literal(json.loads(backend.to_str()))
        tokens = LLTokenizer(json.dumps(about), n_vocab=width, eos_token=ends)
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides={"whitespace_flexible": False})
        self.first = LLMatcher(tokens, grammar)
        if self.first.is_error():
            raise DataError(f"this output schema cannot be held: {self.first.get_error()}")
        self.closers = [tokens.tokenize_bytes(c)[0] for c in CLOSERS]
        spelled = {b: tokens.tokenize_bytes(bytes([b])) for b in range(32, 127)}
        self.printable = [t[0] for t in spelled.values() if len(t) == 1]
        self.letters, self.ends = [spelled[b][0] for b in LETTERS if len(spelled[b]) == 1], set(ends)

    def start(self) -> Any:
        """A matcher for one answer."""
        return self.first.deep_copy()

    def finished(self, tokens: list[int]) -> tuple[list[int], bool]:
        """An answer's tokens to a whole value, and whether it had to be closed: what must follow, a closing mark where
        one may, else a letter, drawn (a pattern may want one that no order of trying comes to)."""
        matcher, tokens, rng = self.start(), list(tokens), numbers(0, "closing")
        matcher.consume_tokens(tokens)
        cut = not matcher.is_accepting()
        for _ in range(CLOSING):
            if matcher.is_accepting():
                return tokens, cut
            following = matcher.compute_ff_tokens()
            if not following:
                able = allowed(matcher)
                closing = [t for t in self.closers if able[t]]
                # a quotation mark ends a string; brackets and braces may be letters of one
                closes = closing and (closing[0] == self.closers[0] or rng.random() < 0.5)
                common, others = ([t for t in some if able[t]] for some in (self.letters, self.printable))
                drawn = common if common and rng.random() < 0.5 else others or np.flatnonzero(able).tolist()
                following = [closing[0] if closes else int(rng.choice(drawn))]
            if not matcher.consume_tokens(following):
                raise DataError(f"this output schema cannot be closed: {matcher.get_error()}")
            tokens += [t for t in following if t not in self.ends]
        raise DataError(
            f"this output schema was not closed in {CLOSING} steps: give more max_tokens, or a simpler pattern"
        )


class Held:
    """A logits processor that keeps each row of a batch to its grammar."""

    def __init__(self, grammar: Grammar, rows: int, start: int):
        self.matchers, self.start = [grammar.start() for _ in range(rows)], start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] > self.start:
            for matcher, token in zip(self.matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        able = torch.from_numpy(np.stack([allowed(m)[: scores.shape[1]] for m in self.matchers]))
        return scores.masked_fill(~able.to(scores.device), -math.inf)


def allowed(matcher: Any) -> np.ndarray:
    """Which tokens may come next, (V,) bool; V rounded up to a whole byte."""
    return np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little").astype(bool)


def spelling(tokenizer: Any) -> Callable[[str], list[int]]:
    """How a text is spelled where it is held to a schema, letter by letter: no space is put before it. What a model is
    to write there it should have learned like this."""
    literal = Tokenizer.from_str(json.dumps(_literal(json.loads(tokenizer.backend_tokenizer.to_str()))))
    return lambda text: list(literal.encode(text, add_special_tokens=False).ids)


def _literal(about: Any) -> Any:
    """A tokenizer's description without what changes a text on its way in: a forced ``{`` is to be that, and not a
    space and it."""
    if isinstance(about, list):
        return [_literal(one) for one in about if not (isinstance(one, dict) and one.get("type") == "Lowercase")]
    if isinstance(about, dict):
        dropped = {"add_prefix_space": False, "padding": None, "truncation": None}
        return {k: dropped[k] if k in dropped else _literal(v) for k, v in about.items()}
    return about

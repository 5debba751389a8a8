"""Prompts: files in ``prompts/`` with a small header, rendered strictly, hashed for the run card.

A prompt file opens with a YAML header between two lines of three dashes:

- ``id``: the file's name; ``version``: an integer; ``task``: what it is for, ``item`` where left out;
- ``inputs``: its fields and their types, ``text``, ``number``, ``texts`` (a list of text), or, for a list of rows,
  their own fields and types (``candidates: {label: text, item: text}``); a plain list of names means text;
- ``output``: the JSON schema of an answer, left out where it is plain text;
- ``licence``: of an example in it, where it has one.

The rest is a jinja2 template. ``<image>`` marks where an item's soft tokens go; ``{{ field | quoted }}`` puts a text in
quotes that it cannot leave.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jsonschema
import yaml
from jinja2.sandbox import SandboxedEnvironment

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped

IMAGE = "<image>"
TYPES: dict[str, Any] = {"text": str, "number": (int, float), "texts": list}
KEYS = ("id", "version", "inputs"), ("task", "output", "licence")  # of a header: needed, and possible
# of Unicode's format characters those stay that hold an emoji, or a word of some scripts, together
JOINERS = "\u200c\u200d"
_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _quoted(text: str) -> str:
    """A JSON string. What tokenizers that normalise (NFKC) would read as its marks, a wide quote, is escaped."""
    marks = {c: unicodedata.normalize("NFKC", c) for c in set(text) if not c.isascii()}
    wide = {ord(c): n for c, n in marks.items() if '"' in n or "\\" in n}
    return json.dumps(text.translate(wide), ensure_ascii=False)


_ENVIRONMENT.filters["quoted"] = _quoted

Type = str | Mapping[str, str]


@lru_cache(maxsize=256)  # compiling takes most of a rendering, and a template is rendered for every question
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


@dataclass(frozen=True)
class Prompt:
    """A checked prompt: ``render`` takes exactly the fields of its header.

    >>> Prompt("hello", 1, {"name": "text"}, "Hello {{ name }}!").render(name="you")
    'Hello you!'
    """

    id: str
    version: int
    inputs: Mapping[str, Type]
    template: str
    task: str = "item"
    output: Mapping[str, Any] | None = None
    licence: str = ""

    @property
    def hash(self) -> str:
        """Hash of everything that decides what given fields render to and what an answer may be; goes into the run
        card."""
        form = [] if self.output is None else [json.dumps(dict(self.output))]
        return content_hash(self.id, self.version, list(self.inputs), self.template, *form)

    def render(self, **fields: Any) -> str:
        """The text for one item, user or list: what ``clean`` leaves of every text, in the template's own lines.

        Raises ``DataError`` naming a field that is missing, unknown, or not of its type.
        """
        missing = [name for name in self.inputs if name not in fields]
        unknown = [name for name in fields if name not in self.inputs]
        if missing or unknown:
            what = f"missing {missing}" if missing else f"unknown {unknown}"
            raise DataError(f"prompt {self.id!r}: {what}; its inputs are {list(self.inputs)}")
        given = {name: self._checked(name, kind, fields[name]) for name, kind in self.inputs.items()}
        try:
            found = _compiled(self.template).render(**given)
        except Exception as error:  # a template can do anything wrong that an expression can
            raise DataError(f"prompt {self.id!r}: {type(error).__name__}: {error}") from None
        lines = [" ".join(line.split()) for line in found.strip().splitlines()]
        return "\n".join(line for n, line in enumerate(lines) if line or lines[n - 1])

    def _checked(self, name: str, kind: Type, value: Any) -> Any:
        rows = kind if isinstance(kind, Mapping) else None
        wanted = list if rows is not None else TYPES[str(kind)]
        if not isinstance(value, wanted) or isinstance(value, bool):
            said = "a list of rows" if rows is not None else str(kind)
            raise DataError(f"prompt {self.id!r}: {name} is {value!r:.80}; it takes {said}")
        if isinstance(value, str):
            return clean(value)
        if rows is not None:
            for n, row in enumerate(value):
                if not isinstance(row, Mapping) or set(row) != set(rows):
                    raise DataError(f"prompt {self.id!r}: {name}[{n}] is {row!r:.80}; its fields are {list(rows)}")
            return [{k: self._checked(f"{name}.{k}", rows[k], row[k]) for k in rows} for row in value]
        if isinstance(value, list):
            return [self._checked(f"{name}[{n}]", "text", one) for n, one in enumerate(value)]
        return value

    def check(self, answer: Any) -> None:
        """Raises ``DataError`` for an answer that is not of the header's ``output``."""
        try:
            jsonschema.validate(answer, dict(self.output or {}))
        except jsonschema.ValidationError as error:
            raise DataError(f"prompt {self.id!r}: its answer {error.json_path} {error.message:.200}") from None


def clean(text: str) -> str:
    """One line of what a text says: white space made single, so that no field can start a line of its own; control
    characters and marks that turn the direction of writing are gone. Letters, right-to-left ones too, and emoji stay.

    >>> clean("two\\nlines \\x00 \\u202eand more\\u202c")
    'two lines and more'
    """
    text = " ".join(text.split())
    if text.isascii() and text.isprintable():
        return text
    kept = (c for c in text if c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return " ".join("".join(kept).split())


def load_prompt(source: str | Path) -> Prompt:
    """A prompt by the name of a shipped one (``"item"``; ``prompts()`` lists them) or by its path.

    Raises ``DataError`` naming the file for a broken header, a template that does not parse, or one that uses a field
    its header does not name.
    """
    path = path_of(source)
    try:
        parts = path.read_text(encoding="utf-8").split("---\n", 2)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in UTF-8 ({error}); save it as that") from None
    if len(parts) != 3 or parts[0].strip():
        raise DataError(f"{path}: no header; open the file with '---', id, version, inputs, '---'")
    try:
        header = yaml.safe_load(parts[1])
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(parts[2]))
    except (yaml.YAMLError, jinja2.TemplateError) as error:
        raise DataError(f"{path}: {error}") from None
    needed, possible = KEYS
    if not isinstance(header, dict) or not set(needed) <= set(header) <= {*needed, *possible}:
        raise DataError(f"{path}: its header must hold id, version and inputs, may hold {', '.join(possible)}, no more")
    if header["id"] != path.stem:
        raise DataError(f"{path}: its id is {header['id']!r}; it must be the file's name, {path.stem!r}")
    if isinstance(header["version"], bool) or not isinstance(header["version"], int):
        raise DataError(f"{path}: its version is {header['version']!r}; it must be a whole number")
    inputs = header["inputs"]
    inputs = dict.fromkeys(map(str, inputs), "text") if isinstance(inputs, list) else inputs
    for name, kind in inputs.items() if isinstance(inputs, dict) else [("inputs", inputs)]:
        fields = list(kind.values()) if isinstance(kind, dict) else [kind]
        if not fields or any(not isinstance(f, str) or f not in TYPES for f in fields):
            raise DataError(f"{path}: input {name!r} is of type {kind!r}; types are {list(TYPES)}, or fields of these")
    strange = sorted(used - set(inputs))
    if strange:
        raise DataError(f"{path}: uses {strange}, which its header's inputs do not name")
    if header.get("output") is not None:
        try:
            jsonschema.Draft202012Validator.check_schema(header["output"])
        except jsonschema.SchemaError as error:
            raise DataError(f"{path}: output is no JSON schema: {error.message}") from None
    more = {k: header[k] for k in possible if header.get(k) is not None}
    return Prompt(str(header["id"]), int(header["version"]), inputs, parts[2].strip(), **more)


def path_of(source: str | Path) -> Path:
    """The file of a prompt, by the name of a shipped one or by its path; ``DataError`` where there is none."""
    path = Path(source) if str(source).endswith(".jinja") else shipped("prompts") / f"{source}.jinja"
    if not path.is_file():
        raise DataError(f"{path} is missing; shipped prompts are {prompts()}")
    return path


def prompts() -> list[str]:
    """Names of the shipped prompts."""
    return sorted(p.stem for p in shipped("prompts").glob("*.jinja"))

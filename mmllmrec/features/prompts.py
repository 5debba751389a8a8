"""Prompts: files in ``prompts/`` with a small header, rendered strictly, hashed for the run card.

A prompt file opens with a YAML header between two lines of three dashes: ``id`` (the file's name), ``version`` (an
integer) and ``inputs`` (the fields it may use). The rest is a jinja2 template. ``<image>`` marks where an item's soft
tokens go.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import SandboxedEnvironment

from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import content_hash
from mmllmrec.shipped import shipped

IMAGE = "<image>"
_ENVIRONMENT = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)


@dataclass(frozen=True)
class Prompt:
    """A checked prompt: ``render`` takes exactly the fields of its header.

    >>> Prompt("hello", 1, ("name",), "Hello {{ name }}!").render(name="you")
    'Hello you!'
    """

    id: str
    version: int
    inputs: tuple[str, ...]
    template: str

    @property
    def hash(self) -> str:
        """Hash of everything that can change what is rendered; goes into the run card."""
        return content_hash(self.id, self.version, list(self.inputs), self.template)

    def render(self, **fields: str) -> str:
        """The text for one item. Raises ``DataError`` naming a field that is missing or unknown."""
        missing = [name for name in self.inputs if name not in fields]
        unknown = [name for name in fields if name not in self.inputs]
        if missing or unknown:
            what = f"missing {missing}" if missing else f"unknown {unknown}"
            raise DataError(f"prompt {self.id!r}: {what}; its inputs are {list(self.inputs)}")
        return " ".join(_ENVIRONMENT.from_string(self.template).render(**fields).split())


def load_prompt(source: str | Path) -> Prompt:
    """A prompt by the name of a shipped one (``"item"``) or by its path.

    Raises ``DataError`` naming the file for a broken header, a template that does not parse, or one that uses a field
    its header does not name.
    """
    path = Path(source) if str(source).endswith(".jinja") else shipped("prompts") / f"{source}.jinja"
    if not path.is_file():
        known = sorted(p.stem for p in shipped("prompts").glob("*.jinja"))
        raise DataError(f"{path} is missing; shipped prompts are {known}")
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) != 3 or parts[0].strip():
        raise DataError(f"{path}: no header; open the file with '---', id, version, inputs, '---'")
    try:
        header = yaml.safe_load(parts[1])
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(parts[2]))
    except (yaml.YAMLError, jinja2.TemplateError) as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(header, dict) or set(header) != {"id", "version", "inputs"}:
        raise DataError(f"{path}: its header must hold id, version and inputs, and nothing else")
    if header["id"] != path.stem:
        raise DataError(f"{path}: its id is {header['id']!r}; it must be the file's name, {path.stem!r}")
    strange = sorted(used - set(header["inputs"]))
    if strange:
        raise DataError(f"{path}: uses {strange}, which its header's inputs do not name")
    return Prompt(str(header["id"]), int(header["version"]), tuple(header["inputs"]), parts[2].strip())

"""``mmllmrec prompts``: which prompts ship, what they say, and what they render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmllmrec.cli.options import show

app = typer.Typer(no_args_is_help=True, help="The prompts that ship, or a file of your own: list, show, render.")

Source = Annotated[str, typer.Argument(help="the name of a shipped prompt, or a path that ends in .jinja")]


@app.command("list")
def prompts_list() -> None:
    """Name, version, task and inputs of every prompt that ships.

    Example: [bold]mmllmrec prompts list[/bold]
    """
    import pandas as pd

    from mmllmrec.features.prompts import load_prompt, prompts

    lines = []
    for prompt in map(load_prompt, prompts()):
        answer = "-" if prompt.output is None else ", ".join(prompt.output.get("properties", {})) or "JSON"
        lines.append((prompt.id, prompt.version, prompt.task, ", ".join(prompt.inputs), answer))
    show(pd.DataFrame(lines, columns=["prompt", "version", "task", "inputs", "answer"]))


@app.command("show")
def prompts_show(source: Source) -> None:
    """A prompt's file as it is: header and template; its hash last.

    Example: [bold]mmllmrec prompts show pointwise[/bold]
    """
    from mmllmrec.features.prompts import load_prompt, path_of

    prompt = load_prompt(source)
    print(path_of(source).read_text(encoding="utf-8").rstrip())
    print(f"\nhash: {prompt.hash}")


@app.command("render")
def prompts_render(
    source: Source,
    fields: Annotated[
        list[str] | None, typer.Option("--field", help="name=value, a JSON value where the field is no text")
    ] = None,
    file: Annotated[Path | None, typer.Option("--fields", exists=True, help="a JSON file of all fields")] = None,
) -> None:
    """A prompt with its fields filled in, as a model reads it. Fields that are not named are empty.

    Example: [bold]mmllmrec prompts render item --field title=Lamp --field "text=A lamp in brass."[/bold]
    """
    from mmllmrec.data.interactions import DataError
    from mmllmrec.features.prompts import load_prompt

    prompt = load_prompt(source)
    empty = {"text": "", "number": 0}
    given = {name: empty.get(kind, []) if isinstance(kind, str) else [] for name, kind in prompt.inputs.items()}
    if file is not None:
        try:
            given |= json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise DataError(f"{file}: not a JSON object of fields: {error}") from None
    for one in fields or ():
        name, sign, value = one.partition("=")
        if not sign:
            raise DataError(f"--field {one!r}: give name=value")
        try:
            given[name] = value if prompt.inputs.get(name, "text") == "text" else json.loads(value)
        except ValueError as error:
            raise DataError(f'--field {name}: {prompt.inputs[name]} as JSON, such as \'["a", "b"]\': {error}') from None
    print(prompt.render(**given))

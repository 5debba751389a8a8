"""What travels with the code: item prompts and the ``nano`` towers, in a clone or in an installed wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped(name: str) -> Path:
    """The file or folder ``name`` that ships with the library, such as ``"prompts"`` or ``"adapters/nano-base"``.

    In a clone it lies at the top of the repository, in an installed wheel under ``mmllmrec/_shipped``. Raises
    ``FileNotFoundError`` naming both places when it is in neither, and ``ValueError`` for a name that leaves them.

    >>> shipped("prompts").is_dir()
    True
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"shipped({name!r}): give a path inside the shipped files, such as 'prompts'")
    places = [PACKAGE / "_shipped" / name]
    # a clone is told from a site-packages folder by its pyproject.toml
    if (PACKAGE.parent / "pyproject.toml").is_file():
        places.append(PACKAGE.parent / name)
    for place in places:
        if place.exists():
            return place
    looked = " nor at ".join(str(place) for place in places)
    raise FileNotFoundError(f"{name!r} ships with mmllmrec and is not at {looked}: install the package again")

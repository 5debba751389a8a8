"""Run cards: the JSON beside every result, the hashes it names, and files written beside and then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

LIBRARIES = ("mmllmrec", "torch", "transformers", "open_clip_torch", "peft", "accelerate", "datasets", "numpy", "scipy")


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> Path:
    """Call ``write`` on a temporary path beside ``path``, then rename it there: readers see the old or the new file.

    Works for one file and for a folder (``write`` makes the folder itself; an old one of that name is replaced).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder) / path.name
        write(beside)
        if beside.is_dir() and path.exists():
            os.rename(path, Path(folder) / "old")
        os.replace(beside, path)
    return path


def drop_torn_line(path: Path) -> None:
    """Cut off the last line of a file of lines where a process that was killed left it without its end."""
    if path.is_file():
        with open(path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON, a list of numbers on one line, atomically. Arrays become lists, paths strings,
    NaN is refused."""
    text = json.dumps(value, indent=1, default=_plain, allow_nan=False) + "\n"
    # no string holds a bare line break in JSON, so only lists can match
    text = re.sub(r"\[\n\s*([-+\d.eE,\s]+?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    return write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a run card cannot hold a {type(value).__name__}")


def content_hash(*parts: Any) -> str:
    """A short stable hash (16 hex digits) of arrays, strings, bytes and JSON-able values.

    >>> content_hash("a", np.arange(3)) == content_hash("a", np.arange(3))
    True
    """
    return hash_of(parts)


def hash_of(parts: Iterable[Any]) -> str:
    """``content_hash`` of parts that are made one at a time: all weights of a model need not be held in copy."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=_plain).encode())
        digest.update(b"\x00")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that move numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def reset_peak_memory() -> None:
    """Let ``peak_memory_mb`` count from now on, where the system can (Linux: 5 to /proc/self/clear_refs sets VmHWM to
    what is resident now); elsewhere the peak stays that of the whole program. ``peak_device_memory_mb`` too."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Peak resident memory of this program so far, or since ``reset_peak_memory``, in MiB.

    On Linux ``ru_maxrss`` of a started program begins at that of the one that started it; VmHWM begins at zero.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024.0, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024.0**2 if sys.platform == "darwin" else 1024.0), 1)


def peak_device_memory_mb() -> float:
    """Peak memory of this program's tensors on a CUDA device since ``reset_peak_memory``, in MiB; 0 without one."""
    return round(torch.cuda.max_memory_allocated() / 1024.0**2, 1) if torch.cuda.is_available() else 0.0


def device_name() -> str:
    """What trains here: the CUDA device's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@dataclass
class RunCard:
    """What made a result: enough to find it again and to make it again. Saved as JSON beside the result."""

    kind: str  # "fit", "evaluate", "bench", "pretrain", ...
    name: str
    seed: int | None = None
    data: str = ""
    loaded: dict[str, Any] = field(default_factory=dict)  # what load_dataset was given: name, path, options
    split: dict[str, Any] = field(default_factory=dict)  # name, hash, sizes
    model: dict[str, Any] = field(default_factory=dict)  # class, hyper-parameters, hashes of weights, adapter, prompt
    settings: dict[str, Any] = field(default_factory=dict)  # optimiser, protocol
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float = field(default_factory=peak_memory_mb)
    device: str = field(default_factory=device_name)
    peak_device_memory_mb: float = field(default_factory=peak_device_memory_mb)
    trainable_parameters: int = 0
    test_opened: int = 0  # how often the sealed test part had been opened when the card was written
    versions: dict[str, str] = field(default_factory=versions)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def as_dict(self) -> dict[str, Any]:
        """The card as plain values."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the card as JSON, atomically; returns the path."""
        return write_json(path, self.as_dict())

    def save_with(self, table: str, folder: str | os.PathLike[str]) -> Path:
        """Write ``card.json``, and beside it the table it stands for as ``table.txt``; returns the card's path."""
        write_atomically(Path(folder) / "table.txt", lambda p: p.write_text(f"{table}\n", encoding="utf-8"))
        return self.save(Path(folder) / "card.json")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunCard:
        """Read a card. Raises ``ValueError`` naming the file when it is no run card."""
        try:
            values: Mapping[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            # cards of before do not say where they were made
            return cls(**{"device": "", "peak_device_memory_mb": 0.0, **values})
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a run card: {error}") from error

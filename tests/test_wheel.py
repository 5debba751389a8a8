"""The built wheel works where there is no clone: what ships inside it is found, loaded and run."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CLONE = Path(__file__).parents[1]
# run in the new environment; prints where things were found, so that the test can say whose they are
INSIDE = """
import mmllmrec
from mmllmrec.features.prompts import load_prompt
from mmllmrec.features.towers import load_language, load_vision
from mmllmrec.shipped import shipped

nano = shipped("adapters/nano-base")
print(mmllmrec.__file__, shipped("prompts"), nano, sep="\\n")
prompt = load_prompt("item")
print(prompt.render(**{name: f"the {name}" for name in prompt.inputs}))
vision, language = load_vision(str(nano / "clip")), load_language(str(nano / "language"))
assert (nano / "resampler.safetensors").is_file()
assert len(language.tokenizer) == language.model.config.vocab_size
print(vision.size, language.width)
"""


def run(*command, where):
    """A command outside the clone, with nothing in its environment that could lead back to it."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "MMLLMREC_DATA")}
    return subprocess.run(list(map(str, command)), cwd=where, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, CLONE, where=out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("mmllmrec-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment that has the wheel, and this one's other libraries: its bin folder.

    They come by a path file, since to install them again takes many minutes. Such a line adds a folder at the end of
    the path and reads no path file inside it, which is how the editable install there stays out.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    assert run(sys.executable, "-m", "venv", "--without-pip", place / "venv", where=place).returncode == 0
    bin_ = place / "venv" / "bin"
    pip = [sys.executable, "-m", "pip", "--python", bin_ / "python", "install", "--no-deps", "--no-index", wheel]
    done = run(*pip, where=place)
    assert done.returncode == 0, done.stderr
    packages = next((place / "venv" / "lib").glob("python*/site-packages"))
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return bin_


@pytest.mark.slow
def test_wheel_holds_the_package_and_what_ships_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {i.filename: i.file_size for i in archive.infolist()}
    about = next(n for n in sizes if n.endswith(".dist-info/METADATA")).split("/")[0]
    assert {name.split("/")[0] for name in sizes} == {"mmllmrec", about}
    kinds = {Path(name).suffix for name in sizes if not name.startswith(about)}
    assert kinds <= {".py", ".jinja", ".json", ".safetensors", ".typed", ".yaml"}, (
        kinds
    )  # no notebook, no poster, no pickle
    assert max(sizes.values()) < 10e6
    ours = {p.relative_to(CLONE).as_posix() for p in (CLONE / "mmllmrec").rglob("*.py")}
    shipped = {p.relative_to(CLONE) for f in ("prompts", "adapters/nano-base") for p in (CLONE / f).rglob("*.*")}
    ours |= {p.relative_to(CLONE).as_posix() for p in (CLONE / "mmllmrec" / "training" / "configs").glob("*.yaml")}
    assert ours | {f"mmllmrec/_shipped/{p.as_posix()}" for p in shipped} <= set(sizes)


@pytest.mark.slow
def test_prompts_and_towers_are_found_outside_the_clone(installed):
    done = run(installed / "python", "-c", INSIDE, where=installed.parents[1])
    assert done.returncode == 0, done.stderr
    *places, rendered, towers = done.stdout.splitlines()
    for place in places:
        assert Path(place).is_relative_to(installed.parent), f"{place} is not the wheel's"
    assert "the title" in rendered
    assert towers == "64 96"  # pixels a side, width: those of nano-base and of no other towers


@pytest.mark.slow
def test_commands_run_outside_the_clone(installed):
    helped = run(installed / "mmllmrec", "--help", where=installed.parents[1])
    assert helped.returncode == 0 and "bench" in helped.stdout
    told = run(installed / "mmllmrec", "data", "info", "atelier", where=installed.parents[1])
    assert told.returncode == 0 and "items with image" in told.stdout, told.stderr
    demo = run(installed / "mmllmrec", "demo", where=installed.parents[1])
    assert demo.returncode == 2 and len(demo.stderr.splitlines()) == 1
    assert demo.stderr.startswith("error: notebooks/00_quickstart.ipynb is not here: ")

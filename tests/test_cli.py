"""The command line as a user meets it."""

import json
import subprocess
import sys


def call(*arguments):
    return subprocess.run([sys.executable, "-m", "mmllmrec.cli", *arguments], capture_output=True, text=True)


def _cells(line):
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_bad_input_is_one_line_and_exit_code_2():
    result = call("data", "info", "nope")
    assert result.returncode == 2 and result.stderr.startswith("error: unknown dataset 'nope'")
    assert "Traceback" not in result.stderr
    assert "Traceback" in call("--debug", "data", "info", "nope").stderr


def test_help_teaches():
    result = call("--help")
    assert result.returncode == 0 and "bench" in result.stdout and "data" in result.stdout


def test_info_of_the_planted_world():
    result = call("data", "info", "atelier-b")
    rows = {cells[0]: cells[1] for cells in map(_cells, result.stdout.splitlines()) if len(cells) == 2}
    assert result.returncode == 0 and rows["users"] == "1,200" and rows["items"] == "1,500"
    assert 0 < float(rows["items with sensor"].rstrip("%")) < 100


def test_import_is_light():
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "accelerate", "open_clip", "peft"]
    code = f"import sys, json, mmllmrec; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) == []


def test_every_public_name_is_there():
    import mmllmrec as mm

    assert [name for name in mm.__all__ if getattr(mm, name, None) is None] == []

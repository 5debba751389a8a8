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


def test_features_are_extracted_once_listed_and_pruned(tmp_path):
    # a catalogue of three pictures and texts, as a user's own folder
    from PIL import Image

    from mmllmrec.features.table import FeatureTable

    (tmp_path / "data" / "images").mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (40, 30), (80 * n, 10, 20)).save(tmp_path / "data" / "images" / f"{n}.png")
    rows = "".join(f"i{n},Lamp {n},A red lamp.,{n}.png\n" for n in range(3))
    (tmp_path / "data" / "items.csv").write_text(f"item_id,title,text,image\n{rows}i3,,,\n")
    (tmp_path / "data" / "interactions.csv").write_text("user_id,item_id\nu0,i0\nu1,i3\n")
    store = ("--store", str(tmp_path / "store"))
    extract = ("features", "extract", "--data", "folder", "--path", str(tmp_path / "data"), *store)
    result = call(*extract, "--image", "nano", "--text", "nano", "--folder", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    table = FeatureTable.load(tmp_path / "out")
    assert table.modalities == ("image", "text") and table.presence.sum(0).tolist() == [3, 3]
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["kind"] == "features" and card["model"]["features"] == table.hash
    result = call(*extract, "--image", "nano", "--layout", "inter", "--folder", str(tmp_path / "npy"))
    assert (tmp_path / "npy" / "image_feat.npy").is_file(), result.stderr
    assert "items/s" not in result.stderr  # nothing was left to compute
    rows = [_cells(line) for line in call("features", "info", *store).stdout.splitlines()]
    assert [r[3] for r in rows if r[0].startswith("nano")] == ["3", "3"]
    assert call("features", "prune", "nano:own", *store).stdout.startswith("freed ")
    assert "nano:own" not in call("features", "info", *store).stdout
    bad = call("features", "prune", *store)
    assert bad.returncode == 2 and bad.stderr.startswith("error: prune: say which") and bad.stderr.count("\n") == 1


def test_features_without_a_tower_is_one_line():
    result = call("features", "extract")
    assert result.returncode == 2 and result.stderr.startswith("error: name a tower")
    assert "Example" in call("features", "extract", "--help").stdout


def test_a_timed_system_is_a_row_or_all_rows_of_its_class():
    from mmllmrec.cli.bench import rows_of

    table = {"Fast": ("Fast", {}), "Fast, raw": ("Fast", {}), "Deep, 1": ("Deep", {}), "Deep, 2": ("Deep", {})}
    named = {"Fast": ["Fast"], "Fast, raw": ["Fast, raw"], "Deep": ["Deep, 1", "Deep, 2"], "Nobody": ["Nobody"]}
    assert {name: rows_of(name, table) for name in named} == named


def test_import_is_light():
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "accelerate", "open_clip", "peft"]
    code = f"import sys, json, mmllmrec; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) == []


def test_every_public_name_is_there():
    import mmllmrec as mm

    assert [name for name in mm.__all__ if getattr(mm, name, None) is None] == []

"""The store of frozen states: nothing twice, nothing stale, nothing lost to a kill, and no quarrel between two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmllmrec.data.interactions import DataError
from mmllmrec.features.extractor import Extractor
from mmllmrec.features.store import DAY, Store
from tests.towers import tiny_world

ITEMS = 11


def rows_of(positions):
    """An array of its own length for each position, told from the others."""
    return [np.full((p % 5 + 1, 3), p, dtype=np.float32) for p in positions]


class Counting:
    """A tower that says how long a text is, and counts what it is asked."""

    def __init__(self, hash="a" * 16, factor=1):
        self.asked, self.factor = [], factor
        self.extractor = Extractor("lengths", "text", hash, self.contents, self.encode)

    def contents(self, catalog):
        words = catalog.words()
        return lambda item: words[item]["title"] + words[item]["text"]

    def encode(self, contents, names, tokens):
        self.asked += names
        return np.array([[len(c), self.factor] for c in contents], dtype=np.float32), []


def test_what_is_kept_is_not_computed_again(tmp_path):
    _, catalog = tiny_world()
    tower = Counting()
    table, present = Store(tmp_path).extract(tower.extractor, catalog, batch=3)
    assert table.dtype == np.float32 and (present == catalog.present("text")).all()
    assert (table[~present] == 0).all() and (table[present, 1] == 1).all()
    lengths = [len(w["title"] + w["text"]) for w in catalog.words()]
    assert table[:, 0].tolist() == lengths
    asked = len(tower.asked)
    again, _ = Store(tmp_path).extract(tower.extractor, catalog, batch=2)  # another process, another batch
    assert len(tower.asked) == asked and (again == table).all()


def test_equal_contents_are_computed_once(tmp_path):
    seen = []
    found = Store(tmp_path).get_or_compute(["a", "b", "a", "a"], lambda p: (seen.extend(p), rows_of(p))[1])
    assert seen == [0, 1] and [f.shape for f in found] == [(1, 3), (2, 3), (1, 3), (1, 3)]


def test_a_changed_item_is_the_only_one_computed_again(tmp_path):
    _, catalog = tiny_world()
    tower = Counting()
    store = Store(tmp_path)
    before, present = store.extract(tower.extractor, catalog)
    item = int(np.flatnonzero(present)[1])
    texts = list(catalog.dataset["text"])
    texts[item] += " It is broken."
    other = type(catalog)(
        catalog.dataset.remove_columns("text").add_column("text", texts), catalog.item_ids, name="changed"
    )
    tower.asked.clear()
    after, _ = store.extract(tower.extractor, other)
    assert tower.asked == [f"text of item {catalog.item_ids[item]!r}"]
    assert (np.flatnonzero((before != after).any(1)) == [item]).all()


def test_another_tower_shares_nothing(tmp_path):
    _, catalog = tiny_world()
    store = Store(tmp_path)
    store.extract(Counting().extractor, catalog)
    other = Counting("b" * 16, factor=7)
    table, present = store.extract(other.extractor, catalog)
    assert (table[present, 1] == 7).all() and len(other.asked) > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, bool])
def test_arrays_come_back_as_they_were(tmp_path, dtype):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=shape).astype(dtype) for shape in [(3, 5), (0, 5), (7,), ()]]
    keys = ["one", "with space", "ü/..", "four"]
    Store(tmp_path).get_or_compute(keys, lambda at: [rows[p] for p in at])
    for found, row in zip(Store(tmp_path).get_or_compute(keys, lambda at: []), rows, strict=True):
        np.testing.assert_array_equal(found, row)
        assert found.dtype == row.dtype


def test_a_damaged_shard_is_computed_again(tmp_path):
    store, keys = Store(tmp_path), ["a", "b", "c"]
    store.get_or_compute(keys, rows_of, batch=1)
    shard = next((tmp_path / "states").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    computed = []
    with pytest.warns(UserWarning, match="computed again"):
        found = store.get_or_compute(keys, lambda p: (computed.extend(p), rows_of(p))[1])
    assert len(computed) == 1 and [f[0, 0] for f in found] == [0, 1, 2]


def test_a_half_written_shard_is_never_seen(tmp_path, monkeypatch):
    from mmllmrec.features import store as module

    def half(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).get_or_compute(["a"], rows_of)
    assert list(tmp_path.rglob("*.safetensors")) == []


SCRIPT = """
import sys, time
import numpy as np
from mmllmrec.features.store import Store

folder, items, pause, log = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), open(sys.argv[4], "a")

def compute(positions):
    time.sleep(pause)
    log.writelines(f"{p}\\n" for p in positions)
    log.flush()
    return [np.full((p % 5 + 1, 3), p, dtype=np.float32) for p in positions]

Store(folder).get_or_compute([f"k{n}" for n in range(items)], compute, batch=4)
"""


def start(folder, items, pause, log):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(items), str(pause), str(log)]
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": root}, stderr=subprocess.DEVNULL)


def test_a_killed_run_goes_on_from_its_last_batch(tmp_path):
    folder, log, items = tmp_path / "store", tmp_path / "log", 47
    process = start(folder, items, 0.05, log)
    patience = time.monotonic() + 60
    while len(list(folder.glob("states/*.safetensors"))) < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = 4 * len(list(folder.glob("states/*.safetensors")))
    assert 12 <= kept < items
    computed = []
    keys = [f"k{n}" for n in range(items)]
    found = Store(folder).get_or_compute(keys, lambda p: (computed.extend(p), rows_of(p))[1])
    assert computed == list(range(kept, items))
    assert all(np.array_equal(f, r) for f, r in zip(found, rows_of(range(items)), strict=True))


def test_two_processes_at_once(tmp_path):
    folder, items = tmp_path / "store", 83
    both = [start(folder, items, 0.002, tmp_path / f"log{n}") for n in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    found = Store(folder).get_or_compute([f"k{n}" for n in range(items)], lambda p: pytest.fail(f"{p} were lost"))
    assert all(np.array_equal(f, r) for f, r in zip(found, rows_of(range(items)), strict=True))
    assert {p.suffix for p in (folder / "states").iterdir()} == {".safetensors", ".json"}  # and nothing half-written


def test_info_and_prune(tmp_path):
    _, catalog = tiny_world()
    store = Store(tmp_path)
    store.extract(Counting().extractor, catalog, batch=4)
    store.get_or_compute(["a", "b"], rows_of, space="b" * 16, about={"name": "other"})
    store.get_or_compute(["b", "c"], rows_of, space="b" * 16, about={"name": "other"})
    about = store.info().set_index("name")
    distinct = len({w["title"] + w["text"] for w in catalog.words()} - {""})
    assert about["items"].to_dict() == {"lengths": distinct, "other": 3}
    assert about["modality"]["lengths"] == "text" and about["hash"]["other"] == "b" * 16
    on_disk = {n: sum(p.stat().st_size for p in tmp_path.glob(f"{n * 16}/*.safetensors")) for n in "ab"}
    assert about["bytes"].to_dict() == {"lengths": on_disk["a"], "other": on_disk["b"]}
    assert store.prune("other", older_than=1) == 0  # both must hold
    assert store.prune("other") == on_disk["b"] and list(store.info()["name"]) == ["lengths"]
    assert not (tmp_path / ("b" * 16)).exists()


def test_prune_by_age_and_only_its_own_files(tmp_path):
    store, folder = Store(tmp_path), tmp_path / "states"
    store.get_or_compute(["a", "b", "c"], rows_of, batch=1)
    old = sorted(folder.glob("*.safetensors"))[:2]
    beside = folder / f".{old[0].name}.x1y2"  # what a killed process left half-written
    beside.mkdir()
    (beside / old[0].name).write_bytes(b"half")
    for path in (*old, beside):
        os.utime(path, (time.time() - 3 * DAY,) * 2)
    mine = [folder / "notes.txt", folder / "features.safetensors", tmp_path / "elsewhere" / ("c" * 16 + ".safetensors")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("keep")
        os.utime(path, (0, 0))
    size = sum(p.stat().st_size for p in old) + 4
    assert store.prune(older_than=2) == size and not beside.exists()
    assert len(store.get_or_compute(["a", "b", "c"], rows_of)) == 3 and len(list(folder.glob("?" * 16 + ".*"))) == 2
    store.prune("states")
    assert all(path.read_text() == "keep" for path in mine)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda s: s.prune(), "say which"),
        (lambda s: s.prune("nope"), "not kept"),
        (lambda s: s.get_or_compute(["a"], rows_of, space="../up"), "space"),
        (lambda s: s.get_or_compute(["a"], lambda p: []), "0 arrays for 1"),
        (lambda s: s.extract(Counting().extractor, tiny_world()[1].without("text")), "no item"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, wrong, says):
    with pytest.raises(DataError, match=says):
        wrong(Store(tmp_path))

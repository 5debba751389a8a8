"""Run cards as files: what is written is read, and a list of numbers takes one line."""

import gc
import json
import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllmrec.runcard import RunCard, peak_memory_mb, reset_peak_memory, write_atomically, write_json

finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.integers() | finite | st.text() | st.sampled_from(["x [\n 1,\n 2 ]", "[ 1 ]"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(value=values)
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, value):
    path = write_json(tmp_path_factory.getbasetemp() / "value.json", {"value": value})
    assert json.loads(path.read_text(encoding="utf-8")) == {"value": value}


def test_numbers_share_a_line_and_nan_is_refused(tmp_path):
    path = write_json(tmp_path / "card.json", {"metrics": {"ndcg@20": np.array([0.25, 1e-7])}})
    assert '"ndcg@20": [0.25, 1e-07]' in path.read_text()
    with pytest.raises(ValueError):
        write_json(path, {"metrics": float("nan")})
    assert "0.25" in path.read_text() and [p.name for p in tmp_path.iterdir()] == ["card.json"]


def test_a_folder_is_replaced_at_once_or_not_at_all(tmp_path):
    def good(folder):
        folder.mkdir()
        (folder / "a").write_text("1")

    def bad(folder):
        folder.mkdir()
        raise KeyboardInterrupt

    write_atomically(tmp_path / "x", good)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", bad)
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x" / "a").read_text() == "1"


def test_what_is_no_card_is_named(tmp_path):
    (tmp_path / "card.json").write_text('{"king": "fit"}')
    with pytest.raises(ValueError, match=r"card\.json is not a run card"):
        RunCard.load(tmp_path / "card.json")


def test_a_card_says_where_it_was_made_and_one_of_before_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr("mmllmrec.runcard.torch.cuda.is_available", lambda: False)
    path = RunCard("fit", "BPR").save(tmp_path / "card.json")
    assert RunCard.load(path).device == "cpu"
    old = {k: v for k, v in json.loads(path.read_text()).items() if "device" not in k}
    write_json(path, old)
    assert (RunCard.load(path).device, RunCard.load(path).peak_device_memory_mb) == ("", 0.0)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot forget a peak")
def test_a_peak_is_forgotten_and_counted_anew():
    # pages asked of the system itself: an allocator may hand out a block of its own that is resident already
    with mmap.mmap(-1, 300 << 20) as block:
        for at in range(0, len(block), mmap.PAGESIZE):
            block[at] = 1
        high = peak_memory_mb()
    gc.collect()
    reset_peak_memory()
    low = peak_memory_mb()
    assert low < high - 200
    with mmap.mmap(-1, 100 << 20) as block:
        for at in range(0, len(block), mmap.PAGESIZE):
            block[at] = 1
        assert low + 80 < peak_memory_mb() < high

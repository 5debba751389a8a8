"""Run cards as files: what is written is read, and a list of numbers takes one line."""

import json
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


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot forget a peak")
def test_a_peak_is_forgotten_and_counted_anew():
    block = np.ones(300 * 2**17)  # 300 MiB, touched
    high = peak_memory_mb()
    del block
    reset_peak_memory()
    low = peak_memory_mb()
    assert low < high - 200
    np.ones(100 * 2**17)
    assert low + 80 < peak_memory_mb() < high

"""What language adds, at smoke size: every row is there, what it cost is told, and nothing is made twice."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mmllmrec import bench
from mmllmrec.bench.answer import NDCG, Answer, Layout
from mmllmrec.bench.language import FIRST, LINES, ORDER, WEIGHTS, Ordered, _chosen, _dealt, _notes
from mmllmrec.bench.rows import TWIN
from mmllmrec.data.atelier import atelier
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.data.splits import cold_items
from mmllmrec.evaluation.ranking import rank, top
from mmllmrec.language.generate import Generator
from mmllmrec.language.rerank import Reranked
from mmllmrec.runcard import RunCard
from tests.planted import Table
from tests.towers import random_causal

ORDERS = ("prior", "zero-shot", "tuned", "tuned, shuffled texts", "tuned, retrieval", "tuned, no thoughts", "tuned, 20")


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=31, n_users=17, n_events=240, size=8, modalities=("image", "text"))


def test_every_row_is_there_with_what_it_cost_and_made_once(world, tmp_path, monkeypatch):
    asked = {"data": world, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    asked |= {"model": "nano-writer", "n": 12}
    answer = bench.language(folder=tmp_path / "answer", **asked)
    systems = set(answer.frame["system"])
    assert {FIRST, "TwoStage", "Unified", TWIN, ORDER, *LINES} <= systems
    assert {f"{FIRST} + {how}" for how in (*ORDERS, "tuned, own thoughts, 20", "tuned, listwise, 20")} <= systems
    assert {"Unified + zero-shot", "Unified + tuned"} <= systems
    for name in ("TwoStage + LLM profiles", f"{FIRST} + tuned", f"{FIRST} + tuned, listwise, 20", "Unified + tuned"):
        assert answer.value(name, "cost", "tokens a user") > 10 and answer.value(name, "cost", "seconds a user") > 0
    assert answer.value(f"{FIRST} + prior", "cost", "tokens a user") == 0
    own, told = (answer.value(f"{FIRST} + tuned, {how}20", "cost", "tokens a user") for how in ("own thoughts, ", ""))
    written = answer.value("TwoStage + LLM profiles", "cost", "tokens a user")
    assert own - written > 1.5 * (told - written)
    assert answer.value(f"{FIRST} + tuned", "cost", "tuning, s") > 0
    card = RunCard.load(tmp_path / "answer" / "card.json")
    assert card.settings["language"]["n"] == 12 and card.settings["language"]["model"]["name"] == "nano-writer"

    def never(*anything, **else_):
        raise AssertionError("what was written is read")

    for name in ("_write", "_read", "_ordered"):
        monkeypatch.setattr(Generator, name, never)
    monkeypatch.setattr("mmllmrec.language.instruct.fit_causal", never)
    again = bench.language(folder=tmp_path / "answer", **asked)
    assert again.frame.equals(answer.frame)
    some = {**asked, "systems": ["TwoStage + LLM profiles", f"{FIRST} + zero-shot"]}  # elsewhere, of the same writing
    part = bench.language(folder=tmp_path / "part", **some)
    row = "TwoStage + LLM profiles", "warm"
    assert part.value(*row) == answer.value(*row) and f"{FIRST} + zero-shot" in set(part.frame["system"])
    assert not any("tuned" in name for name in set(part.frame["system"]))
    with pytest.raises(DataError, match="other settings"):
        bench.language(folder=tmp_path / "answer", **{**asked, "n": 11})


def test_without_a_language_model_the_template_is_there(world, tmp_path):
    data = RecDataset(world.name, world.interactions, world.catalog)
    asked = {"data": data, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    asked["systems"] = ["TwoStage + template profiles"]
    found = set(bench.language(folder=tmp_path / "answer", **asked).frame["system"])
    assert "TwoStage + template profiles" in found and not any(" + tuned" in name for name in found)
    with pytest.raises(DataError, match=r"TwoStage \+ LLM profiles"):
        bench.language(folder=tmp_path / "other", **{**asked, "systems": ["TwoStage + LLM profiles"]})


def test_a_model_of_the_users_own_writes_and_orders_on_any_data(world, tmp_path):
    data = RecDataset(world.name, world.interactions, world.catalog)  # not known to be planted
    asked = {"data": data, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned", "n": 5}
    asked |= {"model": str(random_causal(tmp_path / "random", context=2048))}
    asked["systems"] = ["TwoStage + LLM profiles", f"{FIRST} + zero-shot", f"{FIRST} + tuned, listwise, 20"]
    answer = bench.language(folder=tmp_path / "answer", **asked)
    systems = set(answer.frame["system"])
    assert {"TwoStage + LLM profiles", f"{FIRST} + tuned, listwise, 20", f"{FIRST} + zero-shot"} <= systems
    assert ORDER not in systems and f"{FIRST} + tuned" not in systems
    assert answer.value("TwoStage + LLM profiles", "cost", "tokens a user") > 10


def test_weights_are_those_that_serve_validation_best(world):
    split = cold_items(world, seed=0)
    scores = np.random.default_rng(0).random((world.interactions.n_users, world.interactions.n_items))
    scorer = Reranked(
        Table(scores), Generator.load("nano"), split.train, ["a vase"] * len(world.catalog), progress=False
    )
    liked = split.valid.csr.toarray()

    def judge(lists):  # what validation will find
        return 3.0 * np.take_along_axis(liked[lists.users], lists.items, axis=1)

    scorer._judge = judge
    chosen = _chosen(scorer, split)
    assert chosen.blend > 0 and chosen.judged.keys() == set(range(world.interactions.n_users))
    best = rank(chosen, split.valid, seen=split.train.csr, k=20).per_user("ndcg@20").mean()
    for blend in WEIGHTS["blend"]:
        for prior in WEIGHTS["prior"]:
            other = rank(scorer.blended(blend, prior), split.valid, seen=split.train.csr, k=20)
            assert other.per_user("ndcg@20").mean() <= best
    scorer.judged.clear()
    scorer._judge = lambda lists: np.zeros(lists.items.shape)
    split_blind = _chosen(scorer, split)
    assert (split_blind.blend, split_blind.prior) == (0.0, 0.0) or split_blind.prior > 0  # nothing to add: the scorer


def test_the_gap_is_told_where_there_is_one(world):
    known = {FIRST: 0.2, ORDER: 0.3, f"{FIRST} + zero-shot": 0.21, f"{FIRST} + tuned": 0.26}

    def told(values):
        lines = [(name, "warm", NDCG, value) for name, value in values.items()]
        frame = pd.DataFrame(lines, columns=["system", "row", "metric", "mean"])
        return _notes(Answer("t", frame, pd.DataFrame(), [], Layout({}), Path("card.json")))

    assert [line.split(" of the gap")[0].split(" + ")[1] for line in told(known)] == [
        "zero-shot closes 10%",
        "tuned closes 60%",
    ]
    assert told({**known, ORDER: 0.2}) == []


def test_orders_and_dealt_lines_are_permutations():
    scores = np.random.default_rng(0).random((7, 15)).astype(np.float32)
    lists = top(Table(scores), np.arange(7), 15, seen=None, k=5)
    by = np.random.default_rng(1).random((7, 15)).astype(np.float32)
    one = Ordered("o", torch.from_numpy(scores), lists, torch.from_numpy(by))
    found = top(one, np.arange(7), 15, seen=None, k=15)
    before = top(Table(scores), np.arange(7), 15, seen=None, k=15)
    for user in range(7):
        first = lists.items[user].tolist()
        assert found.items[user, :5].tolist() == sorted(first, key=lambda i: -by[user, i])
        assert found.items[user, 5:].tolist() == before.items[user, 5:].tolist()
    lines = ["a", "", "b", "c", "d", "", "e"]
    dealt = _dealt(lines, 0)
    assert sorted(dealt) == sorted(lines) and [bool(t) for t in dealt] == [bool(t) for t in lines] and dealt != lines

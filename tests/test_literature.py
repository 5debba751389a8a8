"""The survey's table: every system trains at smoke size, under one budget, and its features matter or do not."""

import numpy as np
import pytest

from mmllmrec import bench
from mmllmrec.bench import literature as module
from mmllmrec.bench.ablations import OFF
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import RunCard


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=41, n_users=29, n_events=600, size=8)


def test_every_system_of_the_literature_is_surveyed(world, tmp_path):
    asked = {"data": world, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    answer = bench.survey(**asked, folder=tmp_path / "answer", kind="cold_items")
    systems = set(answer.frame["system"])
    assert set(module.SYSTEMS) <= systems and {"Random", "Popularity", "LightGCN (softmax)"} <= systems
    shuffled = answer.frame[answer.frame["row"] == "features shuffled"]
    assert len(shuffled) == module.BEST and np.isfinite(shuffled["mean"]).all()
    assert len(answer.verdicts) == len(module.SYSTEMS)
    card = RunCard.load(tmp_path / "answer" / "card.json")
    assert card.settings["budget"]["trials"] == 1 and "FREEDOM" in card.settings["tuned"]
    again = bench.survey(**asked, folder=tmp_path / "answer", kind="cold_items")
    assert again.frame.equals(answer.frame)


def test_every_system_trains_without_its_own_idea(world, tmp_path):
    assert set(OFF) <= set(module.SYSTEMS)
    summary, table = bench.ablations(data=world, seeds=1, quick=1, folder=tmp_path)
    assert len(table) == sum(len(ideas) for ideas in OFF.values())
    one = table.set_index(["system", "idea"]).loc["FREEDOM", "no pruning"]
    frame = summary.frame.query("row == 'all' and metric == 'ndcg@20'").set_index("system")["mean"]
    assert (one["with"], one["without"]) == (frame["FREEDOM"], frame["FREEDOM, no pruning"])
    assert one["change"] == pytest.approx(one["without"] / one["with"] - 1)
    with pytest.raises(DataError, match="have nothing to switch off here"):
        bench.ablations(data=world, systems=["ItemKNN"])


def test_a_search_belongs_to_its_split(world, tmp_path):
    asked = {"data": world, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    some = ("ItemKNN", "LightGCN")
    for kind in ("cold_items", "random_per_user"):
        bench.survey(**asked, folder=tmp_path / kind, kind=kind, systems=some)
    assert {p.name for p in (tmp_path / "tuned" / world.name / "survey" / "random_per_user").iterdir()} >= set(some)


def test_what_is_not_known_is_refused(world):
    with pytest.raises(DataError, match=r"systems=.*SVD"):
        bench.survey(data=world, systems=["SVD"])
    with pytest.raises(DataError, match="kind='leave_one'"):
        bench.survey(data=world, kind="leave_one")

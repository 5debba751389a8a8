"""The survey's table: every system trains at smoke size, under one budget, and its features matter or do not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmllmrec import bench
from mmllmrec.bench import literature as module
from mmllmrec.bench.ablations import OFF
from mmllmrec.bench.run import Progress, Summary, command_of
from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.runcard import RunCard
from mmllmrec.training import tune as tuning


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=41, n_users=29, n_events=600, size=8)


def test_every_system_of_the_literature_is_surveyed(world, tmp_path):
    asked = {"data": world, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    answer = bench.survey(**asked, folder=tmp_path / "answer", kind="cold_items")
    systems = set(answer.frame["system"])
    assert set(module.SYSTEMS) <= systems and {"Random", "Popularity", module.SOFTMAX} <= systems
    shuffled = answer.frame[answer.frame["row"] == "features shuffled"]
    assert len(shuffled) == module.BEST and np.isfinite(shuffled["mean"]).all()
    assert len(answer.verdicts) == len(module.SYSTEMS)
    card = RunCard.load(tmp_path / "answer" / "card.json")
    assert card.settings["budget"]["trials"] == 1 and "FREEDOM" in card.settings["tuned"]
    again = bench.survey(**asked, folder=tmp_path / "answer", kind="cold_items")
    assert again.frame.equals(answer.frame)


@pytest.mark.parametrize(("kind", "other"), [("random_per_user", "cold_items"), ("cold_items", "random_per_user")])
def test_settings_of_an_earlier_survey_are_fitted_without_a_search(world, tmp_path, monkeypatch, kind, other):
    asked = {"data": world, "minutes": None, "quick": 1, "systems": ("ItemKNN", "FREEDOM"), "kind": kind}
    first = bench.survey(**asked, seeds=1, trials=3, tuned=tmp_path / "tuned", folder=tmp_path / "first")
    card = tmp_path / "first" / "card.json"
    searched, real = [], tuning.tune

    def watched(*args, **options):
        searched.append(Path(options["folder"]).name)
        return real(*args, **options)

    def scores(settings):
        return {k: v for k, v in settings["by seed"]["0"].items() if " | cost | " not in k}

    monkeypatch.setattr(tuning, "tune", watched)
    more = bench.survey(**asked, seeds=2, trials=3, tuned=tmp_path / "other", folder=tmp_path / "more", settings=card)
    assert not searched
    before, after = (RunCard.load(a.path).settings for a in (first, more))
    assert after["tuned"] == before["tuned"] and after["trials run"]["FREEDOM"] == 3
    assert scores(after) == scores(before)
    with pytest.raises(DataError, match="were chosen for something else"):
        bench.survey(**{**asked, "kind": other}, seeds=1, tuned=tmp_path / "other", settings=card)


def test_every_system_trains_without_its_own_idea(world, tmp_path):
    assert set(OFF) <= set(module.SYSTEMS)
    summary, table = bench.ablations(data=world, seeds=1, quick=1, folder=tmp_path)
    assert len(table) == sum(len(ideas) for ideas in OFF.values())
    one = table.set_index(["system", "idea"]).loc["FREEDOM", "no pruning"]
    frame = summary.frame.query("row == 'all' and metric == 'ndcg@20'").set_index("system")["mean"]
    assert (one["with"], one["without"]) == (frame["FREEDOM"], frame["FREEDOM, no pruning"])
    assert one["change"] == pytest.approx(one["without"] / one["with"] - 1)
    assert (tmp_path / "changes.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(DataError, match="have nothing to switch off here"):
        bench.ablations(data=world, systems=["ItemKNN"])


def test_a_search_belongs_to_its_split(world, tmp_path):
    asked = {"data": world, "seeds": 1, "trials": 1, "minutes": None, "quick": 1, "tuned": tmp_path / "tuned"}
    some = ("ItemKNN", "LightGCN")
    for kind in ("cold_items", "random_per_user"):
        bench.survey(**asked, folder=tmp_path / kind, kind=kind, systems=some)
    assert {p.name for p in (tmp_path / "tuned" / world.name / "survey" / "random_per_user").iterdir()} >= set(some)


def test_data_of_one_s_own_is_asked_by_its_folder(tmp_path):
    events = [f"u{u},i{(u * k) % 11}" for u in range(1, 9) for k in range(6)]
    (tmp_path / "interactions.csv").write_text("\n".join(["user_id,item_id", *events]))
    (tmp_path / "items.csv").write_text("\n".join(["item_id,title", *(f"i{i},title {i % 4}" for i in range(11))]))
    asked = {"data": "folder", "path": tmp_path, "seeds": 1, "minutes": None, "quick": 1, "systems": ("ItemKNN",)}
    answer = bench.survey(**asked, tuned=tmp_path / "tuned", folder=tmp_path / "answer")
    assert {"ItemKNN", module.SOFTMAX, "Random"} <= set(answer.frame["system"])
    command = RunCard.load(tmp_path / "answer" / "seed0" / "report" / "card.json").settings["command"]
    assert command.startswith(f"mmllmrec bench survey --data folder --path {tmp_path}")


def test_what_is_not_known_is_refused(world):
    with pytest.raises(DataError, match=r"systems=.*SVD"):
        bench.survey(data=world, systems=["SVD"])
    with pytest.raises(DataError, match="kind='leave_one'"):
        bench.survey(data=world, kind="leave_one")


def test_a_search_begins_with_four_settings_of_which_the_first_is_published(world):
    asked = module.setup(world)
    for name in (module.SOFTMAX, *module.SYSTEMS):
        row = module.published_row(name, asked)
        if name in module.CLOSED:
            continue
        assert len({str(sorted(start.items())) for start in row.starts}) == len(row.starts) == 4, name
        rate = row.starts[0]["fit.lr"]
        assert rate == module.fit_of(name)["lr"] and all(s["fit.lr"] in (rate, 3 * rate) for s in row.starts)
        assert row.space["fit.lr"][0] <= rate


def test_a_bench_tells_each_step_and_the_command_that_asks_for_it(capsys):
    bar = Progress("survey", 3)
    bar.begin("seed 0, BPR")
    bar.end("0.2500 on validation")
    bar.skip(1)
    bar.begin("seed 0, EASE")
    bar.end("0.2600 on validation")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("survey 1/3: seed 0, BPR, 0.2500 on validation, ") and lines[1].startswith("survey 3/3")
    asked = {"data": "lastfm-2k", "system": ("BPR", "LightGCN, softmax"), "minutes": 12.0, "model": None, "n": 3}
    told = command_of("survey", **asked, end_to_end=True)
    expected = "mmllmrec bench survey --data lastfm-2k --system BPR --system 'LightGCN, softmax' --minutes 12 --n 3"
    assert told == f"{expected} --end-to-end"


def test_a_cell_of_fewer_seeds_says_so():
    columns = ["system", "row", "metric", "mean", "std", "of oracle", "seeds"]
    rows = [("A", "all", "ndcg@20", 0.5, 0.1, None, 3), ("B", "all", "ndcg@20", 0.4, None, None, 1)]
    summary = Summary("t", pd.DataFrame(rows, columns=columns, dtype=object), Path("card.json"))
    assert summary.table().loc["B", "all"] == "0.4000 (1 of 3 seeds)"
    assert summary.table().loc["A", "all"] == "0.5000 ±0.1000"

"""The four questions at smoke size: what is asked, searched, kept and read again; their statistic against a loop."""

import functools
import json

import numpy as np
import pytest

from mmllmrec import bench
from mmllmrec.bench import questions, rows
from mmllmrec.bench.answer import NDCG, Column, Layout
from mmllmrec.bench.ask import Budget, Question, ask
from mmllmrec.data.atelier import atelier
from mmllmrec.data.dataset import RecDataset
from mmllmrec.data.interactions import DataError
from mmllmrec.evaluation.protocols import harmonic
from mmllmrec.evaluation.significance import clustered_bootstrap, over_seeds
from mmllmrec.features.table import FeatureTable
from mmllmrec.models import Unified
from mmllmrec.models.unified import PRESETS
from mmllmrec.runcard import RunCard
from mmllmrec.seed import generator
from mmllmrec.training import fit as training
from mmllmrec.training import tune as tuning


@pytest.fixture(scope="module")
def world():
    return atelier(n_items=83, n_users=61, n_events=900, size=8, modalities=("image", "text", "sensor"))


@pytest.fixture(scope="module")
def asked(world, tmp_path_factory):
    """Keywords of a smoke run; the searches' folder is shared by all tests, as by the four questions."""
    tuned = tmp_path_factory.mktemp("tuned")
    return {"data": world, "seeds": 1, "trials": 1, "minutes": None, "tuned": tuned, "quick": 1}


def test_q1_is_tuned_once_told_with_verdicts_and_never_run_twice(asked, tmp_path, monkeypatch):
    answer = bench.q1(folder=tmp_path, **asked)
    systems = set(answer.table().index)
    assert {"Unified", "Unified (cached)", "Unified, random weights", "TwoStage", "AlphaRec", rows.TWIN} <= systems
    assert {"Random", "Popularity", "ContentKNN", "Oracle", "Unified, shuffled image"} <= systems
    assert {"TwoStage on random features", "TwoStage on shuffled features"} <= systems
    assert list(answer.table()) == ["warm", "cold", "cold only", "trained parameters", "seconds", "peak MiB"]
    assert answer.value("Unified", "cost", "peak MiB") > 100 and answer.value("BPR (softmax)", "cost", "seconds") > 0

    # the verdicts are those of the users' values in the seed's report
    v = answer.verdicts.set_index(["against", "row"]).loc[("TwoStage", "cold")]
    difference = answer.value("Unified", "cold") - answer.value("TwoStage", "cold")
    assert v["difference"] == pytest.approx(difference) and v["low"] <= v["difference"] <= v["high"]
    assert v["relative"] == pytest.approx(answer.value("Unified", "cold") / answer.value("TwoStage", "cold") - 1)
    assert (answer.verdicts["p (Holm)"] >= answer.verdicts["p"]).all()
    ids = [answer.value(s, "warm") for s in questions.SOFTMAXED]
    best = answer.verdicts.query("row == 'warm' and against in @questions.SOFTMAXED")["against"].item()
    assert answer.value(best, "warm") == max(ids)
    assert any(line.startswith(f"Unified / {rows.TWIN} on cold: ") and "%" in line for line in answer.told())
    assert "of the seconds" in answer.told()[-1]

    card = RunCard.load(tmp_path / "card.json")
    assert card.metrics[f"Unified | cold | {NDCG}"] == [answer.value("Unified", "cold"), None]
    assert card.settings["by seed"]["0"][f"Unified | cold | {NDCG}"] == answer.value("Unified", "cold")
    assert card.settings["budget"]["trials"] == 1 and card.settings["trials run"]["Unified, end_to_end"] == 1
    assert card.settings["trials run"]["TwoStage"] == len(rows.FEATURES["nano"])  # every kind of frozen feature
    reused = card.settings["tuned"]["Unified, random weights"]
    assert reused == card.settings["tuned"]["Unified"] and reused["search"] == "Unified, end_to_end"
    assert (tmp_path / card.settings["cards"][0]).is_file() and "verdicts" in (tmp_path / "table.txt").read_text()

    kept = Unified.from_pretrained(tmp_path / "seed0" / "model", catalog=asked["data"].catalog)
    assert {p.name for p in (tmp_path / "seed0" / "model" / "adapters").iterdir()} == {"vision", "language"}
    about = (tmp_path / "seed0" / "model" / "README.md").read_text()
    assert "`mmllmrec bench q1 --data" in about and "| Unified, cold, ndcg@20 |" in about and "TwoStage" not in about
    assert np.array_equal(kept.train_data.items, questions.cold_items(asked["data"], 0).train.items)

    @functools.wraps(training.fit)  # tune reads its signature
    def never(*anything, **else_):
        raise AssertionError("what was done is read")

    monkeypatch.setattr(training, "fit", never)
    monkeypatch.setattr(tuning, "fit", never)
    again = bench.q1(folder=tmp_path, **asked)
    assert again.frame.equals(answer.frame) and again.told() == answer.told()
    assert len(again.plot().axes) == 3 and "<table" in again._repr_html_()


def test_q2_has_cold_items_cold_users_and_their_curves(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "USER_EVENTS", (0, 3))
    monkeypatch.setattr(questions, "ITEM_EVENTS", (0, 2))
    answer = bench.q2(folder=tmp_path, **asked)
    for system in ("DropoutNet (softmax)", "CLCRec", "ALDI (softmax)", "AlphaRec", "TwoStage", "Unified", "ContentKNN"):
        warm, cold = answer.value(system, "warm"), answer.value(system, "cold")
        assert answer.value(system, "harmonic mean") == pytest.approx(harmonic(warm, cold))
    assert list(answer.curve("cold user").columns) == [0, 3]
    assert list(answer.curve("cold item").columns) == [0, 2]
    assert answer.curve("cold item").notna().all(axis=None)
    v = answer.verdicts.set_index(["against", "row"])
    gap = answer.value("Unified", "harmonic mean") - answer.value("CLCRec", "harmonic mean")
    assert v.loc[("CLCRec", "harmonic mean"), "difference"] == pytest.approx(gap)
    # not the split of q1, and the searches are the same all the same
    assert RunCard.load(tmp_path / "card.json").split["name"] == "cold_both"
    assert len(answer.plot().axes) == 7
    # every system that ranks new items at every price, and what they gain where they cost more
    by_price = answer.curve("cold items, by their price")
    assert list(by_price.columns) == list(questions.PRICES) and "LightGCN (softmax)" not in by_price.index
    assert (by_price.loc["Unified"].diff().dropna() >= 0).all()
    assert f"ContentKNN, which has no price, gives {answer.value('ContentKNN', 'cold'):.4f}" in answer.told()[-1]


def test_q3_asks_about_every_further_sense(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "SHARES", (0.0, 0.6))
    monkeypatch.setitem(rows.FEATURES, "nano", ["towers-0:16"])  # which another catalogue's must follow, for the curves
    asked = asked | {"tuned": tmp_path / "tuned"}
    first = bench.q3(folder=tmp_path, **asked)
    assert {"Unified", "Unified, image + text", "TwoStage", "TwoStage, image + text"} <= set(first.table().index)
    assert first.value("Oracle without sensor", "all") < first.value("Oracle", "all")
    assert first.curve("missing channels").index.tolist() == ["Unified"]  # the others do not smell
    # what is there to nobody's loss is what the table says
    assert first.curve("missing modality").loc["Unified", 0.0] == pytest.approx(first.value("Unified", "all"))

    fitted = []
    real = training.fit
    monkeypatch.setattr(training, "fit", lambda model, *a, **k: fitted.append(k["seed"]) or real(model, *a, **k))
    second = bench.q3(folder=tmp_path, **(asked | {"seeds": 2}))
    assert set(fitted) == {1} and len(fitted) == 5  # four rows and the reference; seed 0 was read, not run
    assert (second.frame.query("system == 'Unified' and row == 'all'")["seeds"] == 2).all()
    assert set(json.loads(second.path.read_text())["settings"]["by seed"]) == {"0", "1"}
    with pytest.raises(DataError, match="other settings or data"):
        monkeypatch.setattr(
            questions, "cold_items", lambda data, seed: questions.splits.cold_items(data, seed=seed + 5)
        )
        bench.q3(folder=tmp_path, **asked)


def test_q4_says_what_each_fusion_finds_and_what_it_loses(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "KNOCKED", ("noised",))
    answer = bench.q4(folder=tmp_path, **asked)
    tables = list(answer.layout.tables)
    found = answer.table(tables[1])
    assert set(found.columns) == {"image-only", "text-only", "XOR", "kind", "chime", "scent"}
    assert (found.loc[rows.TWIN] == "1.00").all() and {"Unified, early only", "Unified, late + gate"} <= set(
        found.index
    )
    assert list(answer.table(tables[2])) == ["noised image", "noised text", "noised sensor"]
    assert rows.TWIN not in answer.table(tables[2]).index
    # a variant alone brings Unified, whose settings it takes; without the twin nothing is said of recovery
    some = bench.q4(folder=tmp_path / "some", systems=["Unified, late only"], **asked)
    assert {"Unified", "Unified, late only"} == {s for s in some.frame["system"] if s.startswith("Unified")}
    assert some.value("Unified, late only", "cold") == answer.value("Unified, late only", "cold")


def test_some_rows_of_a_question_bring_what_they_stand_on_and_the_claims_that_are_left(asked, tmp_path):
    some = ("Unified", "DropoutNet (softmax)")
    answer = bench.q2(folder=tmp_path / "some", systems=some, **asked)
    trained = {s for s in answer.frame["system"] if s not in ("Random", "Popularity", "ContentKNN", "Oracle")}
    assert trained == {*some, "LightGCN (softmax)"}  # whose latents DropoutNet stands on
    assert set(answer.verdicts["against"]) == {"DropoutNet (softmax)", "ContentKNN"}
    whole = bench.q2(folder=tmp_path / "whole", **asked)
    assert whole.value("Unified", "cold") == answer.value("Unified", "cold")
    only = questions.only(question(), ["LightGCN (softmax)"])
    assert [r.name for r in only.rows] == ["LightGCN (softmax)"] and only.controls == () and not only.claims
    with pytest.raises(DataError, match=r"systems=.*SVD.* are no rows of q2"):
        bench.q2(folder=tmp_path / "none", systems=["SVD"], **asked)


def question():
    """A question with controls and one claim, over two rows."""
    unified = rows.Row("Unified", lambda *a, **k: None, {}, "Unified")
    claims = [questions.Claim("Unified", questions.SOFTMAXED, "warm")]
    layout = Layout({NDCG: [Column("all", "all")]})
    return Question("q", "", [rows.REFERENCE, unified], layout, questions.cold_items, claims, ("shuffled text",))


def test_what_cannot_be_asked(asked, tmp_path, world):
    with pytest.raises(DataError, match="data='nothing': the questions are asked of"):
        bench.q1(folder=tmp_path, **(asked | {"data": "nothing"}))
    with pytest.raises(DataError, match="seeds=0"):
        bench.q1(folder=tmp_path, **(asked | {"seeds": 0}))
    split = questions.cold_items(world, 0)
    with pytest.raises(DataError, match="features='pixels'"):
        rows.two_stage_features(split, "pixels", PRESETS["nano"])
    assert max(rows.two_stage_features(split, "descriptors:7", PRESETS["nano"]).widths.values()) == 7
    with pytest.raises(DataError, match="no further sense"):
        bench.q3(folder=tmp_path, **(asked | {"data": atelier(n_items=31, n_users=17, modalities=("text",))}))


def test_an_image_tower_must_not_have_seen_what_is_new(world, tmp_path):
    asked = rows.setup(world, vision=tmp_path / "seed{seed}")
    assert asked.hybrid["space"]["vision"] == [str(tmp_path / "seed{seed}")]
    assert asked.towers(None, "") is PRESETS["nano"]
    for seed in (0, 1):
        made = questions.cold_items(world, 0)
        RunCard("pretrain", "posters", 0, split=made.describe()).save(tmp_path / f"seed{seed}" / "card.json")
    split, users = questions.cold_items(world, 0), questions.splits.cold_both(world, seed=0)
    for one in (split, users):  # which hold out the same items
        assert asked.towers(one, asked.vision).vision == str(tmp_path / "seed0")
    other = questions.cold_items(world, 1)
    with pytest.raises(DataError, match="seed1' was trained on cold_items of seed 0, and saw"):
        asked.towers(other, asked.vision)
    card = RunCard("pretrain", "posters", 0, split=other.describe())
    card.settings["also"] = [{"name": s.name, "hash": s.hash} for s in (questions.splits.cold_both(world, seed=1),)]
    card.save(tmp_path / "seed1" / "card.json")
    for one in (other, questions.splits.cold_both(world, seed=1)):
        assert asked.towers(one, asked.vision).vision == str(tmp_path / "seed1")


def test_recorded_tastes_are_searched_from_two_sides(world, tmp_path, monkeypatch):
    recorded_data = RecDataset("recorded", world.interactions, world.catalog)
    asked = rows.Setup(recorded_data, "nano", "cached")
    planted, recorded = rows.two_stage_row(rows.setup(world)), rows.two_stage_row(asked)
    assert len(planted.starts) == 1 and "mix" not in planted.space
    assert [s["mix"] for s in recorded.starts] == [10.0, 40.0] and recorded.space["fit.epochs"] == [20, 40]
    # both are tried before anything is drawn, with the first kind of features
    monkeypatch.setitem(rows.FEATURES, "nano", ["descriptors:8", "towers-0:8"])
    layout = Layout({NDCG: [Column("warm", "warm")]})
    question = Question("q", "Q:", [rows.two_stage_row(asked)], layout, questions.cold_items, first="TwoStage")
    ask(question, asked, seeds=1, budget=Budget(2, None, tmp_path / "tuned"), folder=tmp_path, quick=1)
    card = RunCard.load(tmp_path / "tuned" / recorded_data.name / "TwoStage" / "card.json")
    tried = [(t["mix"], t["features"]) for t in card.settings["table"]]
    assert tried == [(10.0, "descriptors:8"), (40.0, "descriptors:8"), (10.0, "towers-0:8")]


def test_changed_features_are_the_same_or_as_wide_where_there_were_some():
    rng = np.random.default_rng(0)
    here = np.array([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1], [1, 1], [1, 0]], dtype=bool)
    table = FeatureTable({"image": rng.normal(size=(7, 3)), "text": rng.normal(size=(7, 2))}, here)
    dealt, noise = rows.shuffled(table, seed=0), rows.randomised(table, seed=0)
    for m, column in (("image", here[:, 0]), ("text", here[:, 1])):
        assert sorted(map(tuple, dealt.tables[m][column])) == sorted(map(tuple, table.tables[m][column]))
        assert not np.array_equal(dealt.tables[m], table.tables[m])
        assert noise.widths == table.widths and not noise.tables[m][~column].any()
    assert table.only(("text",)).modalities == ("text",)
    assert np.array_equal(table.only(("text",)).presence, here[:, 1:])


def test_clustered_bootstrap_is_a_loop_over_resampled_users():
    rng = np.random.default_rng(1)
    users = 13
    seeds = []
    for _ in range(3):
        ranked = [np.sort(rng.choice(users, size=n, replace=False)) for n in (11, 7)]
        seeds.append([(u, rng.random(len(u)), rng.random(len(u))) for u in ranked])
    a, b = (
        np.stack([over_seeds([(s[row][0], s[row][side]) for s in seeds], users) for row in (0, 1)], axis=1)
        for side in (1, 2)
    )
    for user in range(users):
        values = [s[1][1][list(s[1][0]).index(user)] for s in seeds if user in s[1][0]]
        assert a[user, 1] == pytest.approx(np.mean(values)) if values else np.isnan(a[user, 1])

    def both(means):
        return 2 * means[..., 0] * means[..., 1] / (means[..., 0] + means[..., 1])

    found = clustered_bootstrap(a, b, combine=both, resamples=400, seed=3)
    kept = [u for u in range(users) if not (np.isnan(a[u]).all())]
    draws = generator(3, "clustered bootstrap")
    differences, ratios = [], []
    for size in (250, 150):
        for counts in draws.multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=size):
            drawn = [u for u, n in zip(kept, counts, strict=True) for _ in range(n)]
            x, y = (harmonic(*(float(np.nanmean(side[drawn, row])) for row in (0, 1))) for side in (a, b))
            differences.append(x - y)
            ratios.append(x / y - 1)
    x, y = (harmonic(*(float(np.nanmean(side[:, row])) for row in (0, 1))) for side in (a, b))
    assert found.difference == pytest.approx(x - y) and found.relative == pytest.approx(x / y - 1)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    assert found.relative_low == pytest.approx(sorted(ratios)[int(np.ceil(0.025 * 400)) - 1])
    side = min(sum(d <= 0 for d in differences), sum(d >= 0 for d in differences))
    assert found.p == pytest.approx(min(1, 2 * (side + 1) / 401))


def test_clustered_bootstrap_covers_and_refuses():
    rng = np.random.default_rng(2)
    b = rng.random((500, 1))
    sure = clustered_bootstrap(b + 0.1, b, resamples=500)
    assert sure.low == pytest.approx(0.1) and sure.p == pytest.approx(2 / 501)
    assert clustered_bootstrap(b, b).p == 1.0
    wide = clustered_bootstrap(b, np.zeros_like(b), resamples=100)
    assert np.isnan(wide.relative) and wide.difference > 0.4
    gone = b.copy()
    gone[3] = np.nan
    with pytest.raises(ValueError, match="same users"):
        clustered_bootstrap(b, gone)
    with pytest.raises(ValueError, match="no user"):
        clustered_bootstrap(np.full((3, 1), np.nan), np.full((3, 1), np.nan))

"""Instruction data from training events, and a model that learns from it."""

import copy
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.evaluation.ranking import Lists, top
from mmllmrec.features import adapters
from mmllmrec.language import instruct
from mmllmrec.language.generate import Generator
from mmllmrec.language.profiles import Overlap
from mmllmrec.language.rerank import NO, YES, Reranked
from mmllmrec.training import causal
from mmllmrec.training.causal import answer_loss, fit_causal
from tests.planted import Table

HERE = Path(__file__).parent
U, ITEMS = 41, 24
KINDS = ("vase", "lamp", "bowl", "clock", "bag", "chair")
MATERIALS = ("walnut", "brass", "linen", "glass")
TITLES = [f"{m} {k}" for m in MATERIALS for k in KINDS]


@pytest.fixture(scope="module")
def nano():
    return Generator.load("nano")


@pytest.fixture(scope="module")
def world():
    """Every user takes things of one material alone, four of six; one of the two left is held out."""
    rng = np.random.default_rng(0)
    kept, held = [], []
    for user in range(U):
        mine = 6 * (user % 4) + rng.permutation(6)
        kept += [(user, i) for i in mine[:4]]
        held.append((user, mine[4]))
    ids = IdMap(range(U)), IdMap(range(ITEMS), what="item id")
    train, valid = (Interactions(*np.array(cells).T, None, *ids) for cells in (kept, held))
    scores = rng.random((U, ITEMS)).astype(np.float32)  # a first stage that knows nothing
    return train, valid, scores, top(Table(scores), np.arange(U), ITEMS, seen=train.csr, k=ITEMS)


def test_examples_ask_what_training_knows(world):
    train, _, _, first = world
    some = instruct.examples(train, TITLES, first, rounds=2, per_user=3, negatives=2, listed=5, last=2)
    tasks = [e.task for e in some]
    # half of four events are asked about in a round, and the others told
    assert tasks.count("pointwise") == 2 * 2 * 3 * U and tasks.count("listwise") == tasks.count("next_title") == 4 * U
    assert [e.user for e in some] == sorted(e.user for e in some) and {e.user for e in some} == set(range(U))
    assert len({tuple(e.fields["history"]) for e in some if e.user == 0}) == 2
    for one in some:
        taken = {TITLES[i] for i in train.csr[one.user].indices}
        history = one.fields["history"]
        assert len(history) == 2 and set(history) < taken
        if one.task == "pointwise":
            assert (one.fields["candidate"] in taken) == (one.answer == YES) and one.answer in (YES, NO)
            assert one.fields["candidate"] not in history
        if one.task == "pairwise":
            both = [one.fields["first"], one.fields["second"]]
            assert [b in taken for b in both] == [c == one.answer.strip() for c in "ab"]
        if one.task == "next_title":
            assert one.answer.strip() in taken - set(history)
        if one.task == "listwise":
            said = {c["label"]: c["item"] for c in one.fields["candidates"]}
            order = one.answer.strip().split(", ")
            assert sorted(order) == sorted(said) == list("abcde")
            assert [said[x] in taken for x in order] == [True] + [False] * 4
    firsts = [e.answer for e in some if e.task == "pairwise"]
    assert 0.2 < firsts.count(" a") / len(firsts) < 0.8
    assert some == instruct.examples(train, TITLES, first, rounds=2, per_user=3, negatives=2, listed=5, last=2)
    brief = instruct.examples(train, TITLES, first, tasks=("pointwise",), last=0, profile=lambda said: "; ".join(said))
    for one in brief:  # what is asked about is in no profile
        known = one.fields["profile"].split("; ")
        assert one.fields["history"] == [] and len(known) == 2 and one.fields["candidate"] not in known
    for wrong, says in (({"tasks": ["setwise"]}, "setwise"), ({"listed": 27}, "2 to 26"), ({"rounds": 0}, "rounds=0")):
        with pytest.raises(DataError, match=says):
            instruct.examples(train, TITLES, first, **wrong)
    none = Lists(np.arange(0), np.zeros((0, 3), int), np.zeros((0, 3), bool))
    with pytest.raises(DataError, match="nothing to ask"):
        instruct.examples(train, [""] * ITEMS, none)


def test_a_prompt_is_parsed_once_a_task(nano, world, monkeypatch):
    train, _, _, first = world
    some = instruct.examples(train, TITLES, first, tasks=("pointwise", "pairwise"), rounds=1, per_user=1, last=1)
    parsed, load = [], instruct.load_prompt
    monkeypatch.setattr(instruct, "load_prompt", lambda name: parsed.append(name) or load(name))
    assert len(instruct.rows_of(nano, some)) == len(some) > 2 * U
    assert sorted(parsed) == ["pairwise", "pointwise"]


def test_a_tuned_model_is_kept_and_loaded_again(nano, world, tmp_path):
    train, _, _, first = world
    some = instruct.examples(train, TITLES, first, tasks=("pointwise",), per_user=1)
    tuned = instruct.instruct(nano, some, folder=tmp_path / "lora", epochs=2, lr=5e-3, progress=False)
    loaded = Generator.load("nano", adapter=tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, tuned.model(ids).logits, atol=1e-4, rtol=1e-3)
    assert tuned.hash != nano.hash == Generator.load("nano").hash  # the base is as it was
    assert instruct.instruct(nano, some, epochs=2, lr=5e-3, progress=False).hash == tuned.hash
    other = Generator.load("nano")
    with torch.no_grad():
        next(other.model.parameters()).add_(0.01)
    with pytest.raises(DataError, match="other model"):
        instruct.instruct(other, some, folder=tmp_path / "lora", epochs=2, lr=5e-3, progress=False)


def test_a_no_is_as_often_asked_about_as_it_is_taken():
    """So that yes against no says what the user adds to how often an item is taken."""
    rng = np.random.default_rng(0)
    often = np.arange(ITEMS) ** 2 + 1.0
    cells = [(u, i) for u in range(200) for i in rng.choice(ITEMS, 5, replace=False, p=often / often.sum())]
    train = Interactions(*np.array(cells).T, None, IdMap(range(200)), IdMap(range(ITEMS), what="item id"))
    none = Lists(np.arange(0), np.zeros((0, 3), int), np.zeros((0, 3), bool))
    some = instruct.examples(train, TITLES, none, tasks=("pointwise",), rounds=3, negatives=4)
    asked = {
        a: np.array([sum(e.fields["candidate"] == t for e in some if e.answer == a) for t in TITLES]) for a in (YES, NO)
    }
    # what many took is drawn often, and refused often since few of those asked have it
    free = train.item_counts * (200 - train.item_counts)
    assert np.corrcoef(asked[NO], free)[0, 1] > 0.97 > np.corrcoef(asked[NO], 200 - train.item_counts)[0, 1]
    assert np.corrcoef(asked[YES], train.item_counts)[0, 1] > 0.97


def test_what_is_not_taken_comes_from_the_first_stage_and_from_anywhere(world):
    train, _, _, first = world
    few = Lists(first.users, first.items[:, :3], first.real[:, :3])
    some = instruct.examples(train, TITLES, few, tasks=("pairwise", "listwise"), per_user=4, listed=5)
    offered = np.repeat([{TITLES[i] for i in row} for row in few.items], len(some) // U)
    hard = []
    for near, one in zip(offered, some, strict=True):
        if one.task == "pairwise":
            wrong = one.fields["second" if one.answer == " a" else "first"]
            hard.append(wrong in near)
        else:
            said = {c["label"]: c["item"] for c in one.fields["candidates"]}
            order = [said[x] for x in one.answer.strip().split(", ")][1:]
            places = [TITLES.index(t) for t in order if t in near]
            mine = next(row.tolist() for row in few.items if near == {TITLES[i] for i in row})
            assert places == sorted(places, key=mine.index)  # in the first stage's order, and before all others
            assert [t in near for t in order] == sorted((t in near for t in order), reverse=True)
    assert 0.3 < np.mean(hard) < 0.7


def rows(nano, count=40):
    say = [nano.tokenizer(f" {t}", add_special_tokens=False)["input_ids"] for t in TITLES]
    return [(say[n % 24], [*say[(n + 5) % 24], 3]) for n in range(count)]


def adapted(nano):
    torch.manual_seed(0)
    return adapters.attach(copy.deepcopy(nano.model), rank=2, kind="language")


def test_the_loss_is_the_answers_alone(nano):
    some = rows(nano, 7)
    total = count = 0
    for prompt, answer in some:
        with torch.no_grad():
            steps = torch.log_softmax(nano.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0], dim=-1)
        total -= sum(float(steps[len(prompt) + k - 1, t]) for k, t in enumerate(answer))
        count += len(answer)
    for tokens in (1, 20, 8192):
        assert answer_loss(nano.model, some, batch_tokens=tokens) == pytest.approx(total / count, abs=1e-4)


def test_what_prompts_share_is_read_once_to_the_same_end(nano, monkeypatch):
    rng = np.random.default_rng(0)
    some = []
    for _ in range(4):
        told = rng.integers(5, 400, 30).tolist()
        some += [
            ([*told, *rng.integers(5, 400, n).tolist()], rng.integers(5, 400, 3 - n % 2).tolist()) for n in (1, 4, 7)
        ]
    some.append(([7, 8], [9, 3]))  # shares nothing

    def read():
        model = copy.deepcopy(nano.model)
        groups = causal._groups(model, some, 150)
        loss = causal._Answering(model)(*causal._tensors(some, groups, torch.device("cpu")))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        return groups, loss.item(), gradient, answer_loss(nano.model, some, batch_tokens=150)

    groups, loss, gradient, mean = read()
    assert [size for size, _ in groups] == [30, 30, 30, 30, 0]
    assert causal._lengths(some, groups).sum() < 0.6 * sum(len(p) + len(a) for p, a in some)
    monkeypatch.setattr(causal, "MASKED", ())
    alone = read()
    assert len(alone[0]) == 13
    assert loss == pytest.approx(alone[1], rel=1e-5) and mean == pytest.approx(alone[3], rel=1e-5)
    torch.testing.assert_close(gradient, alone[2], atol=1e-4, rtol=1e-3)


def test_a_run_that_was_cut_off_ends_as_it_would_have(nano, tmp_path, monkeypatch):
    some, held = rows(nano)[8:], rows(nano)[:8]
    options = {"valid": held, "epochs": 3, "batch_tokens": 60, "lr": 1e-2, "progress": False}
    whole = fit_causal(adapted(nano), some, **options)
    assert whole.history["valid loss"].iloc[-1] < whole.history["valid loss"].iloc[0]
    assert -whole.best_score == pytest.approx(answer_loss(whole.model, held), abs=1e-5)
    real, calls = causal._tensors, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(causal, "_tensors", killed)
    asked = {**options, "folder": tmp_path / "run", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit_causal(adapted(nano), some, **asked)
    again = fit_causal(adapted(nano), some, **asked)
    assert again.history["valid loss"].tolist() == whole.history["valid loss"].tolist()
    for (name, one), (_, other) in zip(again.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(DataError, match="other lr"):
        fit_causal(adapted(nano), some, **{**asked, "lr": 2e-2})


def test_what_cannot_be_trained_says_why(nano, world):
    train, _, _, first = world
    some = rows(nano, 3)
    for wrong, says in (
        ({"rows": []}, "rows: there is none"),
        ({"valid": [([], [3])]}, "valid: row 0 has no prompt"),
        ({"rows": [([5], [])]}, "rows: row 0"),
    ):
        with pytest.raises(DataError, match=says):
            fit_causal(adapted(nano), **{"rows": some, "valid": some, **wrong})
    frozen = copy.deepcopy(nano.model).requires_grad_(False)
    with pytest.raises(DataError, match="attach a LoRA"):
        fit_causal(frozen, some, valid=some)
    few = instruct.examples(train, TITLES, first, tasks=("pointwise",), per_user=1)[:3]
    with pytest.raises(DataError, match="of 1 users leaves 1 aside"):
        instruct.instruct(nano, few)
    long = [instruct.Example("next_title", {"profile": "", "evidence": [], "history": ["x" * 9000]}, " y")]
    with pytest.raises(DataError, match=r"example 0 \(next_title\) has \d+ tokens"):
        instruct.rows_of(nano, long)


@pytest.mark.slow
def test_a_tuned_model_learns_which_reasons_count():
    """Everyone keeps to a material; which kinds and colours are among what they took is chance. Without tuning a reason
    is a reason, whatever it is about."""
    rng, parts = np.random.default_rng(0), (MATERIALS, KINDS, ("teal", "amber", "red", "blue", "violet", "green"))
    texts = [", ".join(one) for one in product(*parts)]
    per = len(texts) // len(MATERIALS)
    cells = np.array([(u, per * (u % 4) + i) for u in range(U) for i in rng.permutation(per)[:14]])
    train = Interactions(*cells.T, None, IdMap(range(U)), IdMap(range(len(texts)), what="item id"))
    scores = rng.random((U, len(texts))).astype(np.float32)
    first = top(Table(scores), np.arange(U), len(texts), seen=train.csr, k=60)
    writer, overlap = Generator.load("nano-writer"), Overlap.of(train, texts)
    options = {"tasks": ("pointwise",), "rounds": 2, "last": 0, "overlap": overlap}
    some = instruct.examples(train, texts, first, **options)
    tuned = instruct.instruct(writer, some, rank=8, epochs=3, lr=5e-3, batch_tokens=2048, progress=False)

    def right(model):
        """Of the first eight, those of the user's material; about fifteen of the sixty are."""
        made = Reranked(Table(scores), model, train, texts, n=60, reasoning="counted", last=0, progress=False)
        return float((made.rerank(np.arange(U)).items[:, :8] // per == np.arange(U)[:, None] % 4).mean())

    assert right(tuned) > max(0.9, right(writer) + 0.3)


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(tmp_path):
    script, found = str(HERE / "scripts" / "answering.py"), {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", [sys.executable]), ("two", torchrun)):
        told = [*how, script, str(tmp_path / name)]
        done = subprocess.run(told, capture_output=True, text=True, cwd=HERE.parent)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name).read_text())
    one, two = found.values()
    assert (one["processes"], two["processes"]) == (1, 2)
    for what in ("loss", "valid", "weights"):
        assert one[what] == pytest.approx(two[what], rel=1e-5)

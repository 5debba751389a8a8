"""The recipe of the small writer: answers of its prompts' schemas, and a model that loads."""

import numpy as np
import pytest

from mmllmrec.features.prompts import load_prompt
from mmllmrec.language.generate import Generator
from mmllmrec.language.writer import TASKS, Recipe, Shop, answers, train

SMALL = Recipe(items=120, users=30, events=600, rows=60, repeats=240, vocabulary=700, batch_tokens=4096)


@pytest.fixture(scope="module")
def shop():
    return Shop("atelier", 5, SMALL)


def test_answers_are_of_their_schemas_and_true(shop):
    some = list(answers(shop, np.random.default_rng(0), 200))
    assert {name for name, *_ in some} == set(TASKS)
    for name, fields, value in some:
        prompt = load_prompt(name)
        prompt.render(**fields)
        prompt.check(value)
        if name == "preference_reasoning":
            weighed = [t.rsplit(" ", 1) for t in f"{value['for']}, {value['against']}".split(", ") if t != "nothing"]
            told = [line.replace("for ", "").split(", ") for line in fields["history"]]
            assert all(int(n) == sum(t in one for one in told) for t, n in weighed)
            left = {*fields["candidate"].replace("for ", "").split(", ")} - {t for t, _ in weighed}
            assert len(left) + len(weighed) == 7
            assert all(sum(t in one for one in told) == shop.share[t] * len(told) for t in left)  # as usual: no side
        if name == "user_profile" and len(fields["history"]) > 8 and value["likes"]:
            best = value["likes"][0]
            assert sum(best in line for line in fields["history"]) >= 2
        if name == "explanation":
            labels = {e["label"] for e in fields["evidence"]}
            assert all(set(s["cites"]) <= labels for s in value["sentences"])
        if name == "item_profile" and not fields["seen"]:  # what is not shown is not said
            assert not any("backdrop" in a for a in value["attributes"])


@pytest.mark.slow
def test_a_writer_is_trained_written_and_loaded(tmp_path):
    card = train(tmp_path / "writer", SMALL)
    model = Generator.load(str(tmp_path / "writer"))
    assert 0 < card.metrics["answers_nats"] < np.log(700) and model.context == 1024
    # letters stand for candidates: each is one token, whatever else the tokenizer has learned
    assert all(
        len(model.tokenizer(f" {c}", add_special_tokens=False)["input_ids"]) == 1 for c in "abcdefghijklmnopqrst"
    )
    fields = {"title": "Calm walnut vase", "text": "", "seen": "", "evidence": []}
    assert set(model.generate(load_prompt("item_profile"), [fields], max_tokens=20, progress=False)[0].value)

"""Profiles, retrieval and explanations: from training events alone, and what they do with odd input."""

import json

import datasets
import numpy as np
import pytest

from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.features.prompts import Prompt, load_prompt
from mmllmrec.index import Index
from mmllmrec.language import profiles, retrieve
from mmllmrec.language.generate import Generated, Generator

U, ITEMS, D = 7, 11, 5
KINDS = ["oak chair", "oak table", "oak bench", "oak stool", "oak shelf", "tin cup", "tin plate", "tin bowl", "tin jug"]


class Recorder:
    """In place of a language model: keeps every prompt, and answers with the least that the schema allows."""

    name, hash, seconds = "recorder", "0", 0.0

    def __init__(self):
        self.prompts = []

    def generate(self, prompt, rows, **options):
        found = []
        for row in rows:
            self.prompts.append(prompt.render(**row))
            value = {"attributes": ["x"], "audience": "y", "summary": "z", "likes": ["x"], "description": "w"}
            cites = [e["label"] for e in row["evidence"][:1]] if prompt.id == "explanation" else []
            value["sentences"] = [{"text": "as said", "cites": cites}]
            value = {k: v for k, v in value.items() if k in prompt.output["properties"]}
            prompt.check(value)
            found.append(Generated(json.dumps(value), value, 3, 2, False))
        return found


def catalog_of(texts):
    ids = IdMap(range(len(texts)), what="item id")
    columns = {"item_id": ids.ids, "title": [t[:20] for t in texts], "text": texts}
    return Catalog(datasets.Dataset.from_dict(columns), ids)


def events(cells, users=U, items=ITEMS, times=True):
    u, i = np.array(cells).T
    when = np.arange(len(cells))[::-1] if times else None  # the last one named comes first in time
    return Interactions(u, i, when, IdMap(range(users)), IdMap(range(items), what="item id"))


@pytest.fixture
def shop():
    texts = [*KINDS, "MARKERVALID jar", "MARKERTEST pan"]
    train = events([(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (1, 3), (2, 5), (2, 6), (3, 5), (3, 7), (4, 4), (5, 8)])
    return train, catalog_of(texts)


def embeddings(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(U, D)).astype(np.float32), rng.normal(size=(ITEMS, D)).astype(np.float32)


def test_no_prompt_knows_what_was_taken_in_validation_or_test(shop):
    """Items 9 and 10 are taken in validation and test alone; the words of them are a marker that no prompt about a user
    may hold, nor one about another item."""
    train, catalog = shop
    texts = profiles.told(catalog)
    finder = retrieve.Retriever(train, texts, *embeddings())
    llm = Recorder()
    evidence = (
        [[e.said for e in es] for es in finder.neighbours(np.arange(ITEMS), k=11)],
        [[e.said for e in es] for es in finder.alike(np.arange(U), k=7, each=11)],
    )
    made = profiles.written(llm, train, catalog, evidence=evidence)
    plain = profiles.template(train, catalog)
    pairs = [(u, i) for u in range(U) for i in range(9)]
    retrieve.explain(llm, finder, pairs, k=11)
    about = [p for p in llm.prompts if 'called "MARKER' not in p]
    assert len(llm.prompts) > len(pairs) and len(about) == len(llm.prompts) - 2
    assert not [p for p in about if "MARKER" in p]
    assert not [t for t in (*plain.users, *plain.items[:9]) if "marker" in t.lower()]
    assert made.tokens == 5 * (ITEMS + U) and len(made.users) == U


def test_histories_are_the_last_of_training_oldest_first(shop):
    train, _ = shop
    found = profiles.histories(train, last=2)
    assert [h.tolist() for h in found] == [[1, 0], [2, 0], [6, 5], [7, 5], [4], [8], []]
    assert profiles.histories(events([(0, 3), (0, 1)], times=False), last=5)[0].tolist() == [1, 3]


def test_keyphrases_say_what_sets_items_apart(shop):
    train, catalog = shop
    texts = [f"{t}, sturdy and plain, for the house" for t in profiles.told(catalog)]
    phrases = profiles.Keyphrases(texts, fit_on=train.item_counts > 0, least=1)
    best = phrases.top(train.csr, k=2)
    assert best[0][0] == best[1][0] == "oak" and best[2][0] == "tin" and best[6] == []
    assert all("sturdy" not in b for b in best)  # everything says so: it tells nothing apart

    # the z-score of one phrase by hand: 3 of 3 items say oak, 5 of 9 in training do, a prior of ten items
    name = phrases.names.index("oak")
    share = 5 / 9
    own, every = (3 + 10 * share, 10 * (1 - share)), (5 + 10 * share, 4 + 10 * (1 - share))
    expected = (np.log(own[0] / own[1]) - np.log(every[0] / every[1])) / np.sqrt(1 / own[0] + 1 / every[0])
    assert phrases.weights(train.csr[:1])[0, name] == pytest.approx(expected, rel=1e-5)


def test_template_profiles_tell_users_apart_and_are_a_modality(shop):
    train, catalog = shop
    made = profiles.template(train, catalog)
    assert made.users[0].startswith("likes oak") and made.users[2].startswith("likes tin") and made.users[6] == ""
    assert "for those who like oak" in made.items[1]  # who took the table took other oak
    made.items[3] = ""
    richer = made.as_modality(catalog, lambda texts: np.array([[len(t), 1.0] for t in texts]))
    assert richer.modalities == (*catalog.modalities, "profile")
    # nothing in training says what items 9 and 10 say
    assert richer.present("profile").tolist() == [i not in (3, 9, 10) for i in range(ITEMS)]
    assert richer.signal("profile")[0].tolist() == [len(made.items[0]), 1.0]
    assert richer.hash != catalog.hash and "profile" not in catalog.modalities
    with pytest.raises(DataError, match="already"):
        richer.with_features("profile", np.zeros((ITEMS, 2)))
    empty = profiles.Profiles("x", [""] * ITEMS, [""] * U)
    with pytest.raises(DataError, match="nothing to encode"):
        empty.as_modality(catalog, lambda texts: np.zeros((0, 2)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "word " * 25_000,
        "a\x00b\x1bc",
        "\u202eevil",
        "شاي بالنعناع للضيوف",
        "tea 👨\u200d👩\u200d👧 time",
        "{{ 7 * 7 }}",
    ],
)
def test_odd_texts_make_short_prompts_and_profiles(shop, text):
    train, _ = shop
    texts = [*KINDS, "jar", text]
    catalog = catalog_of(texts)
    llm = Recorder()
    made = profiles.written(llm, train, catalog)
    assert max(map(len, llm.prompts)) < 3 * profiles.LONGEST
    assert not any(c in p for p in llm.prompts for c in "\x00\x1b\u202e") and not any("49" in p for p in llm.prompts)
    assert bool(made.items[-1]) == bool(text.strip())  # nothing is said of an item without text
    assert isinstance(profiles.template(train, catalog).items[-1], str)


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_histories_of_any_length_fit_a_prompt(count):
    n = max(count, 2)
    cells = [(0, i) for i in range(count)] + [(1, 0), (1, 1)]
    train = events(cells, users=2, items=n)
    catalog = catalog_of([f"thing number {i}" for i in range(n)])
    llm = Recorder()
    profiles.written(llm, train, catalog)
    prompt = llm.prompts[-2]  # of user 0
    assert prompt.count("\n- ") == min(count, profiles.LAST)
    assert ("nothing yet" in prompt) == (count == 0)
    assert len(profiles.template(train, catalog).users[0]) < 200


def test_prompts_of_any_script_and_length_fit_the_model_that_ships():
    texts = [*KINDS, "漆器の花瓶 " * 300, "شاي بالنعناع " * 200]
    cells = [(0, i) for i in range(ITEMS)] + [(1, 9), (2, 10)]
    nano = Generator.load("nano")
    made = profiles.written(nano, events(cells), catalog_of(texts), max_tokens=20, progress=False)
    assert len(made.items) == ITEMS and len(made.users) == U


def test_alike_users_say_what_the_user_has_not_taken(shop):
    train, catalog = shop
    texts = profiles.told(catalog)
    users, items = embeddings()
    users[1] = users[0] * 2  # of one direction
    finder = retrieve.Retriever(train, texts, users, items)
    found = finder.alike(np.array([0, 6]), k=1, each=3)
    assert [e.events for e in found[0]] == [((1, 3),)] and texts[3] in found[0][0].said
    assert found[1] == []  # nothing is known of a user without events
    near = finder.neighbours(np.array([0, 10]), k=2)
    cosines = items @ items[0] / np.linalg.norm(items, axis=1)
    order = [i for i in np.argsort(-cosines) if i != 0 and train.item_counts[i]]
    assert [e.items[0] for e in near[0]] == order[:2]
    with pytest.raises(DataError, match="7 users and 11 items"):
        retrieve.Retriever(train, texts, users[:3], items)


def test_every_sentence_of_an_explanation_rests_on_evidence(shop):
    train, catalog = shop
    finder = retrieve.Retriever(train, profiles.told(catalog), *embeddings())
    evidence = finder.between(0, 3, k=2)
    for one in evidence:
        assert one.items and all(train.csr[u, i] for u, i in one.events)  # what is cited happened
    assert {e.label for e in evidence} == {f"e{n + 1}" for n in range(len(evidence))} and len(evidence) > 2
    good = {"sentences": [{"text": "you like oak", "cites": ["e1", "e2", "e1"]}]}
    made = retrieve.cited(good, (0, 3), evidence)
    assert str(made) == "you like oak [e1, e2]"
    for cites, says in ((["e9"], r"cites \['e9'\]"), ([], "cites nothing")):
        with pytest.raises(DataError, match=f"item 3 to user 0.*{says}"):
            retrieve.cited({"sentences": [{"text": "trust me", "cites": cites}]}, (0, 3), evidence)


def test_a_model_is_held_to_the_labels_that_there_are(shop):
    train, catalog = shop
    finder = retrieve.Retriever(train, profiles.told(catalog), *embeddings())
    nano = Generator.load("nano")
    pairs = [(0, 3), (2, 8), (6, 4)]
    found = retrieve.explain(nano, finder, pairs, k=2, max_tokens=24, progress=False)
    for pair, one in zip(pairs, found, strict=True):
        known = finder.between(*pair, k=2)
        assert one is not None and one.sentences and all(c in known for _, cited in one.sentences for c in cited)
    silent = retrieve.Retriever(train, ["" if i != 8 else "tin jug" for i in range(ITEMS)], *embeddings())
    assert retrieve.explain(nano, silent, [(0, 3)], progress=False) == [None]
    held = retrieve.limited(load_prompt("explanation"), ["e1"])
    with pytest.raises(DataError, match="e2"):
        held.check({"sentences": [{"text": "x", "cites": ["e2"]}]})


def test_an_index_finds_what_a_full_product_finds():
    rng = np.random.default_rng(1)
    table, queries = rng.normal(size=(53, D)), rng.normal(size=(7, D))
    table[3] = 0
    place, score = Index(table).nearest(queries, k=5)
    units = [x / np.maximum(np.linalg.norm(x, axis=1), 1e-9)[:, None] for x in (queries, table)]
    cosine = units[0] @ units[1].T
    cosine[:, 3] = -np.inf
    np.testing.assert_array_equal(place, np.argsort(-cosine, axis=1)[:, :5])
    np.testing.assert_allclose(score, -np.sort(-cosine, axis=1)[:, :5], atol=1e-5)
    plain = Index(table, cosine=False, which=np.arange(53) < 5).nearest(queries, k=9)[0]
    np.testing.assert_array_equal(plain, np.argsort(-(queries @ table[:5].T), axis=1))
    own = Index(table).nearest(table, k=2, besides=np.arange(53))[0]
    assert not (own == np.arange(53)[:, None]).any()
    assert Index(table[:1]).nearest(table[:1], k=3, besides=np.array([0]))[0].tolist() == [[-1]]
    for wrong, says in ((np.zeros((3, 2)), "no vectors"), (np.full((3, 2), np.nan), "finite")):
        with pytest.raises(DataError, match=says):
            Index(wrong)


def test_unknown_fields_of_a_prompt_of_ones_own_are_named(shop):
    with pytest.raises(DataError, match="unknown"):
        Prompt("mine", 1, {"title": "text"}, "{{ title }}").render(title="x", price="3")


def test_what_speaks_for_an_item_is_its_share_of_a_history_over_the_usual_one():
    train = Interactions(
        np.array([0, 0, 0, 1, 2, 2]), np.array([0, 1, 2, 0, 3, 4]), None, IdMap(range(3)), IdMap(range(6))
    )
    texts = ["red, cup", "red, jug", "red, cup", "tin, jug", "tin, cup", "new, cup"]
    overlap = profiles.Overlap.of(train, texts)
    assert overlap.usual == pytest.approx({"red": 4 / 6, "cup": 4 / 6, "jug": 2 / 6, "tin": 2 / 6})
    history = ["red, cup"] * 40
    # (40 + 20 * 2/3) / (60 * 2/3) = 1.33, half an octave up; (0 + 20 / 3) / (60 / 3) = 1/3, three halves down
    assert overlap.thoughts(history, "red, jug") == "for: red 140%; against: jug 35%"
    finer = profiles.Overlap.of(train, texts, steps=8)  # 3.3 eighths up, 12.7 down
    assert finer.thoughts(history, "red, jug") == "for: red 130%; against: jug 32%"
    assert overlap.thoughts(["red, cup"], "red, cup") == "for: nothing; against: nothing"  # one event says little
    assert overlap.thoughts(history, "new, cup") == "for: cup 140%; against: nothing"  # what was never taken: nothing


def test_a_text_without_spaces_is_cut_and_not_lost():
    (said,) = profiles.told(catalog_of(["Vase. " + "漆" * 5000]), longest=600)
    assert said.startswith("Vase. 漆") and 590 < len(said) < 620
    (said,) = profiles.told(catalog_of(["word " * 400]), longest=600)
    assert said.endswith("word ...") and len(said) <= 604


def test_what_a_picture_may_show_is_guessed_where_there_is_none():
    catalog = catalog_of(["oak chair", "oak bench", "tin cup"])
    catalog = catalog.with_features("sound", np.ones((3, 2), dtype=np.float32), absent=np.array([True, False, True]))
    llm = Recorder()
    found = profiles.described(llm, catalog, "sound", [["a lamp"], [], ["a jug", "a mug"]])
    assert [bool(one) for one in found] == [True, False, True]  # what is there is not guessed
    assert "oak chair" in llm.prompts[0] and "a lamp" in llm.prompts[0] and "a jug" in llm.prompts[1]


def test_what_is_too_long_is_shortened_the_oldest_first():
    nano = Generator.load("nano", context=180)
    asked = load_prompt("user_profile")
    rows = [{"history": [f"thing {n}" for n in range(60)], "evidence": ["near", "far " * 60]}]
    with pytest.raises(DataError, match=r"row 0 .* give shorter"):
        nano.generate(asked, rows, max_tokens=20, progress=False)
    seen, ids = [], nano.ids
    nano.ids = lambda text: seen.append(text) or ids(text)
    (one,) = nano.generate(asked, rows, max_tokens=20, shorten=True, progress=False)
    assert one.tokens_in <= 160 and one.tokens_in > 80
    assert "thing 59" in seen[-1] and "thing 0" not in seen[-1] and "near" in seen[-1]

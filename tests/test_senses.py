"""Sound and scent as words: which clusters there are is found, and what is absent has no word."""

import datasets
import numpy as np
import pytest

import mmllmrec as mm
from mmllmrec.data.catalog import Catalog
from mmllmrec.data.interactions import DataError, IdMap
from mmllmrec.language.senses import beside, clusters, heard


def test_the_number_of_clusters_is_found():
    rng = np.random.default_rng(0)
    for k in (2, 5):
        of = np.arange(200) % k
        centres = 8 * rng.normal(size=(k, 6))
        found = clusters(centres[of] + rng.normal(size=(200, 6)), centres, most=9)
        assert len(set(found)) == k  # a centre each
    with pytest.raises(DataError, match="most=1"):
        clusters(np.zeros((5, 2)), np.zeros((5, 2)), most=1)
    with pytest.raises(DataError, match="2 rows"):
        clusters(np.zeros((2, 2)), np.zeros((2, 2)))


def test_a_planted_world_s_chimes_and_scents_are_heard():
    data = mm.load_dataset("atelier", scale=0.2)
    said = heard(data.catalog, fit_on=np.arange(len(data.catalog)) % 5 > 0)
    for modality, word, factor in (("audio", "sound", "chime"), ("sensor", "scent", "scent")):
        here = data.catalog.present(modality)
        words = [[w for w in item if w.startswith(word)] for item in said]
        assert [len(w) for w in words] == here.astype(int).tolist()
        true = np.asarray(data.table[factor])[here]
        told = np.array([w[0] for w in words if w])
        assert np.mean([np.bincount(true[told == t]).max() / (told == t).sum() for t in set(told)]) > 0.95
        assert len(set(told)) == len(set(true.tolist()))


def test_a_catalogue_without_them_says_nothing():
    ids = IdMap(["a", "b"], what="item id")
    catalog = Catalog(datasets.Dataset.from_dict({"item_id": ids.ids, "title": ["x", "y"]}), ids)
    assert heard(catalog, fit_on=np.ones(2, dtype=bool)) == [[], []]


def test_what_is_heard_follows_what_is_written():
    found = beside(["lamp, brass", "", "vase"], [["sound a", "scent b"], ["scent c"], []])
    assert found == ["lamp, brass, sound a, scent b", "scent c", "vase"]

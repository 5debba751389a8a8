"""Captions: what the shipped model says of the planted worlds' pictures is mostly true."""

import numpy as np
import pytest

from mmllmrec.data.atelier import atelier
from mmllmrec.data.interactions import DataError
from mmllmrec.language.captions import captions


@pytest.mark.parametrize(("world", "least"), [("atelier", {"hue": 0.9, "backdrop": 0.9, "kind": 0.8, "pattern": 0.5})])
def test_captions_say_what_is_to_be_seen(world, least):
    shop = atelier(world, n_items=300, n_users=20, n_events=200, seed=7)
    said = captions(shop.catalog, progress=False)
    here = np.flatnonzero(shop.catalog.present("image"))
    assert all(not said[i] for i in np.flatnonzero(~shop.catalog.present("image")))
    v = shop.vocabulary
    words = {"hue": list(v.hues), "backdrop": v.backdrops, "kind": v.kinds, "pattern": v.patterns}
    for factor, share in least.items():
        right = [words[factor][shop.table[factor][i]] in said[i].split() for i in here]
        assert np.mean(right) > share, factor


def test_what_has_no_pictures_says_so(tmp_path):
    blind = atelier(n_items=20, n_users=10, n_events=60, modalities=("text",))
    with pytest.raises(DataError, match="has no pictures"):
        captions(blind.catalog)
    with pytest.raises(DataError, match=r"no clip, language, resampler\.safetensors"):
        captions(blind.catalog, source=tmp_path)

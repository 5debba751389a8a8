"""Every reader on a made-up folder in its exact layout, whole and damaged; and on the real data where it is."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmllmrec as mm
from mmllmrec.data.interactions import DataError

REAL = Path(os.environ.get("MMLLMREC_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def movies(tmp_path):
    rows = [(u, m, 3.5, 1000 + 10 * u + m) for u in range(1, 8) for m in (1, 2, 3, 5, 7, 11) if (u + m) % 5]
    lines = [",".join(map(str, r)) for r in rows]
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(lines) + "\n")
    titles = "".join(f'{m},"Film, The {m} (19{m:02d})",Drama|War\n' for m in (1, 2, 3, 5, 7, 11))
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + titles)
    (tmp_path / "overviews.csv").write_text('movieId,overview\n2,"A plot."\n')
    (tmp_path / "posters").mkdir()
    Image.new("RGB", (96, 144), "navy").save(tmp_path / "posters" / "3.jpg")
    return tmp_path


@pytest.fixture
def inter(tmp_path):
    rows = [(u, (u * 3 + k) % 11, 1, 0 if k < 3 else k - 2) for u in range(7) for k in range(5)]
    text = "userID\titemID\trating\tx_label\n" + "".join("\t".join(map(str, r)) + "\n" for r in rows)
    (tmp_path / "tiny.inter").write_text(text)
    np.save(tmp_path / "vggish.npy", np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32))
    (tmp_path / "items.tsv").write_text("itemID\tname\ttags\n" + "".join(f"{i}\tBand {i}\trock\n" for i in range(11)))
    return tmp_path


def test_movielens_layout(movies):
    data = mm.load_dataset("movielens-small", movies, min_events=2)
    assert data.catalog.titles[0] == "Film, The 1 (1901)" and data.catalog.item_ids[5] == "11"
    assert data.catalog.words()[1]["text"] == "Drama, War. A plot."
    assert data.catalog.present("image").tolist() == [False, False, True, False, False, False]
    pixels = data.catalog.pixels(16)
    assert pixels[2].any() and not pixels[0].any()
    assert data.interactions.times.min() > 1000


def test_a_garbled_rating_is_named_and_only_dropped_on_request(movies):
    path = movies / "ratings.csv"
    lines = path.read_text().splitlines()
    lines[3] += " see the manual"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"ratings.csv, line 4: .*bad_rows='drop'"):
        mm.load_dataset("movielens-small", movies, min_events=2)
    data = mm.load_dataset("movielens-small", movies, min_events=2, bad_rows="drop")
    assert data.about["dropped_rows"] == 1 and len(data.interactions) == len(lines) - 2


def test_a_threshold_that_leaves_nothing(movies):
    with pytest.raises(DataError, match="threshold=5"):
        mm.load_dataset("movielens-small", movies, threshold=5, min_events=2)


def test_movie_nobody_listed(movies):
    with (movies / "ratings.csv").open("a") as file:
        file.writelines(f"{u},99,4.0,5\n" for u in range(1, 8))
    with pytest.raises(DataError, match=r"movieId 99 is not in movies\.csv"):
        mm.load_dataset("movielens-small", movies, min_events=2)


def test_text_that_is_not_utf8(movies):
    with (movies / "movies.csv").open("ab") as file:
        file.write(b"12,Caf\xe9,Drama\n")
    with pytest.raises(DataError, match=r"movies.csv, line 8: not UTF-8 \(byte 0xe9\)"):
        mm.load_dataset("movielens-small", movies)


def test_inter_layout(inter):
    data = mm.load_dataset("lastfm-2k", inter)
    split = mm.splits.given(data)
    assert (len(split.train), len(split.valid), len(split.open_test())) == (21, 7, 7)
    assert data.catalog.features["vggish"].shape == (11, 3) and data.catalog.titles[4] == "Band 4"


def damage_nan(folder):
    table = np.load(folder / "vggish.npy")
    table[4, 0] = np.nan
    np.save(folder / "vggish.npy", table)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_nan, r"vggish.npy, row 4: NaN"),
        (lambda f: np.save(f / "whisper.npy", np.ones((9, 2))), r"whisper.npy: 9 rows for 11 items"),
        (lambda f: np.save(f / "bad.npy", np.array([{}], dtype=object)), r"bad.npy: .*pickle is never loaded"),
        (lambda f: (f / "other.inter").write_text(""), "2 .inter files"),
        (lambda f: (f / "tiny.inter").write_text("userID\titemID\n1\t1\n"), "column 'x_label' is missing"),
        (lambda f: (f / "tiny.inter").write_text("userID\titemID\tx_label\n1\t1\t7\n"), "row 0: x_label 7"),
        (lambda f: (f / "tiny.inter").write_text("userID\titemID\tx_label\n"), "no interactions"),
        (lambda f: (f / "tiny.inter").write_text("userID\titemID\tx_label\n1\t12\t0\n"), "unknown item id '12'"),
    ],
)
def test_damaged_inter_folders_are_refused(inter, damage, says):
    damage(inter)
    with pytest.raises(DataError, match=says):
        mm.load_dataset("lastfm-2k", inter)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not here")
def test_the_real_data():
    data = mm.load_dataset("lastfm-2k", REAL / "lastfm-2k-audio")
    x = data.interactions
    assert (x.n_users, x.n_items, len(x)) == (1858, 1425, 56345)
    movies = mm.load_dataset("movielens-small", REAL / "movielens-small-posters", min_events=1, bad_rows="drop")
    assert movies.interactions.n_users == 610
    assert movies.catalog.present("image").mean() > 0.97 and movies.catalog.image(0).size[1] == 144

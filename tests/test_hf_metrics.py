"""The modules of Hugging Face ``evaluate`` say what the evaluator says, and load without a network."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmllmrec.data.interactions import DataError, IdMap, Interactions
from mmllmrec.evaluation import hf
from mmllmrec.evaluation.metrics import compute
from mmllmrec.evaluation.ranking import rank

USERS, ITEMS = 23, 41

# in a process of its own: evaluate reads its environment when it is imported, and no cache may help
OFFLINE = """
import json, socket, sys

def refuse(*_, **__):
    raise OSError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
from mmllmrec.evaluation import hf

asked = json.load(sys.stdin)
print(json.dumps([evaluate.load(str(hf.path(name))).compute(**asked[name]) for name in hf.MODULES]))
"""


def load_and_compute(asked, home):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(home)}
    env = {k: v for k, v in env.items() if k not in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE], input=json.dumps(asked), capture_output=True, text=True, env=env, cwd=home
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Noise:
    def score(self, users):
        return torch.from_numpy(np.random.default_rng(5).random((USERS, ITEMS), dtype=np.float32)[users])


def lists():
    """A random ranking, and the same as rows of ids: integers, then strings."""
    rng = np.random.default_rng(3)
    users, items = np.nonzero(rng.random((USERS, ITEMS)) < 0.2)
    ids = IdMap(range(USERS)), IdMap([f"i{n}" for n in range(ITEMS)])
    events = Interactions(users, items, None, *ids)
    ranking = rank(Noise(), events, seen=None, k=ITEMS)
    return ranking, ranking.items.tolist(), [items[users == u].tolist() for u in ranking.users]


def test_loaded_by_path_without_a_network_they_agree_with_the_evaluator(tmp_path):
    ranking, numbers, wanted = lists()
    names = [[f"i{n}" for n in row] for row in numbers], [[f"i{n}" for n in row] for row in wanted]
    asked = {
        "recall_at_k": {"predictions": numbers, "references": wanted, "k": 7},
        "ndcg_at_k": {"predictions": names[0], "references": names[1]},
    }
    recall, ndcg = load_and_compute(asked, tmp_path)
    assert recall == {"recall@7": pytest.approx(ranking.per_user("recall@7").mean(), abs=1e-12)}
    assert ndcg == {"ndcg@20": pytest.approx(ranking.per_user("ndcg@20").mean(), abs=1e-12)}


@pytest.mark.parametrize("metric", ["recall@7", "ndcg@7", "ndcg@20"])
def test_a_list_shorter_than_k_leaves_its_places_empty(metric):
    ranking, numbers, wanted = lists()
    lengths = np.random.default_rng(1).integers(0, 13, len(numbers))
    shown = torch.from_numpy(np.arange(ITEMS) < lengths[:, None])
    expected = compute(metric, ranking.hits & shown, ranking.positives).mean()
    short = [row[:n] for row, n in zip(numbers, lengths, strict=True)]
    assert hf.mean(metric, short, references=wanted) == {metric: pytest.approx(float(expected), abs=1e-12)}
    assert hf.mean(metric, [[] for _ in wanted], references=wanted) == {metric: 0.0}


def test_what_has_no_value_is_refused_with_its_row():
    with pytest.raises(DataError, match="row 1: references are empty"):
        hf.mean("recall@5", [["a"], ["b"]], references=[["a"], []])
    with pytest.raises(DataError, match="row 1: predictions hold 'b' twice"):
        hf.mean("recall@5", [["a"], ["b", "c", "b"]], references=[["a"], ["b"]])
    with pytest.raises(DataError, match="row 0: references hold 'a' twice"):
        hf.mean("ndcg@5", [["a"], ["b"]], references=[["a", "a"], ["b"]])
    with pytest.raises(DataError, match=r"unknown module 'mrr_at_k'; modules are \['recall_at_k'"):
        hf.path("mrr_at_k")

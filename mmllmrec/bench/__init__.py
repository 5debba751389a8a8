"""The comparisons a user runs: the same systems, split and evaluator over several seeds, a run card for each number.

A bench goes on where it was cut off: a seed whose report is in the folder is read, not run, and a model that was being
fitted goes on from its checkpoint.
"""

from mmllmrec.bench.ablations import ablations
from mmllmrec.bench.answer import Answer
from mmllmrec.bench.language import language
from mmllmrec.bench.literature import survey
from mmllmrec.bench.parity import PARITY, beside, parity
from mmllmrec.bench.published import QUICKSTART, movielens, quickstart
from mmllmrec.bench.questions import q1, q2, q3, q4
from mmllmrec.bench.run import (
    CLASSICAL,
    METRICS,
    SOFTMAX,
    Entry,
    Summary,
    entry,
    model_of,
    run_seed,
    settings_of,
    summarise,
)

__all__ = [
    "CLASSICAL",
    "METRICS",
    "PARITY",
    "QUICKSTART",
    "SOFTMAX",
    "Answer",
    "Entry",
    "Summary",
    "ablations",
    "beside",
    "entry",
    "language",
    "model_of",
    "movielens",
    "parity",
    "q1",
    "q2",
    "q3",
    "q4",
    "quickstart",
    "run_seed",
    "settings_of",
    "summarise",
    "survey",
]

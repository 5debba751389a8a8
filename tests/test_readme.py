"""The README's numbers are those of the run cards it names, its commands are known, and its Python runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from mmllmrec.cli import app
from mmllmrec.cli.bench import rows_of

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# a table, and before it the line that names its metric and its card
TABLES = re.findall(r"\b(ndcg@\d+|recall@\d+)\b[^|]*?\(card:\s*`(.+?)`\)\.?\n\n((?:\| system .*\n)(?:\|.*\n)+)", TEXT)
TIMES = re.findall(r"\(card:\s*`([^`]+?)`\)\.?\n\n((?:\| timed .*\n)(?:\|.*\n)+)", TEXT)
IDEAS = re.findall(r"\(card:\s*`([^`]+?)`\)[^|]*?\n\n((?:\| whole .*\n)(?:\|.*\n)+)", TEXT)
BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL))
LINES = re.findall(r"(?:\bmmllmrec|-m mmllmrec\.cli) ([^#)\n]+)", BLOCKS) + re.findall(r"`mmllmrec ([^`]+)`", TEXT)
COMMANDS = sorted({" ".join(line.split()) for line in LINES})

COSTS = {"tokens a user": "{:.0f}", "seconds a user": "{:.2f}", "tuning, s": "{:.0f}"}


def rows(table):
    lines = [[c.strip() for c in line.strip("|\n ").split("|")] for line in table.splitlines()]
    return lines[0], lines[2:]


def test_there_are_tables():
    assert len(TABLES) >= 2 and TEXT.count("| system |") == len(TABLES)
    assert len(TIMES) == TEXT.count("| timed |") == 6


@pytest.mark.parametrize(("metric", "card", "table"), TABLES, ids=[t[1] for t in TABLES])
def test_every_number_is_in_its_card(metric, card, table):
    metrics = json.loads((ROOT / card).read_text(encoding="utf-8"))["metrics"]
    head, lines = rows(table)
    checked = 0
    for line in lines:
        for column, cell in zip(head[2:], line[2:], strict=True):
            if "peer" in column:
                continue
            if column in COSTS:
                cost = metrics.get(f"{line[0]} | cost | {column}")
                assert cell == ("-" if cost is None else COSTS[column].format(cost[0])), (line[0], column)
                continue
            if cell == "-":
                assert f"{line[0]} | {column} | {metric}" not in metrics
                continue
            mean, std = metrics[f"{line[0]} | {column} | {metric}"]
            shown = re.match(r"([\d.]+)(?: ± ([\d.]+))?(?: \((\d+)%\))?$", cell)
            assert shown, cell
            spread = "0.0000" if std is None else f"{std:.4f}"  # of one seed there is none
            assert shown[1] == f"{mean:.4f}" and (shown[2] or "0.0000") == spread, (line[0], column)
            if shown[3]:
                assert int(shown[3]) == round(100 * mean / metrics[f"Oracle | {column} | {metric}"][0])
            checked += 1
    assert checked >= len(lines)


@pytest.mark.parametrize(("card", "table"), TIMES, ids=[t[0] for t in TIMES])
def test_every_timing_is_in_its_card(card, table):
    metrics = json.loads((ROOT / card).read_text(encoding="utf-8"))["metrics"]
    head, lines = rows(table)
    for line in lines:
        for column, cell in zip(head[1:], line[1:], strict=True):
            value = metrics[line[0]].get(column)
            number = isinstance(value, int | float) and value < 1e4
            assert cell == ("-" if value is None else f"{round(value, 4):g}" if number else str(value))


def test_every_change_is_in_its_card():
    assert len(IDEAS) == TEXT.count("| whole |") == 1
    for card, table in IDEAS:
        changes = json.loads((ROOT / card).read_text(encoding="utf-8"))["settings"]["changes"]
        wanted = {}
        for one in changes:
            told = f"{one['idea']} {100 * one['change']:+.1f}%"
            line = wanted.setdefault(one["system"], (f"{one['with']:.4f}", []))
            line[1].append(f"**{told}**" if one["p (Holm)"] < 0.05 else told)
        assert {s: (whole, cell.split("; ")) for s, whole, cell in rows(table)[1]} == wanted


def test_every_file_it_names_is_there():
    named = re.findall(r"`((?:notebooks|adapters|prompts|mmllmrec)/[\w./-]*)`|\]\((\S+?)\)", TEXT)
    for name in filter(None, (n for pair in named for n in pair)):
        assert name.startswith("http") or (ROOT / name).exists(), name


def test_there_are_commands():
    assert {c.split()[0] for c in COMMANDS} >= {"bench", "finetune", "prompts"} and len(COMMANDS) >= 25


def parse(words):
    """The values that a command gets; it is not run."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words != ["--help"]:
        command, words = command.commands[words[0]], words[1:]
    return {} if words == ["--help"] else command.make_context(command.name, words).params


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_parse(command, monkeypatch, tmp_path):
    from mmllmrec.bench.ablations import OFF
    from mmllmrec.bench.language import LINES as WRITTEN
    from mmllmrec.bench.literature import SYSTEMS as SURVEYED
    from mmllmrec.bench.parity import SYSTEMS as PUBLISHED
    from mmllmrec.bench.rows import DATA
    from mmllmrec.data.splits import SPLITS
    from mmllmrec.training.finetune import LAUNCHERS
    from mmllmrec.training.speed import SYSTEMS as TIMED

    monkeypatch.chdir(tmp_path)
    Path("notebooks").symlink_to(ROOT / "notebooks")
    for file in ("FILE", "peer.csv"):
        Path(file).touch()
    words = shlex.split(command)
    asked = parse(words)
    for option, values in (("data", DATA), ("kind", SPLITS), ("launcher", ("", *LAUNCHERS))):
        assert option not in asked or asked[option] in values
    if asked.get("systems"):
        known = {"survey": SURVEYED, "ablations": OFF, "parity": PUBLISHED, "train": TIMED, "language": WRITTEN}
        rows = known[words[1]]
        for name in asked["systems"]:
            assert name in rows or (rows is TIMED and set(rows_of(name, rows)) <= set(rows))


@pytest.mark.slow
def test_its_python_runs(monkeypatch, tmp_path):
    import mmllmrec as mm

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    load, fit = mm.load_dataset, mm.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mm, "load_dataset", lambda name: load(name, n_items=150, n_users=90, n_events=1500))
    monkeypatch.setattr(mm, "fit", lambda model, split, **options: fit(model, split, **(options | {"epochs": 1})))
    exec(code, {})
    assert (tmp_path / "runs" / "my-first" / "config.json").is_file()

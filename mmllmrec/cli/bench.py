"""``mmllmrec bench``: one command a table of the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mmllmrec.cli.options import At, Folder, Kind, show

app = typer.Typer(no_args_is_help=True, help="The comparisons of the README, with a run card for each number.")

Seeds = Annotated[int, typer.Option(min=1, help="how many seeds, from 0")]
Cards = Annotated[Path, typer.Option("--folder", help="where the run card and the table go")]
Repeats = Annotated[int, typer.Option(min=1, help="how often each is timed; the median counts")]
Asked = Annotated[
    str, typer.Option("--data", "--dataset", help="atelier, atelier-b, movielens-small, lastfm-2k, folder (--path)")
]


@app.command("eval")
def bench_eval(repeats: Repeats = 5, folder: Cards = Path("runs/eval")) -> None:
    """Users ranked per second beside the bare matrix product and top-k (19,445 users, 7,050 items).

    Example: [bold]mmllmrec bench eval[/bold]
    """
    from mmllmrec.evaluation.speed import speed

    show(speed(repeats=repeats, folder=folder), f"evaluator, medians of {repeats}")
    print(f"run card: {folder / 'card.json'}")


def rows_of(name: str, table: Mapping[str, tuple[str, Any]]) -> list[str]:
    """The row of that name, else all rows of that class, else the name itself, which the bench then refuses."""
    return [name] if name in table else [row for row, (kind, _) in table.items() if kind == name] or [name]


@app.command("train")
def bench_train(
    repeats: Repeats = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="of each process; 1 on a machine that others use")] = None,
    systems: Annotated[
        list[str] | None,
        typer.Option("--system", help="these rows alone, 'LightGCN' being all rows of that class; all where not given"),
    ] = None,
    peer: Annotated[Path | None, typer.Option(exists=True, help="a CSV of another toolkit's seconds")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="of each system's training to its best; none where not given")
    ] = None,
    folder: Cards = Path("runs/train"),
) -> None:
    """Seconds per epoch and evaluation, samples per second and peak memory of the systems (118,551 events of 19,445
    users on 7,050 items, features of 4096 and 384 columns), beside a peer's; half an hour.

    Example: [bold]mmllmrec bench train --threads 1[/bold]
    """
    from mmllmrec.training.speed import SYSTEMS, speed

    rows = [row for name in systems or SYSTEMS for row in rows_of(name, SYSTEMS)]
    table = speed(repeats=repeats, threads=threads, systems=rows, peer=peer, minutes=minutes, folder=folder).fillna("-")
    show(table, f"training, medians of {repeats} epochs; features are whitened to 64 columns when a system is built")
    print(f"run card: {folder / 'card.json'}")


@app.command("growth")
def bench_growth(
    events: Annotated[list[int] | None, typer.Option(min=10_000, help="160000, 1600000, 16000000 if not given")] = None,
    systems: Annotated[list[str] | None, typer.Option("--system", help="BPR, LightGCN, FREEDOM if not given")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="of each process; 1 on a machine that others use")] = None,
    folder: Cards = Path("runs/growth"),
) -> None:
    """Seconds and memory of an epoch per event, on planted sets of ever more events; a quarter of an hour, 8 GiB.

    Example: [bold]mmllmrec bench growth --events 160000 --events 1600000[/bold]
    """
    from mmllmrec.training.growth import EVENTS, SYSTEMS, growth

    named = {"events": tuple(events or EVENTS), "systems": tuple(systems or SYSTEMS)}
    show(growth(**named, threads=threads, folder=folder), "growth, the least of two epochs")  # type: ignore[arg-type]
    print(f"run card: {folder / 'card.json'}")


@app.command("backbone")
def bench_backbone(
    repeats: Repeats = 5,
    threads: Annotated[int, typer.Option(min=1, help="to compute with")] = 1,
    backbones: Annotated[
        list[str] | None,
        typer.Option("--backbone", help="'nano, end to end', 'nano, cached' or 'minilm, cached'; all where not given"),
    ] = None,
    folder: Cards = Path("runs/backbone"),
) -> None:
    """Items that the unified backbone encodes and trains per second, beside the machine's rate of bare matrix products
    (128 items of Atelier with their events); a few minutes, 'minilm' needs its extra.

    Example: [bold]mmllmrec bench backbone --threads 1[/bold]
    """
    from mmllmrec.training.throughput import BACKBONES, throughput

    table = throughput(repeats=repeats, threads=threads, backbones=backbones or tuple(BACKBONES), folder=folder)
    show(table, f"the backbone, medians of {repeats} on {threads} thread{'s' if threads > 1 else ''}")
    print(f"run card: {folder / 'card.json'}")


@app.command("quickstart")
def bench_quickstart(seeds: Seeds = 3, folder: Folder = Path("runs/quickstart")) -> None:
    """The quickstart's table over seeds: Atelier, cold items held out, share of the oracle.

    Example: [bold]mmllmrec bench quickstart --seeds 3[/bold]
    """
    from mmllmrec import bench

    print(bench.quickstart(seeds=seeds, folder=folder))


@app.command("movielens")
def bench_movielens(
    seeds: Seeds = 3,
    folder: Folder = Path("runs/movielens"),
    path: At = None,
    kinds: Annotated[
        list[str] | None, typer.Option("--split", help="random_per_user or cold_items; both where not given")
    ] = None,
) -> None:
    """Real posters and words: random-per-user and cold-items splits, the unified model on minilm.

    Example: [bold]mmllmrec bench movielens --path ~/data/movielens-small-posters[/bold]
    """
    from mmllmrec import bench

    for summary in bench.movielens(
        seeds=seeds, folder=folder, path=path, kinds=kinds or ("random_per_user", "cold_items")
    ):
        print(summary)


@app.command("parity")
def bench_parity(
    seeds: Seeds = 3,
    folder: Folder = Path("runs/parity"),
    path: At = None,
    peer: Annotated[Path | None, typer.Option(exists=True, help="a CSV of another toolkit's figures")] = None,
    systems: Annotated[list[str] | None, typer.Option("--system", help="these alone; all where not given")] = None,
) -> None:
    """Published systems on Last.fm's own division, under the MMRec family's protocol and hyper-parameters.

    Example: [bold]mmllmrec bench parity --path ~/data/lastfm-2k-audio --peer peer.csv --system FREEDOM[/bold]
    """
    from mmllmrec import bench
    from mmllmrec.bench.parity import SYSTEMS

    summary, table = bench.parity(seeds=seeds, folder=folder, path=path, peer=peer, systems=systems or tuple(SYSTEMS))
    print(summary)
    if len(table):
        show(table, "beside the peer")


@app.command("ablations")
def bench_ablations(
    data: Asked = "lastfm-2k",
    path: At = None,
    kind: Kind = "random_per_user",
    systems: Annotated[list[str] | None, typer.Option("--system", help="these alone; all where not given")] = None,
    seeds: Seeds = 3,
    folder: Folder = Path("runs/ablations"),
) -> None:
    """Each system of the literature at its published setting, with and without its own idea; hours.

    Example: [bold]mmllmrec bench ablations --system FREEDOM --system MGCN[/bold]
    """
    from mmllmrec import bench
    from mmllmrec.bench.ablations import OFF

    asked = {"data": data, "path": path, "kind": kind, "seeds": seeds, "folder": folder}
    summary, table = bench.ablations(**asked, systems=systems or tuple(OFF))  # type: ignore[arg-type]
    print(summary)
    show(table, "without its own idea")


Trials = Annotated[int, typer.Option(min=1, help="settings tried of every row, on validation")]
Minutes = Annotated[float, typer.Option(min=0.01, help="of training that every row's search may take")]
Searches = Annotated[Path, typer.Option("--tuned", help="where searches are kept, shared by q1 to q4")]
EndToEnd = Annotated[
    bool,
    typer.Option(
        "--end-to-end",
        help="train the unified model end to end, not only its last layers (q1 on planted worlds: always)",
    ),
]

Some = Annotated[list[str] | None, typer.Option("--system", help="fit these rows alone; all where not given")]
Tower = Annotated[
    str | None,
    typer.Option(
        "--vision",
        help="folder of another image tower, as mmllmrec.training.posters makes it; '{seed}' in it is the split's",
    ),
]


@app.command("survey")
def bench_survey(
    data: Asked = "lastfm-2k",
    path: At = None,
    kind: Annotated[str, typer.Option("--split", help="random_per_user, cold_items or given")] = "random_per_user",
    systems: Annotated[list[str] | None, typer.Option("--system", help="these alone; see the table's rows")] = None,
    seeds: Seeds = 3,
    trials: Trials = 4,
    minutes: Minutes = 12.0,
    folder: Folder = Path("runs/survey"),
    tuned: Searches = Path("runs/tuned"),
    settings: Annotated[
        Path | None, typer.Option(exists=True, help="card.json of an earlier survey: its settings, without searching")
    ] = None,
) -> None:
    """The literature's systems under one protocol and one budget, beside the floors. Takes hours; goes on where it was.

    Example: [bold]mmllmrec bench survey --data lastfm-2k --system LightGCN --system FREEDOM[/bold]
    """
    from mmllmrec import bench

    asked: dict[str, Any] = {"data": data, "path": path, "kind": kind, "systems": systems, "seeds": seeds}
    print(bench.survey(**asked, trials=trials, minutes=minutes, folder=folder, tuned=tuned, settings=settings))


QUESTIONS = {
    "q1": "Q1, one unified model: does training extraction and encoding together beat extracting first, encoding later?"
    "\n\nID-only, content and two-stage rows, each tuned with the same budget; controls trained from scratch and at "
    "test; the factor-fed twin on planted data; verdicts with intervals."
    "\n\nExample: [bold]mmllmrec bench q1 --data atelier --seeds 3[/bold]",
    "q2": "Q2, cold start: new items and new users, from content alone or from a handful of events."
    "\n\nThe cold-start systems beside the unified model on one split that holds out items and users; curves by the "
    "number of events known."
    "\n\nExample: [bold]mmllmrec bench q2 --data movielens-small --path ~/data/movielens-small-posters[/bold]",
    "q3": "Q3, more senses: what sound and sensors add to pictures and words, and what missing content costs."
    "\n\nExample: [bold]mmllmrec bench q3 --data lastfm-2k --path ~/data/lastfm-2k-audio[/bold]",
    "q4": "Q4, fusion: early, late and both; which of the planted tastes each finds, and knock-outs at test."
    "\n\nExample: [bold]mmllmrec bench q4 --data atelier-b[/bold]",
}


def _question(name: str, about: str) -> None:
    """A command of one of the questions: they take the same."""

    @app.command(name, help=about)
    def command(
        data: Asked = "atelier",
        path: At = None,
        seeds: Seeds = 3,
        trials: Trials = 6,
        minutes: Minutes = 10.0,
        folder: Folder = Path(f"runs/{name}"),
        tuned: Searches = Path("runs/tuned"),
        end_to_end: EndToEnd = False,
        vision: Tower = None,
        systems: Some = None,
    ) -> None:
        from mmllmrec import bench

        asked: dict[str, Any] = {
            "systems": systems,
            "data": data,
            "path": path,
            "seeds": seeds,
            "trials": trials,
            "minutes": minutes,
        }
        # left out, real data is trained with the cached trainer alone
        asked |= {"folder": folder, "tuned": tuned, "end_to_end": end_to_end or None, "vision": vision}
        print(getattr(bench, name)(**asked))


for _name, _about in QUESTIONS.items():
    _question(_name, _about)


@app.command("language")
def bench_language(
    data: Asked = "atelier",
    path: At = None,
    model: Annotated[
        str | None,
        typer.Option(help="a language model, 'nano-writer', a folder or a hub id; 'nano-writer' on planted worlds"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="first places that are put in another order")] = 50,
    seeds: Seeds = 3,
    trials: Trials = 6,
    minutes: Minutes = 10.0,
    folder: Folder = Path("runs/language"),
    tuned: Searches = Path("runs/tuned"),
    end_to_end: EndToEnd = False,
    vision: Tower = None,
    systems: Some = None,
) -> None:
    """What language adds: profiles as features, retrieval, and re-ranking zero-shot, tuned, with and without reasoning,
    with tokens and seconds a user. Goes on where it was.

    Example: [bold]mmllmrec bench language --data atelier --seeds 3[/bold]
    """
    from mmllmrec import bench

    asked: dict[str, Any] = {"data": data, "path": path, "model": model, "n": n, "seeds": seeds, "trials": trials}
    asked |= {"minutes": minutes, "folder": folder, "tuned": tuned, "end_to_end": end_to_end or None}
    print(bench.language(**asked, vision=vision, systems=systems))

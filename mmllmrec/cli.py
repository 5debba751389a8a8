"""The command line: arguments in, one call, a table out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Multimodal recommendation: planted and real data, baselines, and one CLIP-plus-LLM model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(help="Comparisons over seeds, resumable; each writes run cards.", no_args_is_help=True)
data_app = typer.Typer(help="Look at a dataset.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")

Folder = Annotated[Path, typer.Option(help="Where reports and checkpoints go; a second call goes on from there.")]
DataPath = Annotated[Path | None, typer.Option(help="Folder of the data; default: below $MMLLMREC_DATA.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback()
def settings(debug: Debug = False) -> None:
    """Examples: [bold]mmllmrec data info atelier[/bold], [bold]mmllmrec bench lastfm --seeds 3[/bold]."""


@data_app.command("info")
def data_info(name: str, path: DataPath = None) -> None:
    """Sizes, modalities and what is missing. Example: mmllmrec data info movielens-small --path DIR"""
    from mmllmrec.data.dataset import load_dataset

    data = load_dataset(name, path)
    x = data.interactions
    typer.echo(f"{data.name}: {x.n_users:,} users, {x.n_items:,} items, {len(x):,} events ({data.about})")
    for modality in data.catalog.modalities:
        typer.echo(f"  {modality}: present for {data.catalog.present(modality).mean():.1%} of the items")


@bench_app.command("quickstart")
def bench_quickstart(seeds: int = 3, world: str = "atelier", folder: Folder = Path("runs")) -> None:
    """Floors, LightGCN, Unified and the oracle on Atelier, cold items held out."""
    from mmllmrec import bench

    frame = bench.quickstart(folder, seeds=seeds, world=world)
    for metric in ("ndcg@20", "recall@20"):
        typer.echo(bench.readable(frame, metric).to_string())
    typer.echo(f"run cards: {folder / f'quickstart-{world}'}")


@bench_app.command("lastfm")
def bench_lastfm(seeds: int = 3, path: DataPath = None, folder: Folder = Path("runs")) -> None:
    """BPR, LightGCN and VBPR on Last.fm 2K under the MMRec family's protocol."""
    from mmllmrec import bench

    frame = bench.lastfm(folder, seeds=seeds, path=path)
    for metric in ("recall@20", "ndcg@20"):
        typer.echo(bench.readable(frame, metric).to_string())
    typer.echo(f"run cards: {folder / 'lastfm'}")


@bench_app.command("eval")
def bench_eval(repeats: int = 5) -> None:
    """Users ranked a second, beside the bare matrix product and top-k on this machine."""
    from mmllmrec import bench

    typer.echo(bench.eval_speed(repeats=repeats).to_string(index=False))


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad usage or bad input."""
    from mmllmrec.data.interactions import DataError

    try:
        app()
    except DataError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

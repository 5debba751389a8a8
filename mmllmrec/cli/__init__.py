"""The command line: arguments in, one call, a table out. Exit codes: 0 done, 1 failed, 2 wrong usage or bad input."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mmllmrec.cli.bench import app as bench_app
from mmllmrec.cli.options import At, Data, Folder, Kind, Seed, show
from mmllmrec.cli.prompts import app as prompts_app

app = typer.Typer(
    name="mmllmrec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Multimodal recommendation: one CLIP-plus-LLM backbone beside the field's baselines.\n\n"
    "[bold]Start here[/bold]  mmllmrec demo\n\n"
    "[bold]Your own run[/bold]  mmllmrec train LightGCN --data atelier --split cold_items --folder runs/first, then "
    "mmllmrec evaluate runs/first and mmllmrec recommend runs/first u17",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at a dataset, or check one of your own.")
features_app = typer.Typer(no_args_is_help=True, help="What frozen towers say of the items, computed once and kept.")
app.add_typer(data_app, name="data")
app.add_typer(features_app, name="features")
app.add_typer(bench_app, name="bench")
app.add_typer(prompts_app, name="prompts")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False) -> None:
    pass  # --debug is read by main(), which catches what commands raise


def _split(data: str, path: Path | None, kind: str, seed: int, **reading: Any) -> Any:
    from mmllmrec.data.dataset import load_dataset
    from mmllmrec.data.splits import by_name

    return by_name(kind, load_dataset(data, path, **reading), seed=seed)


# -- notebooks -------------------------------------------------------------------------------------------------------


def execute(notebook: Path, *, smoke: bool = False, save: Path | None = None) -> Any:
    """Run a notebook's cells in order, each announced on the terminal; the executed notebook.

    It runs in its folder's parent, so that ``runs/`` and ``build/`` are those of the clone. ``smoke`` sets
    MMLLMREC_SMOKE=1 for the kernel, ``save`` is where the outputs are written.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(notebook, as_version=4)
    cells = [n for n, c in enumerate(book.cells) if c.cell_type == "code"]
    began = time.perf_counter()

    def announce(cell: Any, cell_index: int) -> None:
        if cell_index in cells:
            first = next((line for line in cell.source.splitlines() if line.strip()), "")
            number = cells.index(cell_index) + 1
            print(f"{time.perf_counter() - began:6.1f}s  cell {number}/{len(cells)}  {first[:80]}", flush=True)

    env = os.environ | ({"MMLLMREC_SMOKE": "1"} if smoke else {})
    where = {"metadata": {"path": str(notebook.resolve().parent.parent)}}
    client = NotebookClient(book, timeout=None, kernel_name="python3", resources=where, on_cell_start=announce)
    client.execute(env=env)
    print(f"{time.perf_counter() - began:6.1f}s  {notebook.name} done", flush=True)
    if save is not None:
        nbformat.write(book, save)
    return book


def _notebooks() -> Path:
    place = Path("notebooks")
    if not (place / "00_quickstart.ipynb").is_file():
        raise FileNotFoundError(
            "notebooks/00_quickstart.ipynb is not here: run this at the top of a clone, or start with "
            "'mmllmrec train LightGCN --data atelier --split cold_items'"
        )
    return place


@app.command()
def demo() -> None:
    """The quickstart, from nothing to a table: runs notebooks/00_quickstart.ipynb, writes it to build/ as a page and as
    a notebook with outputs.

    Example: [bold]mmllmrec demo[/bold]
    """
    notebook = _notebooks() / "00_quickstart.ipynb"
    from nbconvert import HTMLExporter

    page = Path("build/quickstart.html")
    page.parent.mkdir(exist_ok=True)
    book = execute(notebook, save=page.with_suffix(".ipynb"))
    page.write_text(HTMLExporter().from_notebook_node(book)[0], encoding="utf-8")
    report = Path("build/quickstart/report")
    print(f"\n{(report / 'table.txt').read_text(encoding='utf-8')}\npage: {page}\nrun card: {report / 'card.json'}")


@app.command()
def notebooks(
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny sizes, outputs thrown away")] = False,
) -> None:
    """Run every notebook in full and keep its outputs in place.

    Example: [bold]mmllmrec notebooks --smoke[/bold]
    """
    for book in sorted(_notebooks().glob("*.ipynb")):
        execute(book, smoke=smoke, save=None if smoke else book)


# -- data ------------------------------------------------------------------------------------------------------------


@data_app.command("info")
def data_info(name: Annotated[str, typer.Argument(help="a dataset's name")], path: At = None) -> None:
    """What a dataset holds: users, items, events, and which share of items has each modality.

    Example: [bold]mmllmrec data info atelier[/bold]
    """
    import pandas as pd

    from mmllmrec.data.dataset import load_dataset

    data = load_dataset(name, path)
    x = data.interactions
    rows: list[tuple[str, str]] = [("users", f"{x.n_users:,}"), ("items", f"{x.n_items:,}"), ("events", f"{len(x):,}")]
    rows.append(("density", f"{len(x) / max(x.n_users * x.n_items, 1):.3%}"))
    rows.append(("events a user, median", f"{int(pd.Series(x.user_counts).median())}"))
    rows.append(("timestamps", "yes" if x.times is not None else "no"))
    rows += [(f"items with {m}", f"{data.catalog.present(m).mean():.1%}") for m in data.catalog.modalities]
    rows += [(k, str(v)) for k, v in data.about.items()]
    show(pd.DataFrame(rows, columns=["what", "value"]), data.name)


@data_app.command("check")
def data_check(name: Annotated[str, typer.Argument(help="a dataset's name")], path: At = None) -> None:
    """Read a dataset whole, every picture included; the first thing wrong is named, with the file and the row.

    Example: [bold]mmllmrec data check movielens-small --path ~/data/movielens-small-posters[/bold]
    """
    from mmllmrec.data.dataset import load_dataset

    data = load_dataset(name, path)
    catalog = data.catalog
    pictures = catalog.present("image").nonzero()[0]
    for item in pictures:
        catalog.image(int(item))
    for modality in catalog.modalities:
        if modality not in ("image", "text"):
            catalog.signal(modality)
    print(
        f"{data.name}: {len(data.interactions):,} events, {len(catalog):,} items, {len(pictures):,} pictures read: good"
    )


# -- features --------------------------------------------------------------------------------------------------------

Kept = Annotated[Path, typer.Option("--store", help="the folder where states are kept; shared by all datasets")]


@features_app.command("extract")
def features_extract(
    data: Data = "atelier",
    path: At = None,
    image: Annotated[
        str, typer.Option(help="nano, a CLIP (ViT-B-32:laion2b_s34b_b79k), or a transformers model or folder")
    ] = "",
    text: Annotated[str, typer.Option(help="nano, minilm, a CLIP, or a transformers model or folder")] = "",
    audio: Annotated[str, typer.Option(help="a transformers audio model or folder; needs --rate")] = "",
    rate: Annotated[int | None, typer.Option(min=1, help="of the dataset's sound, in hertz (atelier: 4000)")] = None,
    pooling: Annotated[str | None, typer.Option(help="of text: mean, cls or last; the model's own without")] = None,
    layer: Annotated[int | None, typer.Option(help="of text: hidden state k; the last without")] = None,
    prompt: Annotated[str, typer.Option(help="what text is rendered by: a shipped prompt or a .jinja file")] = "item",
    layout: Annotated[str, typer.Option(help="table (safetensors and json) or inter (<modality>_feat.npy)")] = "table",
    batch: Annotated[int, typer.Option(min=1, help="items at once")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
    store: Kept = Path("runs/store"),
    folder: Annotated[Path, typer.Option("--folder", help="where the features and their run card go")] = Path(
        "runs/features"
    ),
) -> None:
    """Run frozen towers over a dataset's pictures, words and sound, and write a table a modality, row i item i.

    What was computed before is not computed again: a run cut off goes on, and a changed picture is the only one looked
    at. --layout inter writes the .npy files that other toolkits read.

    Example: [bold]mmllmrec features extract --data atelier --image nano --text minilm --folder runs/features[/bold]
    """
    import pandas as pd

    from mmllmrec.data.dataset import load_dataset
    from mmllmrec.data.interactions import DataError
    from mmllmrec.features.store import Store
    from mmllmrec.features.table import FeatureTable
    from mmllmrec.runcard import RunCard

    if layout not in ("table", "inter"):
        raise DataError(f"--layout {layout}: table or inter")
    if audio and rate is None:
        raise DataError("--audio needs --rate, the hertz of the dataset's sound")
    towers = []
    if image:
        from mmllmrec.features.image import image_extractor

        towers.append(image_extractor(image, device=device))
    if text:
        from mmllmrec.features.text import text_extractor

        towers.append(text_extractor(text, pooling=pooling, layer=layer, prompt=prompt, device=device))
    if audio and rate is not None:
        from mmllmrec.features.audio import audio_extractor

        towers.append(audio_extractor(audio, rate, device=device))
    if not towers:
        raise DataError("name a tower: --image nano, --text minilm, --audio openai/whisper-tiny, or several")
    loaded = load_dataset(data, path)
    began = time.perf_counter()
    table = FeatureTable.extracted(loaded.catalog, towers, store=Store(store), batch=batch)
    seconds = time.perf_counter() - began
    if layout == "table":
        table.save(folder)
    else:
        table.as_inter_files(folder)
    made_by = {t.modality: {"name": t.name, "hash": t.hash, "settings": t.settings} for t in towers}
    card = RunCard("features", layout, data=loaded.name, loaded=loaded.about.get("loaded", {}), seconds=seconds)
    card.model = {"extractors": made_by, "features": table.hash, "catalog": loaded.catalog.hash}
    rows = [
        (t.modality, t.name, t.hash, table.widths[t.modality], int(table.presence[:, n].sum()))
        for n, t in enumerate(towers)
    ]
    show(pd.DataFrame(rows, columns=["modality", "tower", "hash", "width", "items"]), f"{loaded.name}, {seconds:.1f} s")
    print(f"features: {folder}\nrun card: {card.save(folder / 'card.json')}")


@features_app.command("info")
def features_info(store: Kept = Path("runs/store")) -> None:
    """What a store keeps, a row a tower: items, bytes, and when it was written last.

    Example: [bold]mmllmrec features info --store runs/store[/bold]
    """
    from mmllmrec.features.store import Store

    show(Store(store).info(), str(store))


@features_app.command("prune")
def features_prune(
    extractor: Annotated[str | None, typer.Argument(help="a tower's name or hash, as info shows them")] = None,
    older_than: Annotated[float | None, typer.Option(min=0, help="days since it was written")] = None,
    store: Kept = Path("runs/store"),
) -> None:
    """Delete what a store keeps of one tower, or what is older than some days; never a file that is not a store's.

    Example: [bold]mmllmrec features prune --older-than 30[/bold]
    """
    from mmllmrec.features.store import Store

    print(f"freed {Store(store).prune(extractor, older_than=older_than) / 2**20:.1f} MiB of {store}")


# -- a model's life --------------------------------------------------------------------------------------------------


@app.command()
def train(
    model: Annotated[
        str, typer.Argument(help="ItemKNN, EASE, BPR, VBPR, LightGCN, LightGCNContent, AlphaRec, CLCRec or Unified")
    ],
    data: Data = "atelier",
    path: At = None,
    split: Kind = "random_per_user",
    epochs: Annotated[int | None, typer.Option(min=1, help="the model's own where not given")] = None,
    seed: Seed = 0,
    preset: Annotated[str, typer.Option(help="Unified's towers: nano, minilm or base")] = "nano",
    folder: Folder = Path("runs/first"),
) -> None:
    """Train a model, choose its best epoch on validation, save it and its run card.

    Example: [bold]mmllmrec train LightGCN --data atelier --split cold_items --epochs 20 --folder runs/first[/bold]
    """
    from mmllmrec import bench
    from mmllmrec.seed import seed_everything
    from mmllmrec.training.fit import fit

    parts = _split(data, path, split, seed)
    seed_everything(seed)
    built = bench.model_of(model, parts, preset=preset)
    settings = bench.settings_of(built) | ({"epochs": epochs} if epochs and built.trainable else {})
    run = fit(built, parts, seed=seed, folder=folder / "fit", **settings)
    run.model.save_pretrained(folder / "model")
    path_of_card = run.card.save(folder / "card.json")
    print(f"{run!r}, {run.seconds:.1f} s\nmodel: {folder / 'model'}\nrun card: {path_of_card}")


@app.command(
    epilog="[bold]Several processes, bf16[/bold]  accelerate launch --config_file $(mmllmrec finetune --launcher bf16) "
    "-m mmllmrec.cli finetune config.json\n\n"
    "Accelerate config files that ship: cpu2 (two CPU processes), bf16 (one GPU, or several), fsdp (FSDP2, for towers "
    "that do not fit one GPU). torchrun --nproc-per-node 2 -m mmllmrec.cli finetune config.json does as well."
)
def finetune(
    config: Annotated[Path | None, typer.Argument(help="a JSON file; --init writes one")] = None,
    folder: Folder = Path("runs/finetuned"),
    init: Annotated[Path | None, typer.Option("--init", help="write a config with the defaults here, and stop")] = None,
    launcher: Annotated[str, typer.Option(help="print where an Accelerate config is, and stop: cpu2, bf16, fsdp")] = "",
    resume: Annotated[bool, typer.Option(help="go on from what the folder holds")] = True,
) -> None:
    """Fine-tune LoRA adapters of nano, minilm or any open_clip and transformers pair, on any dataset, as a config says.

    Writes the model with its adapters, checkpoints, a report on validation and the run card to the folder.

    Example: [bold]mmllmrec finetune --init config.json && mmllmrec finetune config.json --folder runs/mine[/bold]
    """
    from mmllmrec.data.interactions import DataError
    from mmllmrec.training import finetune as tuning

    if launcher:
        print(tuning.launcher(launcher))
    elif init is not None:
        if init.exists():
            raise DataError(f"{init} is there already: name another file")
        print(f"config: {tuning.write_json(init, tuning.default())}")
    elif config is None:
        raise DataError("which config? mmllmrec finetune CONFIG; `mmllmrec finetune --init config.json` writes one")
    else:
        command = f"mmllmrec finetune {config} --folder {folder}"
        run = tuning.finetune(tuning.read(config), folder, resume=resume, command=command)
        if tuning.is_main():
            print(f"{run!r}, {run.seconds:.1f} s\nmodel: {folder / 'model'}\nrun card: {folder / 'card.json'}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="the folder given to train")],
    data: Data = "",
    path: At = None,
    split: Kind = "",
    seed: Annotated[int | None, typer.Option(help="of the split; the run card's where not given")] = None,
    on: Annotated[str, typer.Option(help="valid, or test once the choices are made")] = "valid",
) -> None:
    """Rank the whole catalogue for every user and print the table, floors beside it; data and split are the run card's.

    Example: [bold]mmllmrec evaluate runs/first --on valid[/bold]
    """
    from mmllmrec.data.interactions import DataError
    from mmllmrec.evaluation.report import evaluate as report_of
    from mmllmrec.models.base import Recommender

    about = _card(folder)
    seed = int(about.seed or 0) if seed is None else seed
    name, place, reading = _trained_on(about, data, path)
    parts = _split(name, place, split or about.split["name"], seed, **reading)
    model = Recommender.from_pretrained(folder / "model", catalog=parts.catalog)
    if parts.hash != about.split["hash"]:
        raise DataError(f"{folder} was trained on other events than this split's: use its --data, --split and --seed")
    report = report_of(model, parts, on=on, seed=seed, folder=folder / f"report-{on}")
    show(report.table(), f"ndcg@20 on {on} of {parts.name}({parts.data.name})")
    print(f"run card: {report.path}")


@app.command()
def recommend(
    folder: Annotated[Path, typer.Argument(help="the folder given to train")],
    users: Annotated[list[str], typer.Argument(help="user ids")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="items a user")] = 10,
    data: Data = "",
    path: At = None,
) -> None:
    """The first k items for some users, seen items left out; an unknown user gets popular items, and it says so.

    Example: [bold]mmllmrec recommend runs/first u17 u18 -k 5[/bold]
    """
    from mmllmrec.data.dataset import load_dataset
    from mmllmrec.serving.recommend import recommend as recommendations

    name, place, reading = _trained_on(_card(folder), data, path)
    catalog = load_dataset(name, place, **reading).catalog
    show(recommendations(folder / "model", users=users, k=k, catalog=catalog).frame)


def _card(folder: Path) -> Any:
    from mmllmrec.data.interactions import DataError
    from mmllmrec.runcard import RunCard

    if not (folder / "card.json").is_file():
        raise DataError(f"{folder} holds no card.json: give the folder that `mmllmrec train ... --folder` wrote")
    return RunCard.load(folder / "card.json")


def _trained_on(card: Any, data: str, path: Path | None) -> tuple[str, Path | None, dict[str, Any]]:
    """Name, path and options to load a dataset again: those of the run card, where the command names no other."""
    loaded = card.loaded if data in ("", card.loaded.get("name")) else {}
    place = path or (Path(loaded["path"]) if loaded.get("path") else None)
    return data or loaded.get("name") or card.data, place, loaded.get("options") or {}


def main() -> None:
    """Entry point: one line for an error, its traceback with ``--debug`` (before or after the command)."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="mmllmrec")
    except Exception as error:
        if debug:
            raise
        from mmllmrec.data.interactions import DataError

        usage = isinstance(error, DataError | FileNotFoundError)
        message = " ".join(str(error).split())
        kind = "" if usage else f"{type(error).__name__}: "
        print(f"error: {kind}{message} (--debug shows where)", file=sys.stderr)
        sys.exit(2 if usage else 1)

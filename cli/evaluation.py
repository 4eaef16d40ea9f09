"""Commands about trained networks: eval knn, eval linear, eval logistic, export."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Precision, Seed, Style, format_of

if TYPE_CHECKING:
    from trainer.evaluation import Subject
    from trainer.labelled import Labelled, Skipped

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run of lvd train, a checkpoint of one, a file of weights, dinov2_*."),
]
Train = Annotated[str, typer.Option(metavar="PLACE", help="Labelled Parquet files to learn from.")]
Test = Annotated[str, typer.Option(metavar="PLACE", help="Labelled Parquet files to be tested on.")]
TrainRows = Annotated[str | None, typer.Option(metavar="START:STOP", help="These rows of --train alone.")]
TestRows = Annotated[str | None, typer.Option(metavar="START:STOP", help="These rows of --test alone.")]
ImageColumn = Annotated[str, typer.Option(help="Column of image bytes.")]
LabelColumn = Annotated[str, typer.Option(help="Column of labels: strings or whole numbers.")]
Size = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the images in pixels; default: what the network was made for, at most 224."),
]

eval_app = typer.Typer(
    help="Evaluate a frozen network on labelled images: k-NN, the linear probe, logistic regression.",
    no_args_is_help=True,
)


def knn(
    model: Model,
    train: Train,
    test: Test,
    k: Annotated[list[int] | None, typer.Option("--k", help="Neighbors; default: 10, 20, 100 and 200.")] = None,
    train_rows: TrainRows = None,
    test_rows: TestRows = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    size: Size = None,
    device: Device = None,
    precision: Precision = None,
    style: Style = "table",
) -> None:
    """Classify by the votes of the nearest training images (temperature 0.07), as published; nothing is trained.

    \b
    Examples:
      lvd eval knn net --train photos.parquet --test photos.parquet --train-rows :60 --test-rows 60:
    """
    from trainer.evaluation import knn as evaluate
    from trainer.knn import KS

    rows = _rows(train, test, train_rows, test_rows, image_column, label_column)
    found, skipped = evaluate(_subject(model, size, device, precision), *rows, k or KS)
    lines = [[neighbors, shares.top1, shares.top5] for neighbors, shares in found.items()]
    _print(["k", "top-1", "top-5"], lines, style)
    _tell_skipped(skipped)


def linear(
    model: Model,
    train: Train,
    test: Test,
    steps: Annotated[int, typer.Option(min=1, help="Steps of SGD.")] = 12_500,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a step.")] = 1024,
    chosen_on: Annotated[
        str,
        typer.Option(help="The best head by: held_out (a tenth of --train), or test, as published, which flatters."),
    ] = "held_out",
    random_views: Annotated[
        bool, typer.Option("--random-views", help="Train on other random crops in each pass, as published; slow.")
    ] = False,
    all_heads: Annotated[bool, typer.Option("--all", help="Show all heads of the grid.")] = False,
    train_rows: TrainRows = None,
    test_rows: TestRows = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    size: Size = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = None,
    style: Style = "table",
) -> None:
    """Train linear classifiers on frozen features: the published grid of inputs and learning rates, in one pass.

    \b
    Examples:
      lvd eval linear net --train photos.parquet --test photos.parquet --steps 100
    """
    from curation.errors import ConfigError
    from trainer.evaluation import linear as evaluate

    if chosen_on not in ("held_out", "test"):
        raise ConfigError(f"--chosen-on {chosen_on}: give held_out or test")
    rows = _rows(train, test, train_rows, test_rows, image_column, label_column)
    result, skipped = evaluate(
        _subject(model, size, device, precision),
        *rows,
        steps=steps,
        batch_size=batch_size,
        chosen_on="test" if chosen_on == "test" else "held_out",
        random_views=random_views,
        seed=seed,
    )
    shown = result.all_heads if all_heads else {result.head: result.accuracy}
    lines = [[str(head), accuracy, head == result.head] for head, accuracy in shown.items()]
    _print(["head", "top-1", "chosen"], lines, style)
    _tell_skipped(skipped)


def logistic(
    model: Model,
    train: Train,
    test: Test,
    train_rows: TrainRows = None,
    test_rows: TestRows = None,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    size: Size = None,
    seed: Seed = 0,
    device: Device = None,
    precision: Precision = None,
    style: Style = "table",
) -> None:
    """Fit logistic regression on frozen class tokens; its penalty is chosen on a tenth of the training images.

    \b
    Examples:
      lvd eval logistic net --train photos.parquet --test photos.parquet
    """
    from trainer.evaluation import logistic as evaluate

    rows = _rows(train, test, train_rows, test_rows, image_column, label_column)
    result, skipped = evaluate(_subject(model, size, device, precision), *rows, seed)
    _print(["top-1", "C"], [[result.accuracy, result.strength]], style)
    _tell_skipped(skipped)


def export(
    model: Model,
    out: Annotated[str, typer.Argument(metavar="OUT", help="lvd: a file NAME.safetensors; transformers: a directory.")],
    layout: Annotated[
        str, typer.Option("--to", help="lvd (the embedder vit:OUT opens it) or transformers (AutoModel opens it).")
    ],
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the images to be prepared for; default: the network's own.")
    ] = None,
) -> None:
    """Write a network for others; of a run, the moving average. Both layouts are embedders of the next curation.

    \b
    Examples:
      lvd export net net.safetensors --to lvd
      lvd export net net-transformers --to transformers
    """
    from curation.errors import ConfigError
    from trainer.export import export_from

    if layout not in ("lvd", "transformers"):
        raise ConfigError(f"--to {layout}: give lvd or transformers")
    for note in export_from(model, out, "lvd" if layout == "lvd" else "transformers", size):
        print(note)
    print(f"{out} (as an embedder: vit:{out})")


def _subject(model: str, size: int | None, device: str | None, precision: str | None) -> "Subject":
    from trainer.evaluation import open_subject

    return open_subject(model, size, device or "auto", precision or "auto")


def _rows(
    train: str, test: str, train_rows: str | None, test_rows: str | None, image_column: str, label_column: str
) -> "tuple[Labelled, Labelled]":
    from trainer.evaluation import rows_of
    from trainer.labelled import Labelled

    bank, queries = (Labelled(place, image_column, label_column) for place in (train, test))
    return rows_of(bank, train_rows), rows_of(queries, test_rows)


def _print(columns: list[str], rows: list[list[Any]], style: str) -> None:
    from cli.output import print_table
    from pipelines.stats import Table

    print_table(Table("", columns, rows), format_of(style))


def _tell_skipped(skipped: "list[Skipped]") -> None:
    """On standard error, as programs read the table."""
    import sys

    if skipped:
        place, reason = skipped[0]
        print(f"{len(skipped)} rows could not be used; the first, {place}: {reason}", file=sys.stderr)


for command in (knn, linear, logistic):
    eval_app.command()(command)

COMMANDS = (export,)

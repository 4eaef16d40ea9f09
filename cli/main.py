"""`lvd`: the application, its entry point, and how errors are shown."""

import os
import sys

import typer

from cli import evaluation, questions, runs, selection, stages, training
from curation.errors import LvdError

app = typer.Typer(
    name="lvd",
    help="Build curated image pretraining sets from web crawls, as DINOv2's LVD-142M was built, and train on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 done, 1 failed, 2 wrong usage, recipe or input, "
        "3 partly done (run again to resume), 130 interrupted."
    ),
)

TRAINING = "Training"
GROUPS = (
    ("Whole runs", runs.COMMANDS),
    ("Questions", questions.COMMANDS),
    ("Single stages", stages.COMMANDS + selection.COMMANDS),
    (TRAINING, training.COMMANDS + evaluation.COMMANDS),
)
for group, commands in GROUPS:
    for command in commands:
        app.command(rich_help_panel=group)(command)
app.add_typer(evaluation.eval_app, name="eval", rich_help_panel=TRAINING)


def main() -> None:
    """Run the command line. Errors are one line on standard error; LVD_DEBUG=1 shows where they arose."""
    try:
        app()
    except LvdError as error:
        _fail(error, error.exit_code)
    except Exception as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("LVD_DEBUG"):
        raise error
    expected = isinstance(error, LvdError)
    what = str(error) if expected else f"{type(error).__name__}: {error} (LVD_DEBUG=1 shows where)"
    print(f"error: {' '.join(what.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

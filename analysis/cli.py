"""The command ``attn-drift``."""

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

# The libraries behind the commands take seconds to import, so that each command imports what it needs.

app = typer.Typer(help="Attention drift in knowledge editing: see it, measure it, restrict it.", no_args_is_help=True)
console = Console()


@app.callback()
def _setup() -> None:
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))]
    )


@app.command()
def demo(
    edits: Annotated[int, typer.Option(help="Number of facts to edit.")] = 24,
    gamma: Annotated[float | None, typer.Option(help="Weight of SADR.", show_default="0.1")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the facts and the contexts.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("demo-out"),
) -> None:
    """Edit facts of the demo model, see attention drift and what it breaks, and hold it with SADR."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from analysis.demo import GAMMA, demonstrate
    from analysis.report import demo_sections, write_report
    from attn_drift.files import replacing
    from attn_drift.models import load_model

    with console.status("loading the demo model"):
        model = load_model("demo")
    shown = demonstrate(model, edits, GAMMA if gamma is None else gamma, seed)
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(shown.to_json(), indent=1), encoding="utf-8")
    write_report(out / "report.html", "Attention drift on the demo model", demo_sections(shown))
    console.print(_table(shown.table().reset_index(), f"{edits} edits, seed {seed}, {shown.seconds:.0f} s"))
    console.print(
        "Scores in percent. ES: the edit. PS: its paraphrases. NS: other people.\n"
        "DNS: other people, after the edited sentence. RS: the same person, other\n"
        "questions. argmax: first choices. max head: attention to the subject."
    )
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder for weights, tokenizer and world.")],
    seed: Annotated[int, typer.Option(help="Seed of world, weights and texts.")] = 0,
) -> None:
    """Train the demo model anew (about 15 minutes on two cores)."""
    from attn_drift.demo.train import train

    accuracy = train(out, seed)
    console.print(f"{accuracy:.2%} of (fact, wording) pairs right by argmax; written to {out}", soft_wrap=True)


def _table(frame: "pd.DataFrame", title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for i, column in enumerate(frame.columns):
        table.add_column(str(column).replace(" ", "\n"), justify="left" if i == 0 else "right", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(name, cell) for name, cell in zip(frame.columns, row, strict=True)))
    return table


def _cell(column: str, cell: object) -> str:
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.2f}" if column == "max head" else f"{cell:g}" if column == "gamma" else f"{cell:.1f}"


def main() -> None:
    """Runs the command; what the user can mend is shown without a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)

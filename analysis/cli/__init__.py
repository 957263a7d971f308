"""The command ``attn-drift``: one module per group of commands."""

import sys

from rich.console import Console
from rich.markup import escape

from analysis.cli import bench, demo, evidence, layers, moments, sequence
from analysis.cli.common import app

__all__ = ["app", "bench", "demo", "evidence", "layers", "main", "moments", "sequence"]


def main() -> None:
    """Runs the command; what the user can mend is shown without a traceback."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)

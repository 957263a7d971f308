"""The command ``attn-drift``."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    import torch

    from analysis.results import Results
    from attn_drift.cases import Case

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
    _quiet()
    from analysis.demo import demonstrate
    from analysis.report import demo_sections, write_report
    from attn_drift.files import replacing
    from attn_drift.models import load_model

    with console.status("loading the demo model"):
        model = load_model("demo")
    shown = demonstrate(model, edits, gamma, seed)
    with replacing(out / "results.json") as temporary:
        temporary.write_text(json.dumps(shown.to_json(), indent=1), encoding="utf-8")
    write_report(out / "report.html", "Attention drift on the demo model", demo_sections(shown))
    console.print(_table(shown.table().reset_index(), f"{edits} edits, seed {seed}, {shown.seconds:.0f} s"))
    console.print(
        "Scores in percent. ES: the edit. PS: its paraphrases. NS: other people.\n"
        "DNS: other people, after the edited sentence. RS: the same person, other\n"
        "questions. argmax: first choices. max head: attention to the subject."
    )
    console.print(f"Report: {out / 'report.html'}", markup=False, soft_wrap=True)


@app.command("demo-cases")
def demo_cases_file(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    n: Annotated[int, typer.Option("--n", help="Number of cases.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the facts.")] = 0,
) -> None:
    """Write cases of the demo model's world to a file in the merged format, for `bench` and `sweep`."""
    from attn_drift.demo.cases import demo_cases, merged_record
    from attn_drift.demo.world import World
    from attn_drift.files import replacing
    from attn_drift.models import demo_folder

    cases = demo_cases(World.load(demo_folder() / "world.json"), n, seed)
    with replacing(out) as temporary:
        records = [merged_record(case) for case in cases]
        temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    console.print(f"{n} cases written to {out}", markup=False, soft_wrap=True)


CasesFile = Annotated[Path, typer.Argument(help="CounterFact, merged CounterFact, zsRE or WikiData, as JSON.")]
Model = Annotated[str, typer.Option(help="'demo', a name on the Hugging Face hub, or a folder.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; a run that it holds is gone on with.")]
Limit = Annotated[int | None, typer.Option(help="The first so many cases only.")]
Seed = Annotated[int, typer.Option(help="Seed of contexts and sampled continuations.")]
EngineName = Annotated[str, typer.Option(help="'local' or 'ray'.")]
Workers = Annotated[int, typer.Option(help="Ray actors, with a model each.")]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster; a local one is started without it.")]
BatchCases = Annotated[int, typer.Option(help="Cases that are edited, scored and written together.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Compute chunks with failed cases again.")]
SkipInvalid = Annotated[bool, typer.Option("--skip-invalid", help="Skip and count bad records.")]
SnippetsFile = Annotated[Path | None, typer.Option(help="attribute_snippets.json, for consistency (CS).")]
Corpus = Annotated[Path | None, typer.Option(help="Texts for perplexity (PPL), one a line.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64.")]
Device = Annotated[str | None, typer.Option(help="Where the model goes, such as cpu or cuda:1.")]


@app.command()
def bench(
    cases: CasesFile,
    model: Model,
    editors: Annotated[str, typer.Option(help="Such as rome,rome+sadr:gamma=0.01:steps=40.")],
    out: Out,
    limit: Limit = None,
    seed: Seed = 0,
    engine: EngineName = "local",
    workers: Workers = 2,
    address: Address = None,
    batch_cases: BatchCases = 16,
    skip_invalid: SkipInvalid = False,
    retry_failed: RetryFailed = False,
    snippets: SnippetsFile = None,
    corpus: Corpus = None,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Run editors on a file of cases: the paper's Table 3, with intervals, controls and paired differences."""
    results = _benchmark(
        cases,
        model,
        editors.split(","),
        out,
        limit=limit,
        skip_invalid=skip_invalid,
        retry_failed=retry_failed,
        snippets=snippets,
        corpus=corpus,
        dtype=dtype,
        device=device,
        seed=seed,
        batch_cases=batch_cases,
        engine=engine,
        workers=workers,
        address=address,
    )
    _finish(results)


@app.command()
def sweep(
    cases: CasesFile,
    model: Model,
    out: Out,
    editor: Annotated[str, typer.Option(help="Whose settings are swept.")] = "rome",
    gamma: Annotated[str, typer.Option(help="Weights of SADR, such as 0.01,0.03,0.1.")] = "",
    learning_rate: Annotated[str, typer.Option(help="Learning rates.")] = "",
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "",
    kl_factor: Annotated[str, typer.Option(help="Weights of the essence term.")] = "",
    limit: Limit = None,
    seed: Seed = 0,
    engine: EngineName = "local",
    workers: Workers = 2,
    address: Address = None,
    batch_cases: BatchCases = 16,
    skip_invalid: SkipInvalid = False,
    retry_failed: RetryFailed = False,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """What a restriction costs and saves, by gamma and by other knobs: the trade-off curve."""
    from analysis.sweep import Sweep, write_tradeoff

    knobs = {"gamma": gamma, "learning_rate": learning_rate, "steps": steps, "kl_factor": kl_factor}
    swept = Sweep.parse(editor, {knob: values.split(",") for knob, values in knobs.items() if values})
    results = _benchmark(
        cases,
        model,
        swept.methods,
        out,
        limit=limit,
        skip_invalid=skip_invalid,
        retry_failed=retry_failed,
        dtype=dtype,
        device=device,
        seed=seed,
        batch_cases=batch_cases,
        engine=engine,
        workers=workers,
        address=address,
    )
    write_tradeoff(results, swept)
    console.print(f"Trade-off: {out / 'tradeoff.html'}", markup=False, soft_wrap=True)
    _finish(results)


@app.command("evidence")
def evidence_of_a_model(
    model: Model,
    out: Out,
    cases: Annotated[Path | None, typer.Option(help="A file as for bench; the demo model has its own world.")] = None,
    edits: Annotated[int, typer.Option(help="Number of facts to edit: the first that have all texts.")] = 24,
    studied: Annotated[int, typer.Option(help="On how many of them sweeps, tracing and trade-offs run.")] = 10,
    layer: Annotated[int | None, typer.Option(help="The edited layer.", show_default="the model's preset")] = None,
    gamma: Annotated[float | None, typer.Option(help="Weight of SADR.", show_default="the model's preset")] = None,
    seed: Seed = 0,
    skip_invalid: SkipInvalid = False,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Why edits break other knowledge: patching, substitution, correlation, heads, and what else would help."""
    from analysis.evidence import check_cases

    given, wordings = _evidence_cases(model, cases, edits, seed, skip_invalid)
    check_cases(given, studied)
    from analysis.evidence.run import evidence
    from attn_drift.models import load_model

    _quiet()
    precision = _precision(dtype)
    with console.status(f"loading {escape(model)}"):
        loaded = load_model(model, dtype=precision, device=device)
    from attn_drift.editors.rome import ROMEConfig

    config = None if layer is None else replace(ROMEConfig.for_model(loaded), layer=layer)
    found = evidence(loaded, given, out, studied=studied, wordings=wordings, config=config, gamma=gamma, seed=seed)
    shown = [
        {
            "texts": task,
            "unedited": f"{cell['vanilla']:.2f}",
            "edited": f"{cell['edited']:.2f}",
            "vanilla patterns": f"{cell['patched_all_above']:.2f}",
            "recovered": f"{cell['recovered']['mean']:.0%}",
        }
        for task, cell in found.summary["patching"].items()
        if task != "PS"
    ]
    import pandas as pd

    table = pd.DataFrame(shown)
    console.print(_table(table, escape(f"p(right) on texts of {len(given)} edits of {model}")))
    console.print(f"Everything else: {out / 'report.html'}, evidence.json, tables", markup=False, soft_wrap=True)


def _evidence_cases(
    model: str, path: Path | None, n: int, seed: int, skip_invalid: bool
) -> "tuple[list[Case], list[tuple[str, ...]] | None]":
    """Cases and, for the demo's own, further wordings; read before anything slow is imported."""
    from analysis.evidence import NEEDED
    from attn_drift.cases import having
    from attn_drift.datasets import read_cases

    if path is not None:
        given = having(read_cases(path, skip_invalid=skip_invalid), NEEDED, n)
        if len(given) < n:
            console.print(f"{len(given)} cases of {path} have all texts", markup=False, soft_wrap=True)
        return given, None
    if model != "demo":
        raise ValueError(f"no cases were given for {model}; give --cases FILE (the demo model alone has its own)")
    from attn_drift.demo.cases import demo_cases, further_wordings
    from attn_drift.demo.world import World
    from attn_drift.models import demo_folder

    world = World.load(demo_folder() / "world.json")
    given = demo_cases(world, n, seed)
    return given, [further_wordings(world, case) for case in given]


def _benchmark(
    path: Path,
    model: str,
    methods: "Sequence[str]",
    out: Path,
    *,
    limit: int | None,
    skip_invalid: bool,
    snippets: Path | None = None,
    corpus: Path | None = None,
    dtype: str,
    device: str | None,
    **options: Any,
) -> "Results":
    """Reads the files, all of them before anything slow is even imported, and runs the benchmark."""
    from attn_drift.datasets import read_cases, read_snippets

    if not "".join(methods).strip():
        raise ValueError("no editor was given; expected names such as rome,rome+sadr, or none")
    told = None if snippets is None else read_snippets(snippets)
    cases = read_cases(path, snippets=told, skip_invalid=skip_invalid, limit=limit)
    if cases.n_skipped:
        said = f"{cases.n_skipped} records are skipped, such as {cases.skipped[0]}"
        console.print(said, markup=False, soft_wrap=True)
    texts = [] if corpus is None else _lines(corpus)
    from analysis.benchmark import benchmark

    _quiet()
    precision = _precision(dtype)
    return benchmark(
        model,
        cases,
        methods,
        out,
        corpus=texts,
        options={"dtype": precision, "device": device},
        **options,
    )


def _precision(dtype: str) -> "torch.dtype":
    import torch

    precision = getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise ValueError(f"the dtype is {dtype!r}; expected float32, bfloat16, float16 or float64")
    return precision


def _lines(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"{path} has no texts; expected one a line")
    return lines


def _finish(results: "Results") -> None:
    """Shows the table and where the rest is; ends the command with 1 if a case failed."""
    from analysis.summary import table_three

    # Half-widths below the means, so that the table fits a terminal.
    table = table_three(results.rows).map(lambda cell: cell.replace(" (", "\n("))
    console.print(_table(table, escape(str(results.config["model"]["name"]))))
    said = f"Everything else: {results.folder / 'summary.md'}, report.html, summary.json"
    console.print(said, markup=False, soft_wrap=True)
    n_failed = results.failures["case"].nunique()
    if n_failed:
        example = results.failures.iloc[0]
        Console(stderr=True).print(
            f"{n_failed} of {results.config['cases']['n']} cases failed (see summary.md), such as {example['case']!r}: "
            f"{example['error']}",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="Folder for weights, tokenizer and world.")],
    seed: Annotated[int, typer.Option(help="Seed of world, weights and texts.")] = 0,
) -> None:
    """Train the demo model anew (about 15 minutes on two cores)."""
    from attn_drift.demo.train import train

    accuracy = train(out, seed)
    said = f"{accuracy:.2%} of (fact, wording) pairs right by argmax; written to {out}"
    console.print(said, markup=False, soft_wrap=True)


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
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)

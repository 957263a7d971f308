"""The benchmark: cases x methods, in chunks, each written as it is done, so that a run can be killed and resumed.

A folder holds ``config.json`` (what is run), ``parts/<method>/<chunk>.parquet`` (a row per text, see
`analysis.scores.Scores`, and a row with an ``error`` per case that failed), and the summaries of `analysis.results`.
"""

import json
import logging
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from analysis.engines import Engine, Job, LocalEngine, Plan, RayEngine, Worker
from analysis.methods import parse_methods
from analysis.results import CONFIG, Results, part_path
from analysis.summary import write_summaries
from attn_drift.cases import Case
from attn_drift.datasets import CaseFile, Snippets
from attn_drift.files import replacing

log = logging.getLogger(__name__)

LIBRARIES = ("attn-drift", "torch", "transformer-lens", "transformers", "tokenizers", "numpy", "pandas", "scikit-learn")


def benchmark(
    model: TransformerBridge | str,
    cases: CaseFile,
    methods: Sequence[str],
    out: str | Path,
    *,
    seed: int = 0,
    batch_cases: int = 16,
    corpus: Sequence[str] = (),
    snippets: Snippets | None = None,
    options: dict[str, Any] | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int = 2,
    address: str | None = None,
) -> Results:
    """Runs every method on every case, and summarises what the folder then holds.

    What the folder already holds of the same run is kept, so that an interrupted run goes on where it was; methods may
    be added to it. The same seed gives the same table, whatever the engine and the order (and up to rounding, whatever
    the chunks).

    Args:
        model: a model, or what `load_model` takes.
        cases: of one file.
        methods: names such as ``rome`` and ``rome+sadr:gamma=0.01``; the unedited model is always among them.
        out: the folder.
        seed: of the edits' contexts and of sampled continuations.
        batch_cases: cases in a chunk: edited and scored together, written as one part.
        corpus: texts for perplexity.
        snippets: reference texts, for consistency.
        options: of `load_model`, where ``model`` is a name.
        engine: ``"local"``, in this process, or ``"ray"``, for which ``model`` must be a name.
        workers: number of Ray actors, each with a model of its own.
        address: of a running Ray cluster; a local one is started when None.

    Raises:
        ValueError: a bad method or setting, or a folder that holds another run; before the model runs.
        RuntimeError: another process is running in the folder.
    """
    out = Path(out)
    if batch_cases < 1:
        raise ValueError(f"batch_cases is {batch_cases}; expected at least 1")
    plan = Plan(tuple(parse_methods(methods)), seed, tuple(corpus), snippets)
    _check_engine(engine, model)
    with _alone_in(out):
        running: Engine
        if engine == "ray":
            running = RayEngine(str(model), plan, options, workers, address)
        else:
            running = LocalEngine(Worker(model, plan, options))
        try:
            return _run(running, plan, cases, out, batch_cases)
        finally:
            running.close()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A block that only one process runs in a folder; the system releases the lock of a process that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    try:
        with FileLock(path).acquire(timeout=0):
            yield
            path.unlink(missing_ok=True)
    except Timeout as error:
        raise RuntimeError(
            f"another process runs a benchmark in {folder}; wait for it, or give another folder"
        ) from error


def _check_engine(engine: str, model: TransformerBridge | str) -> None:
    if engine not in ("local", "ray"):
        raise ValueError(f"the engine is {engine!r}; expected 'local' or 'ray'")
    if engine == "ray" and isinstance(model, TransformerBridge):
        raise ValueError("a loaded model was given for the engine 'ray'; give the name from which each worker loads it")


def _run(engine: Engine, plan: Plan, cases: CaseFile, out: Path, batch_cases: int) -> Results:
    for stale in out.rglob(".*.tmp"):  # of a run that was killed while it wrote
        stale.unlink()
    _write_config(out / CONFIG, _config(engine.record(), plan, cases, batch_cases))
    names = [method.name for method in plan.methods]
    done = sum(
        min(batch_cases, cases.n - start)
        for chunk, start in enumerate(range(0, cases.n, batch_cases))
        for name in names
        if part_path(out, name, chunk).is_file()
    )
    with tqdm(total=cases.n * len(names), initial=done, desc="benchmark", unit="case", smoothing=0.05) as progress:
        for job, part in engine.run(_jobs(names, cases, out, batch_cases)):
            _write_part(part_path(out, job.method, job.chunk), part)
            progress.update(len(job.cases))
    results = Results(out)
    write_summaries(results)
    return results


def _jobs(names: Sequence[str], cases: Iterable[Case], out: Path, batch_cases: int) -> Iterator[Job]:
    """The chunks that the folder does not hold yet."""
    stream = iter(cases)
    chunk = 0
    while several := tuple(islice(stream, batch_cases)):
        for name in names:
            if not part_path(out, name, chunk).is_file():
                yield Job(name, chunk, several)
        chunk += 1


def _write_part(path: Path, part: pd.DataFrame) -> None:
    with replacing(path) as temporary:
        part.to_parquet(temporary, index=False)


def _config(record: dict[str, Any], plan: Plan, cases: CaseFile, batch_cases: int) -> dict[str, Any]:
    """What is run. Parts belong to one table where ``identity`` and their method's settings are the same."""
    return {
        "identity": {
            "origin": record["origin"],
            "cases": cases.sha256,
            "n_cases": cases.n,
            "batch_cases": batch_cases,
            **plan.texts(),
        },
        "model": {"name": record["name"], "dtype": record["dtype"]},
        "cases": {
            "path": str(cases.path),
            "format": cases.format,
            "n": cases.n,
            "n_skipped": cases.n_skipped,
            "skipped": list(cases.skipped),
        },
        "seed": plan.seed,
        "methods": record["methods"],
        "versions": {library: version(library) for library in LIBRARIES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _write_config(path: Path, config: dict[str, Any]) -> None:
    """Writes the settings, together with those of methods that the folder already holds.

    Raises:
        ValueError: the folder holds a run with another identity, or another setting of a method.
    """
    # As JSON has it, where tuples are lists.
    config = json.loads(json.dumps(config))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in config["identity"].items() if before["identity"].get(key) != value]
        other += [name for name, held in before["methods"].items() if config["methods"].get(name, held) != held]
        if other:
            raise ValueError(
                f"{path.parent} holds another run: it differs in {', '.join(other)} (see {path}); give another folder, "
                "or the same settings to go on with it"
            )
        config["methods"] = before["methods"] | config["methods"]
        config["started"] = before["started"]
        if before["versions"] != config["versions"]:
            log.warning("%s was begun with other versions of libraries (see its config.json)", path.parent)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1), encoding="utf-8")

"""Where chunks of a benchmark are computed: in this process, or by Ray actors that hold one model each.

Both run the same `Worker` on the same chunks, so that the table does not depend on the engine.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analysis.fluency import Consistency, perplexity, prose
from analysis.methods import NONE, BoundMethod, Method
from analysis.scores import DTYPES, Scores
from analysis.specificity import score
from attn_drift.cases import Case
from attn_drift.datasets import Snippets
from attn_drift.files import cache_path, keeping, replacing
from attn_drift.hooks import is_hooked
from attn_drift.models import load_model, origin

log = logging.getLogger(__name__)

# A part's columns: those of `Scores.frame`, and the error of a case that failed, which has a row of its own.
PART_DTYPES = {**DTYPES, "error": "str"}

# Of the unedited scores in the cache; to be raised with every change of what a score means.
SCORES_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What workers need beside a model and cases.

    Attributes:
        methods: all that may be asked for.
        seed: of the edits' contexts and of the sampled continuations.
        corpus: texts for perplexity; without any there is no PPL.
        snippets: whose texts give the document frequencies of consistency; without them there is no CS.
    """

    methods: tuple[Method, ...]
    seed: int = 0
    corpus: tuple[str, ...] = ()
    snippets: Snippets | None = None

    def texts(self) -> dict[str, object]:
        """What the scores of given cases depend on beside model and edits."""
        corpus = hashlib.sha256(json.dumps(self.corpus).encode()).hexdigest() if self.corpus else None
        snippets = None if self.snippets is None else self.snippets.sha256
        return {"seed": self.seed, "corpus": corpus, "snippets": snippets}


@dataclass(frozen=True)
class Job:
    """A chunk of cases for one method; ``chunk`` counts from 0 in the order of the file."""

    method: str
    chunk: int
    cases: tuple[Case, ...]


class Worker:
    """A model and the methods that are bound to it.

    Args:
        model: a model, or what `load_model` takes.
        plan: what to do with it.
        options: of `load_model`.

    Raises:
        ValueError: a method's settings do not fit the model; before it runs.
    """

    def __init__(self, model: TransformerBridge | str, plan: Plan, options: dict[str, Any] | None = None) -> None:
        self.model, self.plan = load_model(model, **(options or {})), plan
        self.methods: dict[str, BoundMethod] = {m.name: m.bind(self.model) for m in plan.methods}
        self.consistency = None if plan.snippets is None else Consistency(plan.snippets.corpus)

    def record(self) -> dict[str, Any]:
        """What decides the worker's results: the model, and every method's settings."""
        return {
            "name": str(self.model.cfg.model_name),
            "dtype": str(next(self.model.parameters()).dtype),
            "origin": origin(self.model),
            "methods": {name: method.record() for name, method in self.methods.items()},
        }

    def run(self, job: Job) -> pd.DataFrame:
        """The part of a job, its rows in the order of the cases, then of the tasks.

        A case that fails gives a row with its ``error``; the others of its chunk are then run one at a time.
        """
        try:
            return self._part(job.method, job.cases)
        except Exception as error:
            if len(job.cases) > 1:
                log.debug("a chunk failed (%s); running its cases one at a time", error)
                single = [self.run(Job(job.method, job.chunk, (case,))) for case in job.cases]
                return pd.concat(single, ignore_index=True)
            (case,) = job.cases
            log.warning("%s: the case %r failed: %s", job.method, case.case_id, error)
            log.debug("the failure of %r", case.case_id, exc_info=True)
            return _table([{"case": case.case_id, "error": f"{type(error).__name__}: {error}"}])

    def _part(self, method: str, cases: Sequence[Case]) -> pd.DataFrame:
        if method != NONE or is_hooked(self.model):
            return self._scored(method, cases)
        content = json.dumps([asdict(case) for case in cases], sort_keys=True)
        key = {
            **origin(self.model),
            **self.plan.texts(),
            "cases": hashlib.sha256(content.encode()).hexdigest(),
            "format": SCORES_FORMAT,
        }
        path = cache_path("unedited", ".parquet", key)
        if path.is_file():
            return pd.read_parquet(path).astype(PART_DTYPES)
        part = self._scored(method, cases)
        with keeping(), replacing(path) as temporary:
            part.to_parquet(temporary, index=False)
        return part

    def _scored(self, method: str, cases: Sequence[Case]) -> pd.DataFrame:
        seed = self.plan.seed
        edits = self.methods[method].edits(self.model, [case.request for case in cases], seed)
        tables = [
            score(self.model, cases, edits),
            prose(self.model, cases, edits, seed=seed, consistency=self.consistency),
            perplexity(self.model, cases, edits, self.plan.corpus),
        ]
        order = {case.case_id: place for place, case in enumerate(cases)}
        part = pd.concat([table.frame for table in tables], ignore_index=True)
        part = part.sort_values("case", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
        return part.assign(error=None).astype(PART_DTYPES)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return Scores.from_rows(rows).frame.assign(error=[row["error"] for row in rows]).astype(PART_DTYPES)


@runtime_checkable
class Engine(Protocol):
    """What computes jobs."""

    def record(self) -> dict[str, Any]:
        """`Worker.record`, the same of every worker."""
        ...

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, pd.DataFrame]]:
        """The parts of jobs, in any order, as they are done."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds."""
        ...


class LocalEngine:
    """One worker in this process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def record(self) -> dict[str, Any]:
        return self._worker.record()

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, pd.DataFrame]]:
        for job in jobs:
            yield job, self._worker.run(job)

    def close(self) -> None:
        """Nothing is held."""


class RayEngine:
    """Workers as Ray actors, each with a model of its own, which it loads itself.

    Args:
        source: what `load_model` takes, by a name that every machine understands.
        plan, options: as of `Worker`.
        workers: number of actors.
        address: of a running cluster; a local one is started when None.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(
        self,
        source: str,
        plan: Plan,
        options: dict[str, Any] | None = None,
        workers: int = 2,
        address: str | None = None,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; expected at least 1")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("the engine 'ray' needs Ray: pip install 'attn-drift[ray]'") from error
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        resources = ray.cluster_resources()
        shares: dict[str, float] = {"num_cpus": max(1, int(resources.get("CPU", 1)) // workers)}
        if resources.get("GPU", 0) and (options or {}).get("device") != "cpu":
            shares["num_gpus"] = min(1.0, resources["GPU"] / workers)
        actor = ray.remote(**shares)(Worker)
        shared = ray.put(plan)
        self._actors = [actor.remote(source, shared, options) for _ in range(workers)]
        self._record: dict[str, Any] = ray.get(self._actors[0].record.remote())

    def record(self) -> dict[str, Any]:
        return self._record

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, pd.DataFrame]]:
        idle = list(self._actors)
        pending: dict[Any, tuple[Any, Job]] = {}

        def done() -> tuple[Job, pd.DataFrame]:
            (ready,), _ = self._ray.wait(list(pending), num_returns=1)
            actor, job = pending.pop(ready)
            idle.append(actor)
            return job, self._ray.get(ready)

        for job in jobs:
            if not idle:
                yield done()
            actor = idle.pop()
            pending[actor.run.remote(job)] = actor, job
        while pending:
            yield done()

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

"""The evidence: why edits of a model break other knowledge, and what holds them back, study by study.

A folder holds ``config.json`` (what is run), ``edits/`` and ``arms/`` (what was made), ``tables/<name>.parquet``, and,
from these, ``evidence.json`` and ``report.html``. Each is written as it is done: a run can be killed and resumed.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from analysis import correlation, selection, tradeoffs
from analysis.arms import Outcome, arm
from analysis.equal_efficacy import at_equal_efficacy
from analysis.evidence import NEEDED, studies
from analysis.evidence.folder import CONFIG, PAGE, SUMMARY, Evidence, table_path
from analysis.evidence.page import sections
from analysis.evidence.studies import Edited
from analysis.evidence.summary import summarise
from analysis.methods import NONE, Supplies
from analysis.report import write_report
from analysis.tradeoffs import Point
from attn_drift.cases import Case, Task
from attn_drift.editors.presets import preset_gamma
from attn_drift.editors.rome import ROMEConfig, rome
from attn_drift.edits import Edit
from attn_drift.files import alone_in, replacing
from attn_drift.models import check_model, fingerprint
from attn_drift.restriction import SADR

LEAST_CASES = correlation.LEAST_CASES


def evidence(
    model: TransformerBridge,
    cases: Sequence[Case],
    out: str | Path,
    *,
    studied: int = 10,
    wordings: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> Evidence:
    """Edits every case with ROME and runs all studies; what the folder already holds of the same run is kept.

    Args:
        model: the model.
        cases: with texts of ES, PS and DNS; RS texts are looked at where at least 3 of those studied have them.
        out: the folder.
        studied: on how many cases, the first ones, the sweeps over heads and layers, causal tracing and the trade-offs
            run; the rest runs on all.
        wordings: per case templates of further wordings of its question, as many for each; taken from its paraphrases
            when None. Paraphrases that they are equal to are not scored.
        seed: of contexts, noise, random heads and intervals.

    Raises:
        ValueError: fewer than 3 cases, cases that lack texts, or a folder with another run; before the model runs.
        RuntimeError: another process is writing to the folder.
    """
    out, cases = Path(out), tuple(cases)
    check_model(model)
    _check_cases(cases, studied)
    templates = tradeoffs.further_wordings(cases) if wordings is None else [tuple(own) for own in wordings]
    _check_wordings(cases, templates)
    config = ROMEConfig.for_model(model)
    gamma = preset_gamma("rome", model, config.layer)
    identity = _identity(model, cases, studied, templates, config, gamma, seed)
    with alone_in(out):
        _write_config(out, identity)
        _Run(model, cases, out, studied, templates, config, gamma, seed).everything()
        return _written(Evidence(out))


def _written(found: Evidence) -> Evidence:
    """The evidence, with its JSON file and its page."""
    with replacing(found.folder / SUMMARY) as temporary:
        temporary.write_text(json.dumps(summarise(found), indent=1, allow_nan=False), encoding="utf-8")
    title = f"Why edits of {found.config['model']['name']} break other knowledge"
    write_report(found.folder / PAGE, title, sections(found))
    return found


def _check_cases(cases: Sequence[Case], studied: int) -> None:
    if not studied >= LEAST_CASES:
        raise ValueError(f"{studied} cases are to be studied; expected at least {LEAST_CASES}")
    if len(cases) < LEAST_CASES:
        raise ValueError(f"{len(cases)} cases were given; expected at least {LEAST_CASES}")
    if len({case.case_id for case in cases}) < len(cases):
        raise ValueError("several cases have the same case_id; expected each once")
    for case in cases:
        lacking = [task for task in NEEDED if not case.probes.get(task)]
        if lacking:
            raise ValueError(f"the case {case.case_id!r} has no texts of {lacking}; give cases that have, see `having`")


def _check_wordings(cases: Sequence[Case], templates: Sequence[tuple[str, ...]]) -> None:
    if len(templates) != len(cases) or len({len(own) for own in templates}) > 1:
        raise ValueError(
            f"wordings of {len(templates)} cases were given for {len(cases)}, {sorted({len(t) for t in templates})} "
            "each; expected as many for every case"
        )
    for case, own in zip(cases, templates, strict=True):
        case.request.rephrased(*own) if own else None  # names a bad template before anything runs


def _identity(
    model: TransformerBridge,
    cases: Sequence[Case],
    studied: int,
    templates: Sequence[tuple[str, ...]],
    config: ROMEConfig,
    gamma: float,
    seed: int,
) -> dict[str, Any]:
    """All that the results depend on, as JSON takes it."""
    return {
        "model": {"name": str(model.cfg.model_name), "fingerprint": fingerprint(model)},
        "cases": {"n": len(cases), "sha256": hashlib.sha256(repr([*cases, *templates]).encode()).hexdigest()},
        "studied": min(studied, len(cases)),
        "wordings": 1 + len(templates[0]),
        "config": json.loads(json.dumps(asdict(config))),
        "gamma": gamma,
        "seed": seed,
    }


def _write_config(out: Path, identity: dict[str, Any]) -> None:
    path = out / CONFIG
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in identity if held.get(key) != identity[key]]
        if differing:
            raise ValueError(f"{out} holds another run, which differs in {differing}; give another folder")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(identity, indent=1), encoding="utf-8")


class _Run:
    """One run: every study once, unless the folder has it."""

    def __init__(
        self,
        model: TransformerBridge,
        cases: tuple[Case, ...],
        out: Path,
        studied: int,
        templates: Sequence[tuple[str, ...]],
        config: ROMEConfig,
        gamma: float,
        seed: int,
    ) -> None:
        self.model, self.cases, self.out, self.studied, self.seed = model, cases, out, studied, seed
        self.templates, self.config, self.gamma = templates, config, gamma
        self.supplies = Supplies(model, seed)
        n_relation = sum(bool(case.probes.get("RS")) for case in cases[:studied])
        self.tasks: tuple[Task, ...] = ("DNS", "RS") if n_relation >= LEAST_CASES else ("DNS",)
        self.points = tradeoffs.points(config, gamma, 1 + len(templates[0]))

    def everything(self) -> None:
        """Runs what is missing."""
        arms = {point.arm: point for point in self.points}
        named: dict[str, Callable[[], pd.DataFrame]] = {
            "drift": lambda: selection.drifting(self.model, self.cases, self._edited.edits, ("ES", *self.tasks)),
            "checks": lambda: studies.checks(self._few),
            "patching": lambda: studies.patching(self._edited, self._table("drift")),
            "patching_layers": lambda: studies.patching_layers(self._edited),
            "patching_heads": lambda: studies.patching_heads(self._few),
            "substitution": lambda: studies.substitution(self._few),
            "tracing": lambda: studies.tracing(self._few),
            "falls": lambda: correlation.measure(self.model, self._edited.texts),
            "correlation": lambda: correlation.correlate(self._table("falls"), seed=self.seed),
            "agreement": lambda: selection.agreement(self._table("drift"), self.seed),
            "head_kinds": self._head_kinds,
            "kinds": lambda: selection.kinds_of_drifting(self._table("drift"), self._table("head_kinds")),
            "wording_heads": self._wording_heads,
            "wording_agreement": lambda: selection.agreement(self._table("wording_heads"), self.seed),
        }
        with tqdm(total=len(named) + len(arms), desc="evidence", unit="study") as progress:
            for name, compute in named.items():
                progress.set_postfix_str(name)
                if not table_path(self.out, name).is_file():
                    self._write(name, compute())
                progress.update()
            for point in arms.values():
                progress.set_postfix_str(f"{point.study}, {point.line} {point.value:g}")
                self._outcome(point)
                progress.update()
        self._write_tradeoffs()

    def _table(self, name: str) -> pd.DataFrame:
        return pd.read_parquet(table_path(self.out, name))

    def _write(self, name: str, table: pd.DataFrame) -> None:
        with replacing(table_path(self.out, name)) as temporary:
            table.to_parquet(temporary, index=False)

    @cached_property
    def _edited(self) -> Edited:
        """All cases with their edits, from the folder if it has them."""
        paths = [self.out / "edits" / f"{i:05d}.safetensors" for i in range(len(self.cases))]
        if not all(path.is_file() for path in paths):
            made = rome(
                self.model,
                [case.request for case in self.cases],
                config=self.config,
                contexts=self.supplies.contexts(self.config.context_lengths),
                moment=self.supplies.moment(self.config.layer),
                restrict=SADR(gamma=0),
            )
            for edit, path in zip(made, paths, strict=True):
                edit.save(path)
        edits = tuple(Edit.load(path, self.model) for path in paths)
        return Edited(self.model, self.cases, edits, self.tasks, self.config.layer, self.seed)

    @property
    def _few(self) -> Edited:
        return self._edited.first(self.studied)

    def _head_kinds(self) -> pd.DataFrame:
        few = self.cases[: self.studied]
        texts = [f"{case.request.question} {case.request.target_true or case.request.target_new}." for case in few]
        return selection.head_kinds(self.model, texts)

    def _wording_heads(self) -> pd.DataFrame:
        few = self._few
        own = [case.request.wordings[0] for case in few.cases]
        return studies.wording_heads(few, [(first, *more) for first, more in zip(own, self.templates, strict=False)])

    def _outcome(self, point: Point | None) -> Outcome:
        """A point's arm, from the folder if it has it; None is the unedited model."""
        folder = self.out / "arms" / ("none" if point is None else point.arm)
        held = Outcome.load(folder)
        if held is not None:
            return held
        pairs = list(zip(self.cases, self.templates, strict=True))[: self.studied]
        scored = [tradeoffs.without_wordings(case, templates) for case, templates in pairs]
        if point is None:
            made = arm(self.supplies, scored, NONE, None, self.config)
        else:
            requests = [tradeoffs.request(case, templates, point.wordings) for case, templates in pairs]
            made = arm(self.supplies, scored, point.line, requests, point.config, point.restrict)
        outcome = Outcome.of(made, self.config.layer)
        outcome.save(folder)
        return outcome

    def _write_tradeoffs(self) -> None:
        """The tables that are made from all arms."""
        unedited = self._outcome(None)
        found = [(point, self._outcome(point)) for point in self.points]
        self._write("tradeoffs", tradeoffs.rows(found, unedited))
        self._write("arm_heads", tradeoffs.heads(found, unedited))
        self._write("selected", tradeoffs.steps(found))
        self._write("equal_efficacy", at_equal_efficacy(*tradeoffs.lines(found, self.gamma), self.seed))

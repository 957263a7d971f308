"""Quantify attention drift, explain what it breaks, show it.

The modules below are attributes, imported when they are first used: ``analysis.drift.attention_drift``.
"""

from importlib import import_module
from types import ModuleType

# By the name under which users import it; several names of 0.1.0 stand for modules that have moved since.
_MODULES = {
    "arms": "comparison.arms",
    "benchmark": "benchmark",
    "correlation": "drift.correlation",
    "demo": "demo.run",
    "drift": "drift",
    "equal_efficacy": "comparison.equal_efficacy",
    "evidence": "evidence",
    "fluency": "scoring.fluency",
    "head_kinds": "drift.head_types",
    "head_types": "drift.head_types",
    "heads": "drift.heads",
    "interventions": "causal.interventions",
    "layers": "layers",
    "methods": "methods",
    "patching": "causal.patching",
    "plots": "plots",
    "report": "report",
    "score": "scoring.score",
    "scores": "scoring.scores",
    "selection": "drift.heads",
    "sequences": "sequences",
    "specificity": "scoring.score",
    "statistics": "statistics",
    "substitution": "causal.substitution",
    "tracing": "causal.tracing",
    "tradeoffs": "comparison.tradeoffs",
    "wordings": "comparison.wordings",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{_MODULES[name]}")


def __dir__() -> list[str]:
    return __all__

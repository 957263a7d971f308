"""Imports run in the allowed direction only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attn_drift

ROOT = Path(__file__).parents[1]

# Each module of attn_drift may import those of its own level (if listed before it) and of the levels above it here.
ORDER = [
    "checks",
    "files",
    "requests",
    "cases",
    "records",
    "json_lists",
    "datasets",
    "corpora",
    "history",
    "tokens",
    "bridges",
    "budget",
    "changes",
    "attachments",
    "hooks",
    "shortcuts",
    "prefixes",
    "models",
    "caches",
    "rewriting",
    "weights",
    "edit_files",
    "edits",
    "exports",
    "attention",
    "restriction",
    "hidden_state",
    "sampling",
    "accumulation",
    "rome_stats",
    "moments",
    "convergence",
    "streaming",
    "passes",
    "optimiser",
    "values",
    "editors",
    "demo",
]


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """The part of attn_drift that a file belongs to."""
    return path.relative_to(ROOT / "attn_drift").parts[0].removesuffix(".py")


def upward(module: str, imported: set[str]) -> set[str]:
    """The imports of ``module`` that run against ``ORDER``."""
    parts = {name.split(".")[1] for name in imported if name.startswith("attn_drift.")}
    own = ORDER.index(module)
    return {part for part in parts if part in ORDER and ORDER.index(part) > own}


FILES = sorted((ROOT / "attn_drift").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_arrow_runs_up(path: Path) -> None:
    imported = imports(path)
    assert not {name for name in imported if name.split(".")[0] == "analysis"}
    module = module_of(path)
    if module != "__init__":
        assert module in ORDER, f"place {module} in ORDER"
        assert not upward(module, imported)


def test_an_upward_arrow_would_be_found() -> None:
    assert upward("hooks", {"attn_drift.tokens", "attn_drift.edits"}) == {"edits"}


def test_restriction_and_editors_do_not_know_each_other() -> None:
    assert not {n for n in imports(ROOT / "attn_drift/restriction.py") if "editors" in n}
    for path in (ROOT / "attn_drift/editors").glob("*.py"):
        assert "attn_drift.restriction.SADR" not in imports(path)


def test_hook_points_are_named_in_one_place() -> None:
    for path in [*FILES, *(ROOT / "analysis").rglob("*.py")]:
        if path.name != "hooks.py":
            assert "hook_" not in path.read_text().replace("hook_dict", ""), path


def test_reading_cases_loads_no_model_library() -> None:
    """What is wrong with a file is said at once: TransformerLens alone takes seconds to import."""
    code = "import sys, attn_drift.datasets; print({'torch', 'transformers', 'transformer_lens'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_every_public_name_is_there() -> None:
    assert all(getattr(attn_drift, name) is not None for name in attn_drift.__all__)
    assert set(attn_drift.__all__) <= set(dir(attn_drift))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attn_drift.nothing

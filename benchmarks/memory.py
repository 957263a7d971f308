"""Peak memory of some work in a process of its own, above what it holds once the model is loaded (Linux).

python benchmarks/memory.py WORK REQUESTS {fast,plain,plain-at-once}
"""

import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from workloads import SADR, Lab, part

# Enough for the peak: every step holds the same.
STEPS = 5


def peak(work: str, n: int, way: str) -> dict[str, float]:
    """MiB: ``above``, the peak above what was held before the work, and ``process``, the peak of the whole process."""
    command = [sys.executable, str(Path(__file__)), work, str(n), way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _prepared(lab: Lab, work: str, n: int, way: str) -> Callable[[], object]:
    """The work, with what it takes made."""
    if work in ("rome", "sadr"):
        restrict, texts = SADR if work == "sadr" else None, lab.texts(n)
        groups = [[request] for request in texts] if way == "plain" else [texts]
        return lambda: [lab.values(group, restrict, STEPS, way != "fast") for group in groups]
    if work == "scoring":
        edits = lab.edits(n)
        return lambda: lab.scores(edits, way != "fast")
    if work == "benchmark":
        worker = lab.worker()
        return lambda: part(worker, lab.cases[:n], way != "fast")
    raise ValueError(f"the work is {work!r}; expected rome, sadr, scoring or benchmark")


def _held(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _main(work: str, n: str, way: str) -> None:
    torch.set_num_threads(1)
    lab = Lab.demo()
    # What a first run of the kind loads and keeps is no part of it.
    _prepared(lab, work, 1, "fast")()
    do = _prepared(lab, work, int(n), way)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what making it has left
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _held("VmRSS")
    do()
    top = _held("VmHWM")
    sys.stdout.write(json.dumps({"above": top - before, "process": top}) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])

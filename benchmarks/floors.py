"""Operations and bytes that no version of some work can avoid, what this machine needs for them, and what is done.

A multiply-add counts as two operations. Weights are frozen: a step runs the layers above the edit forward, and backward
to the activations alone, on the tokens from the subject-last one on; logits are made where a loss reads them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformer_lens.model_bridge import TransformerBridge
from workloads import seconds

from analysis.scoring.fluency import LENGTH
from analysis.scoring.score import SPARE_TOKENS
from attn_drift.data.cases import TASKS, Case
from attn_drift.editors.rome import ROMEConfig
from attn_drift.model.tokens import encode, encode_completion
from attn_drift.prompts import RequestPrompts

NUMBER = 4  # bytes of a float32


@dataclass(frozen=True)
class Cost:
    """What some work costs at least: floating-point operations, and bytes moved from or to memory."""

    operations: float
    bytes: float

    def seconds(self, speed: "Speed") -> float:
        """The longer of computing and moving."""
        return max(self.operations / speed.operations, self.bytes / speed.bytes)


@dataclass(frozen=True)
class Speed:
    """What one thread does in a second: operations of a large matrix product, bytes read by a sum."""

    operations: float
    bytes: float

    @classmethod
    def measured(cls, size: int = 1024, rounds: int = 8) -> "Speed":
        square, long = torch.randn(size, size), torch.randn(2**25)
        product = min(seconds(lambda: square @ square) for _ in range(rounds))
        summed = min(seconds(long.sum) for _ in range(rounds))
        return cls(2 * size**3 / product, NUMBER * len(long) / summed)


def step_floor(model: TransformerBridge, texts: Sequence[RequestPrompts], layer: int) -> Cost:
    """Of one step for all of some requests, edited at ``layer``."""
    cfg, above = model.cfg, model.cfg.n_layers - 1 - layer
    rows = [(len(t.completion.tokens), t.subject_last, len(t.completion.target)) for r in texts for t in r.rewriting]
    rows += [(r.essence_subject_last + 1, r.essence_subject_last, 1) for r in texts]
    seen = [position + 1 for length, subject, _ in rows for position in range(subject, length)]
    operations, weights = _forward(model, above, seen, sum(target for _, _, target in rows))
    prefixes = above * 2 * cfg.d_model * sum(subject for _, subject, _ in rows)
    # Backward to the activations: as much again.
    return Cost(2 * operations, NUMBER * 2 * (weights + prefixes))


def scoring_floor(model: TransformerBridge, cases: Sequence[Case]) -> Cost:
    """Of every text with its right object, what texts of a case begin with once; free answers may have more tokens."""
    prefixes, beyond, read = set(), list[int](), 0
    for case in cases:
        for probe in (probe for task in TASKS for probe in case.probes.get(task, ())):
            asked = encode_completion(model, probe.text, probe.right)
            ids = asked.tokens.ids
            prefixes |= {(case.case_id, ids[: n + 1]) for n in range(len(ids))}
            beyond += [len(ids) + 1 + n for n in range(SPARE_TOKENS)]
            read += len(asked.target) + SPARE_TOKENS
    operations, weights = _forward(model, model.cfg.n_layers, [len(ids) for _, ids in prefixes] + beyond, read)
    return Cost(operations, NUMBER * weights)


def benchmark_floor(
    model: TransformerBridge, cases: Sequence[Case], texts: Sequence[RequestPrompts], steps: int
) -> Cost:
    """Of cases edited together in so many steps on their texts, scored, and continued."""
    step, scoring = step_floor(model, texts, ROMEConfig.for_model(model).layer), scoring_floor(model, cases)
    openings = [len(encode(model, prompt)) for case in cases for prompt in case.generation]
    seen = [position + 1 for n in openings for position in range(n + LENGTH - 1)]
    prose, weights = _forward(model, model.cfg.n_layers, seen, LENGTH * len(openings))
    operations = steps * step.operations + scoring.operations + prose
    # One token follows the other: the weights are read for each.
    return Cost(operations, steps * step.bytes + scoring.bytes + LENGTH * NUMBER * weights)


def _forward(model: TransformerBridge, layers: int, seen: Sequence[int], read: int) -> tuple[float, float]:
    """Operations of running tokens that see so many through the last layers, with logits at some; weights that takes.

    In the last layer tokens that are not read need nothing but keys and values.
    """
    cfg, square = model.cfg, model.cfg.d_model**2
    full = (layers - 1) * (12 * square * len(seen) + 2 * cfg.d_model * sum(seen))
    last = 2 * square * len(seen) + 10 * square * read
    return 2 * (full + last + cfg.d_model * cfg.d_vocab * read), layers * 12 * square + cfg.d_model * cfg.d_vocab


def operations_done(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that some work does."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()

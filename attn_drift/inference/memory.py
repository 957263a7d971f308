"""How many texts are run at once: an estimate of what a run holds, and what is free."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from transformer_lens.model_bridge import TransformerBridge

# Of what is free.
SHARE = 0.5
# Tokens in a run, filling included: beyond, time per token no longer falls.
BATCH_TOKENS = 2**14
# What a run costs beside its tokens, in tokens.
TOKENS_PER_RUN = 400

# Where Linux tells which groups a process is in (a container, a job of a batch system), and by the name of what
# controls them what they may hold: the folder, the limit, what is used, and the row of memory.stat for cached files.
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        rows: texts.
        new: tokens of each that are run, filling included.
        keys: tokens that each sees at most, those included.
        read: tokens of each at which logits are made.
    """

    rows: int
    new: int
    keys: int
    read: int

    def joined(self, other: "Size") -> "Size":
        """Of a run of the texts of both."""
        new, before = max(self.new, other.new), max(self.keys - self.new, other.keys - other.new)
        return Size(self.rows + other.rows, new, before + new, max(self.read, other.read))


@dataclass(frozen=True, eq=False)
class Budget:
    """What runs of a model may hold: half of the memory that was free when it was made.

    Attributes:
        model: the model.
        bytes: at most, beside the model itself.
        restricted: whether a restriction looks at runs with gradients.
    """

    model: TransformerBridge
    bytes: float
    restricted: bool = False

    @classmethod
    def of(cls, model: TransformerBridge, restricted: bool = False) -> "Budget":
        """By what is free on the model's device now."""
        return cls(model, SHARE * free_memory(next(model.parameters()).device), restricted)

    def allows(self, size: Size, gradients: bool = False) -> bool:
        """Whether a run fits, its backward pass included where there are gradients."""
        return size.rows <= self.most_rows(size, gradients)

    def most_rows(self, size: Size, gradients: bool = False) -> int:
        """How many rows of a size fit into a run, one at least."""
        held = estimate(self.model, replace(size, rows=1), gradients, gradients and self.restricted)
        return max(1, min(BATCH_TOKENS // max(1, size.new), int(self.bytes / max(1, held))))


def estimate(model: TransformerBridge, size: Size, gradients: bool = False, restricted: bool = False) -> int:
    """Bytes that a run holds at its peak, about: activations of one layer, or with gradients all, caches and logits.

    Args:
        model: the model.
        size: of the run.
        gradients: whether it is kept for a backward pass.
        restricted: whether a divergence of all rows of all patterns is kept for it, too.
    """
    cfg, number = model.cfg, next(model.parameters()).element_size()
    tokens = size.rows * size.new
    stream = tokens * number * (12 * cfg.d_model + 6 * cfg.d_mlp)
    # Attention, its mask and what its softmax keeps, the last in float32 at least; what a divergence keeps.
    patterns = (12 if restricted else 4) * max(number, 4) * tokens * size.keys * cfg.n_heads
    width = cfg.d_head * (cfg.n_key_value_heads or cfg.n_heads)
    # Of what was read before, again together with what is new, and of the texts that go on.
    cache = 3 * 2 * number * size.rows * size.keys * width * cfg.n_layers
    logits = 4 * max(number, 4) * size.rows * size.read * cfg.d_vocab
    return int((cfg.n_layers if gradients else 1) * (stream + patterns) + cache + logits)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: with the allocator's own reserve, and within what a container may take."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + reserve)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return min(int(psutil.virtual_memory().available), *_left_to_groups())


def _left_to_groups() -> Iterator[int]:
    """Bytes that each group that this process is in may still take, outer ones included."""
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    for controller, (root, *names) in GROUPS.items():
        folder = root / own.get(controller, "/").lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield _left_to_the_group(group, *names)


def _left_to_the_group(folder: Path, limit: str, used: str, cached: str) -> int:
    """Bytes that a group may still take; more than any machine has where nothing says so."""
    try:
        left = int((folder / limit).read_text()) - int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return 2**62
    # Files that are kept as long as nothing else needs the room count as used.
    return left + int(stat.get(cached, 0))


def parted(starts: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Texts in groups of like length, so that tokens with filling, and what every run costs beside them, are least.

    Args:
        starts: number of tokens before those that are run, of each text.
        lengths: number of tokens that are run, of each text.
        limit: of columns, before and after; a text by itself is within it.

    Returns:
        Places of the texts, the shortest texts first, in each group in ascending order.
    """
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_length.setdefault(length, []).append(place)
    distinct = sorted(by_length)
    # Of the first so many lengths: the least cost, and where its last group begins.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(distinct) + 1):
        costs, n, before = [], 0, 0
        for first in range(stop - 1, -1, -1):
            n += len(by_length[distinct[first]])
            before = max(before, *(starts[place] for place in by_length[distinct[first]]))
            if first == stop - 1 or before + distinct[stop - 1] <= limit:
                costs.append((best[first][0] + TOKENS_PER_RUN + n * distinct[stop - 1], first))
        best.append(min(costs))
    groups, stop = [], len(distinct)
    while stop:
        first = best[stop][1]
        groups.append(sorted(place for n in distinct[first:stop] for place in by_length[n]))
        stop = first
    return groups[::-1]

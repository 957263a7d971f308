"""Cases of the demo world: facts to edit, and what each edit must and must not change."""

import random
from collections.abc import Sequence
from typing import Any

from attn_drift.data.cases import Case, Probe, Task, distracting
from attn_drift.demo.world import World
from attn_drift.requests import EditRequest, fill

# Of each relation's wordings: the edit's own, the one a rephrased edit adds, and those that measure paraphrases.
EDIT, REPHRASING, PARAPHRASES = 0, 1, (2, 3, 4)
NEIGHBORS = 8

# Openings about a person, which the model continues.
GENERATION = ("{}", "These days, {}", "I know that {}")

# Where the merged format has the texts of a task; it derives DNS from NS.
MERGED: dict[Task, str] = {"ES": "rewrite", "PS": "p-paraphrase", "NS": "l-neighbor", "RS": "l-relation"}


def demo_cases(world: World, n: int, seed: int) -> list[Case]:
    """Draws ``n`` facts, each of another person, with a new object each.

    Texts whose right object happens to be the edit's new object are left out: they cannot be judged.

    Raises:
        ValueError: ``n`` is not between 1 and the number of people.
    """
    if not 1 <= n <= len(world.people):
        raise ValueError(f"{n} cases were asked for; the demo world has facts for 1 to {len(world.people)}")
    rng = random.Random(seed)
    return [_case(world, person, rng) for person in rng.sample(world.people, n)]


def rephrased(world: World, case: Case) -> EditRequest:
    """The request of a case with a second wording of its question, one that no score uses."""
    return case.request.rephrased(further_wordings(world, case)[0])


def further_wordings(world: World, case: Case) -> tuple[str, ...]:
    """Templates of a case's question beyond its own: one that no score uses, then the first paraphrase."""
    relation = next(r for r in world.relations.values() if r.templates[EDIT] == case.request.prompt)
    return relation.templates[REPHRASING], relation.templates[PARAPHRASES[0]]


def merged_record(case: Case) -> dict[str, Any]:
    """A case of `demo_cases` as a record of the merged format, from which `read_cases` makes an equal case."""
    request = case.request
    return {
        "case_id": case.case_id,
        "requested_rewrite": {
            "prompt": request.question,
            "subject": request.subject,
            "target_new": request.target_new,
            "target_true": request.target_true,
            "relation_id": case.case_id.rpartition("/")[2],
            "target_new_id": request.target_new,
        },
        **{key: _prompted(case.probes[task]) for task, key in MERGED.items()},
        "generation": {"prompts": list(case.generation)},
    }


def _prompted(probes: Sequence[Probe]) -> dict[str, list[str]]:
    return {"prompts": [probe.text for probe in probes], "targets": [probe.right for probe in probes]}


def _case(world: World, person: str, rng: random.Random) -> Case:
    name = rng.choice(list(world.relations))
    relation = world.relations[name]
    old = world.facts[person][name]
    new = rng.choice([o for o in relation.objects if o != old])
    request = EditRequest(relation.templates[EDIT], person, new, old)
    others = [p for p in world.people if p != person and world.facts[p][name] != new]
    neighbors = tuple(
        Probe(fill(relation.templates[EDIT], p), world.facts[p][name], new) for p in rng.sample(others, NEIGHBORS)
    )
    elsewhere = tuple(
        Probe(fill(other.templates[template], person), world.facts[person][key], new)
        for key, other in world.relations.items()
        for template in (EDIT, REPHRASING)
        if key != name and world.facts[person][key] != new
    )
    return Case(
        case_id=f"{person}/{name}",
        request=request,
        probes={
            "ES": (Probe(request.question, new, old),),
            "PS": tuple(Probe(fill(relation.templates[t], person), new, old) for t in PARAPHRASES),
            "NS": neighbors,
            "DNS": tuple(distracting(request, probe) for probe in neighbors),
            "RS": elsewhere,
        },
        generation=tuple(fill(opening, person) for opening in GENERATION),
    )

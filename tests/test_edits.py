"""What must be true of any edit: hooks, weights and files agree; undoing is exact."""

import functools
import json
import operator
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import n_hooks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import attn_drift as ad
from attn_drift.hooks import run
from attn_drift.models import down_projection, fingerprint
from attn_drift.tokens import encode, pad

Make = Callable[..., TransformerBridge]
TEXTS = ["Ada Bellini plays the cello", "The man", "Carla Moreau was seen in town by a friend of Ada Bellini."]


def random_edit(model: TransformerBridge, seed: int, layers: tuple[int, ...] = (1,), rank: int = 1) -> ad.Edit:
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for layer in layers:
        d_mlp, d_model = down_projection(model, layer).shape
        updates[layer] = ad.LowRankUpdate(
            torch.randn(rank, d_mlp, generator=generator) / 8, torch.randn(rank, d_model, generator=generator)
        )
    request = ad.EditRequest("{} plays the", "Ada Bellini", f"object {seed}").rephrased("The man {} is")
    return ad.Edit(updates, (request,), fingerprint(model), model.cfg.model_name, {"editor": "random"})


def logits(model: TransformerBridge, texts: list[str] = TEXTS) -> Tensor:
    batch = pad(model, [encode(model, text) for text in texts])
    with torch.no_grad():
        return run(model, batch)[batch.mask]


def state(model: TransformerBridge) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.original_model.state_dict().items()}


def same_state(model: TransformerBridge, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, before[name]) for name, weight in model.original_model.state_dict().items())


def test_hooks_weights_and_file_agree(make_model: Make, architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    edit = random_edit(model, 0, (0, 2), rank=2)
    edit.save(tmp_path / "edit.safetensors")
    loaded = ad.Edit.load(tmp_path / "edit.safetensors", model)
    plain = logits(model)
    with edit.applied(model):
        hooked = logits(model)
    with loaded.applied(model):
        reloaded = logits(model)
    edit.write_to(model)
    written = logits(model)
    edit.remove_from(model)
    torch.testing.assert_close(hooked, written, rtol=1e-5, atol=1e-5)
    assert torch.equal(hooked, reloaded)
    assert (plain - hooked).abs().max() > 1e-2
    assert torch.equal(plain, logits(model))


def test_undo_is_exact(make_model: Make, architecture: str) -> None:
    model = make_model(architecture)
    edit, before, plain = random_edit(model, 0, (0, 1)), state(model), logits(model)
    with edit.applied(model):
        logits(model)
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError, match="inside"), edit.applied(model):
        raise RuntimeError("inside")
    assert n_hooks(model) == 0
    assert torch.equal(logits(model), plain)
    edit.write_to(model)
    assert not same_state(model, before)
    edit.remove_from(model)
    assert same_state(model, before)
    assert torch.equal(logits(model), plain)


def test_own_hooks_of_the_user_survive(small: TransformerBridge) -> None:
    seen = []
    small.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: seen.append(1))
    with random_edit(small, 0).applied(small):
        logits(small)
    assert n_hooks(small) == 1
    logits(small)
    assert len(seen) == 2
    small.reset_hooks()


@given(order=st.permutations([0, 1, 2]), removal=st.permutations([0, 1, 2]), kept=st.integers(0, 2))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_edits_come_out_in_any_order(make_model: Make, order: list[int], removal: list[int], kept: int) -> None:
    model = _shared(make_model)
    before = state(model)
    edits = [random_edit(model, seed, (seed % 2, 2)) for seed in range(3)]
    for i in order:
        edits[i].write_to(model)
    for i in removal[kept:]:
        edits[i].remove_from(model)
    remaining = [i for i in order if i in removal[:kept]]
    left = state(model)
    for i in remaining:
        edits[i].remove_from(model)
    assert same_state(model, before)
    for i in remaining:
        edits[i].write_to(model)
    assert same_state(model, left)
    for i in remaining:
        edits[i].remove_from(model)


_models: dict[str, TransformerBridge] = {}


def _shared(make_model: Make) -> TransformerBridge:
    return _models.setdefault("gpt2", make_model("gpt2"))


def test_removing_what_is_not_there_is_refused(make_model: Make) -> None:
    model = make_model("gpt2")
    edit, other = random_edit(model, 0), random_edit(model, 1)
    with pytest.raises(ValueError, match="not written"):
        edit.remove_from(model)
    edit.write_to(model)
    with pytest.raises(ValueError, match="already written"):
        edit.write_to(model)
    with pytest.raises(ValueError, match="not written"):
        other.remove_from(model)
    edit.remove_from(model)
    with pytest.raises(ValueError, match="not written"):
        edit.remove_from(model)


def test_foreign_changes_are_not_lost(make_model: Make) -> None:
    model = make_model("gpt2")
    edit = random_edit(model, 0)
    edit.write_to(model)
    with torch.no_grad():
        down_projection(model, 1)[0, 0] += 1
    changed = state(model)
    with pytest.raises(RuntimeError, match="changed by something else"):
        edit.remove_from(model)
    with pytest.raises(RuntimeError, match="changed by something else"):
        random_edit(model, 1).write_to(model)
    assert same_state(model, changed)


def test_sum_is_both(make_model: Make, architecture: str) -> None:
    model = make_model(architecture)
    first, second = random_edit(model, 0, (0, 1)), random_edit(model, 1, (1, 2), rank=3)
    both = first + second
    assert both.updates[1].rank == 4
    assert len(both.requests) == 2
    with first.applied(model), second.applied(model):
        nested = logits(model)
    with both.applied(model):
        torch.testing.assert_close(logits(model), nested, rtol=1e-5, atol=1e-5)


def test_sum_of_very_many(small: TransformerBridge, tmp_path: Path) -> None:
    edits = [random_edit(small, seed) for seed in range(1200)]
    everything = functools.reduce(operator.add, edits)
    assert everything.updates[1].rank == 1200 and everything.leaves() == set(edits)
    expected = sum(edit.updates[1].delta() for edit in edits)
    torch.testing.assert_close(everything.updates[1].delta(), expected, rtol=1e-3, atol=1e-3)
    everything.save(tmp_path / "sum")
    assert ad.Edit.load(tmp_path / "sum", small).requests == everything.requests


def test_rows_carry_their_own_edits(make_model: Make, architecture: str) -> None:
    model = make_model(architecture)
    edits = [random_edit(model, 0, (0, 1)), None, random_edit(model, 1, (1,), rank=3)]
    batch = pad(model, [encode(model, text) for text in TEXTS])
    with torch.no_grad(), ad.applied_to_rows(model, edits):
        together = run(model, batch)
    assert n_hooks(model) == 0
    for row, edit in enumerate(edits):
        length = len(batch.rows[row])
        if edit is None:
            alone = logits(model, [TEXTS[row]])
        else:
            with edit.applied(model):
                alone = logits(model, [TEXTS[row]])
        torch.testing.assert_close(together[row, :length], alone, rtol=1e-4, atol=1e-5)


def test_rows_need_as_many_edits_as_texts(small: TransformerBridge) -> None:
    rows = ad.applied_to_rows(small, [random_edit(small, 0), None])
    with pytest.raises(ValueError, match="3 texts, but updates were applied for 2"), rows:
        logits(small)
    assert n_hooks(small) == 0


def test_file_round_trip(make_model: Make, tmp_path: Path) -> None:
    model = make_model("gpt2")
    request = ad.EditRequest("{} plays the", "Ada Bellini", "cello", "piano").rephrased("The man {} is")
    moment = ad.SecondMoment(1, torch.eye(128, dtype=torch.float64), 10, fingerprint(model))
    edit = ad.rome(
        model,
        request,
        config=ad.ROMEConfig(layer=1, steps=3),
        contexts=["I. {}"],
        moment=moment,
        restrict=ad.SADR(gamma=0.1),
    )
    path = tmp_path / "folder" / "edit.safetensors"
    edit.save(path)
    loaded = ad.Edit.load(path, model)
    assert path.stat().st_size < 8192
    assert loaded.requests == edit.requests
    assert torch.equal(loaded.updates[1].delta(), edit.updates[1].delta())
    assert loaded.history is not None and edit.history is not None
    assert loaded.history.to_frame().equals(edit.history.to_frame())
    assert dict(loaded.method) == json.loads(json.dumps(dict(edit.method)))
    assert [p.name for p in path.parent.iterdir()] == ["edit.safetensors"]


def test_bad_files_are_refused(make_model: Make, tmp_path: Path) -> None:
    model, path = make_model("gpt2"), tmp_path / "edit.safetensors"
    edit = random_edit(model, 0)
    with pytest.raises(FileNotFoundError, match="no edit file"):
        ad.Edit.load(path, model)
    path.write_bytes(b"not an edit")
    with pytest.raises(ValueError, match="damaged or no edit"):
        ad.Edit.load(path, model)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no edit"):
        ad.Edit.load(path, model)
    edit.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged or no edit"):
        ad.Edit.load(path, model)
    broken = ad.LowRankUpdate(edit.updates[1].keys * float("nan"), edit.updates[1].values)
    ad.Edit({1: broken}, edit.requests, edit.fingerprint, "x").save(path)
    with pytest.raises(ValueError, match="not finite"):
        ad.Edit.load(path, model)
    record = {"requests": [], "fingerprint": edit.fingerprint, "model_name": "x", "method": {}}
    tensors = {"layers.1.keys": torch.ones(1, 128), "layers.1.values": torch.ones(1, 32)}
    counts = {name: tensor.long() for name, tensor in tensors.items()}
    for content, changed, message in [
        (counts, {}, "not of floats"),
        ({}, {}, "has no layers"),
        ({"layers.1.keys": torch.ones(2, 128), "layers.1.values": torch.ones(1, 32)}, {}, "do not match"),
        ({"layers.1.keys": torch.ones(1, 128)}, {}, "KeyError"),
        ({"layers.x.keys": torch.ones(1, 128)}, {}, "ValueError"),
        (tensors, {"requests": [5]}, "TypeError"),
        (tensors, {"requests": [{"prompt": "none", "subject": "a", "target_new": "x", "rephrasings": []}]}, "0 places"),
    ]:
        metadata = {"format": "attn_drift.edit.1", "record": json.dumps({**record, **changed})}
        save_file(content, path, metadata=metadata)
        with pytest.raises(ValueError, match=message):
            ad.Edit.load(path, model)


def test_file_of_another_model_is_refused(make_model: Make, tmp_path: Path) -> None:
    model, other, path = make_model("gpt2"), make_model("llama"), tmp_path / "edit.safetensors"
    edit = random_edit(model, 0)
    edit.save(path)
    with pytest.raises(ValueError, match="was made for"):
        ad.Edit.load(path, other)
    # A model with edits written in it is still the one that they were made for; one changed otherwise is not.
    random_edit(model, 1).write_to(model)
    assert ad.Edit.load(path, model).updates.keys() == {1}
    changed = make_model("gpt2")
    with torch.no_grad():
        down_projection(changed, 0).mul_(1.01)
    with pytest.raises(ValueError, match="without changed weights"):
        ad.Edit.load(path, changed)


def test_applying_to_other_weights_is_said(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    model, changed = make_model("gpt2"), make_model("gpt2")
    edit, second = random_edit(model, 0), random_edit(model, 1)
    edit.write_to(model)
    with second.applied(model):
        pass
    assert not caplog.records
    with torch.no_grad():
        down_projection(changed, 0).mul_(1.01)
    with edit.applied(changed):
        pass
    assert "was made for other weights" in caplog.text


def test_an_edit_does_not_count_twice(make_model: Make) -> None:
    model = make_model("gpt2")
    edit = random_edit(model, 0)
    edit.write_to(model)
    other = ad.Edit(random_edit(model, 1).updates, edit.requests, edit.fingerprint, "x")
    both = edit + other
    for twice in (edit, both):
        with pytest.raises(ValueError, match="already written"), twice.applied(model):
            pass
        with pytest.raises(ValueError, match="already written"):
            twice.write_to(model)
        with pytest.raises(ValueError, match="already written"):
            ad.capture_attention(model, "Ada", edits=[twice])
    with other.applied(model):
        pass
    edit.remove_from(model)
    with both.applied(model):
        pass


def test_edits_made_on_top_of_others_reload(make_model: Make, tmp_path: Path) -> None:
    model = make_model("gpt2")
    random_edit(model, 0).write_to(model)
    second = random_edit(model, 1)
    second.save(tmp_path / "second")
    second.write_to(model)
    assert ad.Edit.load(tmp_path / "second", model).requests == second.requests


def test_written_edits_survive_changes_of_the_value_and_casts_are_named(make_model: Make) -> None:
    model = make_model("gpt2")
    before, edit = state(model), random_edit(model, 0)
    edit.write_to(model)
    edit.updates[1].values.mul_(0.5)
    model.original_model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="was cast from"):
        edit.remove_from(model)
    model.original_model.to(torch.float32)
    with pytest.raises(RuntimeError, match="changed by something else"):
        edit.remove_from(model)  # the round trip through bfloat16 lost bits
    model = make_model("gpt2")
    edit.write_to(model)
    edit.updates[1].values.mul_(0.5)
    edit.remove_from(model)
    assert same_state(model, before)


def test_float32_edit_of_a_float64_model(make_model: Make) -> None:
    model = make_model("gpt2", torch.float64)
    before = state(model)
    nothing = ad.LowRankUpdate(torch.zeros(1, 128), torch.zeros(1, 32))
    zero = ad.Edit({1: nothing}, (), fingerprint(model), "x")
    zero.write_to(model)
    assert same_state(model, before)
    zero.remove_from(model)
    original, something = down_projection(model, 1).clone(), random_edit(model, 0)
    assert something.updates[1].keys.dtype == torch.float32
    something.write_to(model)
    assert torch.equal(down_projection(model, 1), original + something.updates[1].delta().double())


def test_edits_that_are_not_finite_are_refused(small: TransformerBridge) -> None:
    update = random_edit(small, 0).updates[1]
    broken = ad.Edit({1: ad.LowRankUpdate(update.keys * float("inf"), update.values)}, (), "x", "x")
    with pytest.raises(ValueError, match="not finite"):
        broken.write_to(small)


def test_short_texts_stand_for_edits(small: TransformerBridge) -> None:
    edit = random_edit(small, 0)
    assert repr(edit) == "Edit(random of GPT2LMHeadModel, L1 rank 1: 'Ada Bellini plays the' -> 'object 0')"
    assert repr(edit.updates[1]) == "LowRankUpdate(rank 1, 128 -> 32)"


def test_edits_of_another_shape_are_refused(make_model: Make) -> None:
    edit, other = random_edit(make_model("gpt2"), 0), make_model("llama")
    with pytest.raises(ValueError, match=r"but .* has"), edit.applied(other):
        pass
    with pytest.raises(ValueError, match="different weights"):
        edit + random_edit(other, 0)

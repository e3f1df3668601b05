"""MFN against its equations, step by step."""

from dataclasses import replace

import pytest
import torch

from models.data import Inputs
from models.layers import MFN, MemoryFusion, MFNConfig
from tests.models.layers.checks import (
    aligned,
    assert_gradients_reach_everything,
    assert_items_are_independent,
    assert_padding_is_never_read,
    draw,
    linear,
    lstm,
    needs_utd_mhad,
    rows,
    sigmoid,
    softmax,
    utd_batch,
)

STILL = {f"{name}_dropout": 0.0 for name in ("attention", "proposal", "retain", "update")}
SMALL = MFNConfig(hidden=(4, 3, 2), memory=5, attention=6, proposal=7, retain=8, update=3, **STILL)
DIMS = (3, 1, 2)


def batch(lengths=(6, 1, 4)):
    return [draw(list(lengths), dim) for dim in DIMS]


def plain_mfn(model, item):
    """Features of one item, whose sequences [T, d_m] have the same T."""

    def two(net, x):
        return linear(net[3], linear(net[0], x).clamp(min=0))

    states = [lstm(cell, x) for cell, x in zip(model.lstms, item, strict=True)]
    memory = item[0].new_zeros(model.config.memory)
    before = torch.cat([c[0] * 0 for _, c in states])
    for t in range(len(item[0])):
        now = torch.cat([c[t] for _, c in states])
        window = torch.cat([before, now])
        attended = softmax(two(model.attention, window)) * window
        proposal = torch.tanh(two(model.proposal, attended))
        both = torch.cat([attended, memory])
        memory = sigmoid(two(model.retain, both)) * memory + sigmoid(two(model.update, both)) * proposal
        before = now
    return torch.cat([*(h[-1] for h, _ in states), memory])


def test_every_item_follows_the_equations_on_its_own_steps():
    model, inputs = MemoryFusion(DIMS, SMALL).double(), batch()
    found = model(*inputs)
    assert found.shape == (3, model.out_dim) == (3, 14)
    for item, sequences in enumerate(zip(*map(rows, inputs), strict=True)):
        torch.testing.assert_close(found[item], plain_mfn(model, sequences), rtol=1e-10, atol=1e-12)


def test_without_lengths_the_padding_is_read_as_public_code_does():
    model, inputs = MemoryFusion(DIMS, SMALL).double(), [x.values for x in batch()]
    for item, found in enumerate(model(*inputs)):
        torch.testing.assert_close(found, plain_mfn(model, [x[item] for x in inputs]), rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_the_equations():
    model, inputs = MemoryFusion(DIMS, SMALL).double(), batch()
    found = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    want = sum(plain_mfn(model, s).square().sum() for s in zip(*map(rows, inputs), strict=True))
    for f, w in zip(found, torch.autograd.grad(want, list(model.parameters())), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-10)


def test_the_gates_copy_or_clear_the_memory():
    model, inputs = MemoryFusion(DIMS, SMALL).double(), batch()
    with torch.no_grad():
        for gate, bias in ((model.retain, 100.0), (model.update, -100.0)):
            gate[3].bias.fill_(bias)
    assert model(*inputs)[:, 9:].abs().max() < 1e-12
    with torch.no_grad():
        model.retain[3].bias.fill_(-100.0)
        model.update[3].bias.fill_(100.0)
    memory = model(*inputs)[0, 9:]  # only the last proposal remains in the memory
    changed = model(*(Inputs(x.values.index_fill(1, torch.tensor([0]), 0.0), x.lengths) for x in inputs))[0, 9:]
    assert (memory - changed).abs().max() < 0.1 and memory.abs().max() > 1e-3


def test_padding_is_never_read():
    assert_padding_is_never_read(MFN(DIMS, 2, SMALL, 4).double(), *batch())


def test_an_item_does_not_depend_on_its_batch():
    assert_items_are_independent(MFN(DIMS, 2, SMALL, 4).double(), *batch())


def test_gradients_reach_every_parameter():
    model = MFN(DIMS, 2, SMALL, 4, 0.0).double()
    assert_gradients_reach_everything(model, model(*batch()))


def test_parameter_count_is_that_of_the_public_model():
    assert sum(p.numel() for p in MFN((300, 5, 20)).parameters()) == 483_985


@pytest.mark.parametrize("name", STILL)
def test_every_dropout_acts_in_training_alone(name):
    model, inputs = MemoryFusion(DIMS, replace(SMALL, **{name: 0.5})).double(), batch()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    assert torch.equal(model(*inputs), model(*inputs))
    still = MemoryFusion(DIMS, SMALL).double()
    still.load_state_dict(model.state_dict())
    torch.testing.assert_close(still(*inputs), model(*inputs))


def test_dropout_of_a_gate_keeps_its_mean():
    model = MemoryFusion(DIMS, replace(SMALL, retain_dropout=0.75, retain=4000)).double()
    kept = model._kept(torch.zeros(3, 2, 4003).double(), (0.75, 0.0))
    assert kept.shape == (3, 2, 4003) and set(kept.unique().tolist()) == {0.0, 1.0, 4.0}
    assert abs(kept[..., :4000].mean() - 1) < 0.05 and (kept[..., 4000:] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_under_autocast_is_near_single_precision(dtype):
    model, inputs = MemoryFusion(DIMS, SMALL), [Inputs(x.values.float(), x.lengths) for x in batch()]
    expected = model(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        found = model(*inputs)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@needs_utd_mhad
def test_two_real_modalities_aligned():
    inputs = aligned(utd_batch())
    model = MFN((60, 6), 27, replace(SMALL, hidden=(8, 4)), 8, 0.0)
    assert model(*inputs).shape == (4, 27)
    assert_gradients_reach_everything(model, model(*inputs))
    assert_items_are_independent(model.double(), *(Inputs(x.values.double(), x.lengths) for x in inputs))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"dims must be one per LSTM of hidden \(4, 3, 2\), got \(3, 1\)"):
        MemoryFusion((3, 1), SMALL)
    for options, message in (
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"hidden": ()}, "hidden must be at least 1"),
        ({"update_dropout": 1.5}, "update_dropout must be a dropout rate, at least 0 and below 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **options)
    model = MemoryFusion(DIMS, SMALL).double()
    with pytest.raises(ValueError, match="inputs must be one per modality, 3, got 1"):
        model(batch()[0])
    with pytest.raises(ValueError, match=r"inputs\[2\] must have the lengths of inputs\[0\]"):
        model(*batch()[:2], batch((6, 2, 4))[2])
    with pytest.raises(ValueError, match=r"inputs\[1\] must be aligned with inputs\[0\]"):
        model(batch()[0], batch((7, 1, 4))[1], batch()[2])

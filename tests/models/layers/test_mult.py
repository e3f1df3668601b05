"""MulT against its equations, computed for one item, head and query at a time."""

import math
from dataclasses import replace

import pytest
import torch

from models.data import Inputs
from models.layers import CrossModal, Dropouts, MulT, MulTConfig, TransformerStack
from models.layers.attention import Visible
from models.layers.transformer import sinusoids
from tests.models.layers.checks import (
    assert_gradients_reach_everything,
    assert_items_are_independent,
    assert_padding_is_never_read,
    draw,
    layer_norm,
    linear,
    needs_utd_mhad,
    rows,
    softmax,
    utd_batch,
)

SMALL = MulTConfig(dim=6, heads=2, layers=2, kernels=(1, 3, 3)).without_dropout()
DIMS = (6, 5, 4)


def batch():
    # Sources are shorter and longer than targets, offsets differ between items, one length is below the kernel's width.
    return [draw([7, 3, 5, 6], 6), draw([2, 11, 8, 4], 5), draw([13, 4, 9, 5], 4)]


def position(step, dim):
    half = dim // 2
    angles = [step * 10000 ** (-i / (half - 1)) for i in range(half)]
    row = [math.sin(a) for a in angles] + [math.cos(a) for a in angles] + [0.0] * (dim % 2)
    return torch.tensor(row, dtype=torch.float64)


def plain_embed(x, positions):
    found = []
    for t, step in enumerate(x):
        seen = positions == "steps" or (positions == "nonzero" and step[0] != 0)
        found.append(math.sqrt(len(step)) * step + (position(t + 1, len(step)) if seen else 0))
    return torch.stack(found)


def plain_attention(layer, target, source, offset):
    dim = target.shape[1]
    size = dim // layer.heads
    project = [target, source, source]
    q, k, v = (
        x @ layer.in_proj_weight[i * dim : (i + 1) * dim].T + layer.in_proj_bias[i * dim : (i + 1) * dim]
        for i, x in enumerate(project)
    )
    read = []
    for i in range(len(target)):
        parts = []
        seen = [j for j in range(len(source)) if offset is None or j - i < 1 + offset]
        for head in range(layer.heads):
            own = slice(head * size, (head + 1) * size)
            weights = softmax(torch.stack([q[i, own] @ k[j, own] / math.sqrt(size) for j in seen]))
            parts.append(sum(w * v[j, own] for w, j in zip(weights, seen, strict=True)))
        read.append(torch.cat(parts))
    return linear(layer.out_proj, torch.stack(read))


def plain_stack(stack, target, source, causal, positions):
    offset = None if not causal else abs(len(target) - len(target if source is None else source))
    x = plain_embed(target, positions)
    fixed = None if source is None else plain_embed(source, positions)
    for layer in stack.layers:
        norm = layer.norm_attention
        keys = layer_norm(norm, x if fixed is None else fixed)
        x = x + plain_attention(layer, layer_norm(norm, x), keys, offset)
        x = x + linear(layer.contract, linear(layer.expand, layer_norm(layer.norm_feedforward, x)).clamp(min=0))
    return layer_norm(stack.norm, x)


def plain_project(projection, x):
    if isinstance(projection, torch.nn.Identity):
        return x
    kernel = projection.weight.shape[2]
    x = torch.cat([x, x.new_zeros(max(0, kernel - len(x)), x.shape[1])])
    windows = [x[t : t + kernel] for t in range(len(x) - kernel + 1)]
    return torch.stack([torch.einsum("odk,kd->o", projection.weight, window) for window in windows])


def plain_mult(model, item, positions):
    """The prediction for one item with sequences [T_m, D_m] that have no padding."""
    features, causal = model.features, model.features.config.causal
    x = [plain_project(p, sequence) for p, sequence in zip(features.projections, item, strict=True)]
    read = [[] for _ in x]
    for stack, (target, source) in zip(features.encoders, features.directions, strict=True):
        read[target].append(plain_stack(stack, x[target], x[source], causal, positions))
    joined = [torch.cat(parts, 1) for parts in read]
    last = [plain_stack(m, t, None, causal, positions)[-1] for m, t in zip(features.memories, joined, strict=True)]
    h = torch.cat(last)
    return linear(model.out, h + linear(model.residual, linear(model.hidden, h).clamp(min=0)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("positions", [True, False])
def test_every_item_follows_the_equations_on_its_own_steps(causal, positions):
    model = MulT(DIMS, 2, replace(SMALL, causal=causal, positions=positions)).double()
    inputs = batch()
    found = model(*inputs)
    for item, sequences in enumerate(zip(*map(rows, inputs), strict=True)):
        want = plain_mult(model, sequences, "steps" if positions else "none")
        torch.testing.assert_close(found[item], want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("left", [True, False])
def test_the_public_padding_sees_every_zero_frame(left):
    """As in the public code, padding is not masked: only steps whose first projected feature is not 0 have a position,
    all keys are attended to, the causal offset is that of the padded sizes, and the last step is T - 1."""
    model = MulT(DIMS, 2, replace(SMALL, kernels=1).public()).double()
    inputs = batch()
    padded = [x.values for x in inputs]
    if left:
        padded = [
            torch.stack([row.roll(len(row) - int(length), 0) for row, length in zip(x.values, x.lengths, strict=True)])
            for x in inputs
        ]
    found = model(*padded)
    assert torch.equal(found, model(*(Inputs(v, x.lengths) for v, x in zip(padded, inputs, strict=True))))
    for item in range(2):
        want = plain_mult(model, [v[item] for v in padded], "nonzero")
        torch.testing.assert_close(found[item], want, rtol=1e-10, atol=1e-12)
    correct = MulT(DIMS, 2, replace(SMALL, kernels=1)).double()
    correct.load_state_dict(model.state_dict())
    assert (correct(*inputs) - found).abs().max() > 1e-3


def test_two_sequences_without_padding_are_the_same_in_both_ways():
    inputs = [torch.randn(3, steps, dim).double() for steps, dim in ((4, 6), (9, 5), (6, 4))]
    model, public = (MulT(DIMS, 1, config).double() for config in (SMALL, SMALL.public()))
    public.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(*inputs), public(*inputs))


@pytest.mark.parametrize(("dim", "heads"), [(6, 3), (7, 1), (40, 10)])
def test_a_stack_is_the_plain_one(dim, heads):
    stack = TransformerStack(dim, heads, 2).double()
    target, source = draw([3, 6], dim), draw([8, 2], dim)
    for causal in (False, True):
        for other in (source, None):
            found = stack(target, other, causal)
            for item in range(2):
                own, far = rows(target)[item], None if other is None else rows(other)[item]
                want = plain_stack(stack, own, far, causal, "steps")
                torch.testing.assert_close(found[item, : len(own)], want, rtol=1e-10, atol=1e-12)


def test_positions_are_sines_then_cosines_of_the_step_from_one():
    for dim in (4, 7, 10):
        want = torch.stack([position(t + 1, dim) for t in range(5)])
        torch.testing.assert_close(sinusoids(5, dim, want), want)
    assert sinusoids(3, 1, torch.zeros(1)).tolist() == [[0.0]] * 3
    assert sinusoids(3, 3, torch.zeros(1)).isfinite().all()


def test_items_with_different_offsets_keep_their_own():
    target, source = draw([3, 5, 2, 1], 1), draw([8, 6, 2, 4], 1)
    visible = Visible.between(target, source, causal=True)
    shift = torch.zeros(4, dtype=torch.int64) if visible.shift is None else visible.shift
    for own, other, moved in zip(target.lengths.tolist(), source.lengths.tolist(), shift.tolist(), strict=True):
        for i in range(own):
            for j in range(other):
                assert (j + moved - i <= visible.offset) == (j - i <= abs(other - own))
    assert Visible.between(target, target, causal=True).shift is None
    assert Visible.between(Inputs(torch.zeros(2, 4, 1)), Inputs(torch.zeros(2, 9, 1)), True) == Visible(offset=5)


def test_padding_is_never_read():
    assert_padding_is_never_read(MulT(DIMS, 2, SMALL).double(), *batch())


def test_an_item_does_not_depend_on_its_batch():
    assert_items_are_independent(MulT(DIMS, 2, SMALL).double(), *batch())


def test_gradients_reach_every_parameter_and_input():
    model, inputs = MulT(DIMS, 2, SMALL).double(), batch()
    for x in inputs:
        x.values.requires_grad_()
    assert_gradients_reach_everything(model, model(*inputs))
    for x in inputs:
        for item, length in enumerate(x.lengths):
            assert (x.values.grad[item, :length].abs().amax(1) > 0).all() or length < 3
            assert (x.values.grad[item, length:] == 0).all()


def test_gradients_are_those_of_the_equations():
    model, inputs = MulT(DIMS, 2, replace(SMALL, layers=1)).double(), batch()
    found = torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()))
    want = sum(plain_mult(model, s, "steps").square().sum() for s in zip(*map(rows, inputs), strict=True))
    for f, w in zip(found, torch.autograd.grad(want, list(model.parameters())), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-10)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_the_public_model():
    assert count(MulT((300, 5, 20))) == 1_071_211
    assert count(MulT((300, 74, 35))) == 1_073_731
    larger = MulTConfig(dim=40, heads=8, layers=4, kernels=(1, 3, 3))
    assert count(MulT((300, 5, 20), config=larger)) == 1_539_241
    assert count(MulT((300, 74, 35), config=larger)) == 1_549_321


def test_initial_weights_are_xavier_uniform_and_biases_zero():
    layer = TransformerStack(32, 4, 1).layers[0]
    for weight in (layer.in_proj_weight, layer.expand.weight, layer.out_proj.weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * bound < weight.abs().max() <= bound
    assert all((b == 0).all() for b in (layer.in_proj_bias, layer.out_proj.bias, layer.expand.bias))


@pytest.mark.parametrize("name", ["input", "attention", "relu", "embed", "residual", "output"])
def test_every_dropout_acts_in_training_alone(name):
    rate = (0.5,) if name in ("input", "attention") else 0.5
    model = MulT(DIMS, 2, replace(SMALL, **{f"{name}_dropout": rate})).double()
    inputs = batch()
    assert not torch.equal(model(*inputs), model(*inputs))
    model.eval()
    torch.testing.assert_close(model(*inputs), model(*inputs), rtol=0, atol=0)
    still = MulT(DIMS, 2, SMALL).double()
    still.load_state_dict(model.state_dict())
    torch.testing.assert_close(still(*inputs), model(*inputs))


def test_dropout_of_keys_and_values_has_two_masks():
    """As in the public code, keys and values come from one sequence but have different dropout masks."""
    stack = TransformerStack(4, 1, 1, Dropouts(embed=0.5)).train()
    seen = []
    stack.layers[0].project = lambda target, keys, values: seen.append((target, keys, values)) or _stop()
    with pytest.raises(StopIteration):
        stack(Inputs(torch.ones(1, 50, 4)), Inputs(torch.ones(1, 50, 4)))
    target, keys, values = ((t == 0) for t in seen[0])
    assert not torch.equal(keys, values) and not torch.equal(target, keys)


def _stop():
    raise StopIteration


@needs_utd_mhad
def test_two_real_modalities_of_different_lengths():
    inputs = utd_batch()
    model = MulT((60, 6), 27, MulTConfig(dim=8, heads=2, layers=1, kernels=(1, 3)).without_dropout())
    assert model(*inputs).shape == (4, 27)
    assert model.features(*inputs).shape == (4, 16) == (4, model.features.out_dim)
    assert_gradients_reach_everything(model, model(*inputs))
    doubled = [Inputs(x.values.double(), x.lengths) for x in inputs]
    assert_items_are_independent(model.double(), *doubled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "heads": 4}, "heads must divide dim 30, got 4"),
        ({"padding": "left"}, "padding must be lengths or public, got 'left'"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kernels": (1, 0, 1)}, "kernels must be at least 1"),
        ({"relu_dropout": 1.0}, "relu_dropout must be a dropout rate, at least 0 and below 1, got 1.0"),
        ({"attention_dropout": (0.1, -1.0)}, "attention_dropout must be a dropout rate"),
    ],
)
def test_a_bad_configuration_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MulTConfig(**options)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match="dims must be two or more"):
        CrossModal((5,))
    with pytest.raises(ValueError, match="kernels must be one per modality, 2"):
        CrossModal((5, 6), replace(SMALL, kernels=(1, 2, 3)))
    model = MulT(DIMS, 2, SMALL)
    with pytest.raises(ValueError, match="inputs must be one per modality, 3, got 2"):
        model(torch.zeros(1, 2, 6), torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match=r"inputs\[1\] must have 5 features per step, got 6"):
        model(torch.zeros(1, 2, 6), torch.zeros(1, 2, 6), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="positions must be"):
        TransformerStack(4, 1, 1, positions="learned")

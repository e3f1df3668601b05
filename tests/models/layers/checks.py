"""Shared by the tests of all layers: step-by-step formulas for one sequence, and properties that every layer has."""

from __future__ import annotations

import math

import pytest
import torch

from models.data import DataConfig, Inputs, load
from models.data.sources.utd_mhad import default_path

needs_utd_mhad = pytest.mark.skipif(not default_path().is_file(), reason="utd_mhad.npz is absent: set MI_KERNELS_DATA")


def draw(lengths, dim, steps=None, fill=0.0, dtype=torch.float64):
    """A padded batch of random sequences; the padding has the value ``fill``."""
    lengths = torch.as_tensor(lengths)
    steps = int(lengths.max()) if steps is None else steps
    valid = torch.arange(steps) < lengths[:, None]
    values = torch.randn(len(lengths), steps, dim, dtype=dtype)
    return Inputs(values.masked_fill(~valid[..., None], fill), lengths)


def refilled(x, fill, more=0):
    """The same sequences with padding of value ``fill`` and ``more`` further steps of padding."""
    values = torch.nn.functional.pad(x.values.detach(), (0, 0, 0, more))
    valid = torch.arange(values.shape[1]) < x.lengths[:, None]
    return Inputs(values.masked_fill(~valid[..., None], fill), x.lengths)


def rows(x):
    """The sequences [T, D] without their padding."""
    return [values[:length] for values, length in zip(x.values, x.lengths, strict=True)]


def utd_batch(size=4, steps=40):
    """Real skeleton and inertial sequences, cut short to keep tests fast; lengths differ between items and
    modalities."""
    data = load(DataConfig("utd-mhad", ("skeleton", "inertial")))
    batch = data.batch(data.rows("train")[:: len(data.rows("train")) // size][:size])
    inputs = enumerate(batch.inputs.values())
    cut = [Inputs(x.values[:, : steps + 9 * m], x.lengths.clamp(max=steps + 9 * m)) for m, x in inputs]
    cut = [Inputs(x.values, x.lengths - torch.arange(size) * (3 + m)) for m, x in enumerate(cut)]
    return [refilled(x, 0.0) for x in cut]


def aligned(inputs):
    """All modalities, cut to the shortest number of steps and the shortest length of each item."""
    steps = min(x.values.shape[1] for x in inputs)
    lengths = torch.stack([x.lengths for x in inputs]).amin(0)
    return [refilled(Inputs(x.values[:, :steps], lengths), 0.0) for x in inputs]


def gradients(module, output):
    module.zero_grad()
    output.square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_padding_is_never_read(module, *inputs, **options):
    """Asserts that neither the values in the padding nor its amount change the output or a gradient."""
    module.eval()
    want = module(*inputs, **options)
    want_gradients = gradients(module, want)
    for fill, more in ((math.nan, 0), (1e30, 0), (math.inf, 0), (0.0, 3)):
        others = [refilled(x, fill, more) for x in inputs]
        found = module(*others, **options)
        if found.dim() == 3:
            found = found[:, : want.shape[1]]
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
        for name, gradient in gradients(module, found).items():
            torch.testing.assert_close(gradient, want_gradients[name], rtol=1e-7, atol=1e-10, msg=name)


def assert_padding_tokens_are_never_read(net, batch):
    """Asserts that neither the tokens in the padding nor their number change a text's features, and that a text alone
    has the same features as in the batch. ``batch(fill=)`` returns the same texts, padded with that token."""
    x = batch()
    want = net(x)
    torch.testing.assert_close(net(batch(fill=7)), want)
    torch.testing.assert_close(net(Inputs(torch.nn.functional.pad(x.values, (0, 3), value=4), x.lengths)), want)
    for row, length in enumerate(x.lengths.tolist()):
        torch.testing.assert_close(net(Inputs(x.values[row : row + 1, :length]))[0], want[row])


def assert_items_are_independent(module, *inputs):
    """Asserts that every item alone, without padding, gives the same output as in the batch."""
    module.eval()
    together = module(*inputs)
    for item in range(len(together)):
        alone = module(*(x.values[item : item + 1, : x.lengths[item]] for x in inputs))[0]
        found = together[item][: len(alone)] if together.dim() == 3 else together[item]
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-12)


def assert_gradients_reach_everything(module, output, none=()):
    for name, gradient in gradients(module, output).items():
        if name in none:
            continue
        assert gradient is not None and gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


def sigmoid(z):
    return 1 / (1 + (-z).exp())


def linear(layer, x):
    """x W^T + b, one output at a time."""
    out = torch.stack([(x * row).sum(-1) for row in layer.weight], -1)
    return out if layer.bias is None else out + layer.bias


def lstm(cell, x):
    """h and c [T, H] of one sequence [T, D], gate by gate."""
    hidden = cell.weight_hh.shape[1]
    h = c = x.new_zeros(hidden)
    states, cells = [], []
    for step in x:
        z = cell.weight_ih @ step + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
        i, f, g, o = z[:hidden], z[hidden : 2 * hidden], z[2 * hidden : 3 * hidden], z[3 * hidden :]
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        states.append(h)
        cells.append(c)
    return torch.stack(states), torch.stack(cells)


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def softmax(z):
    return (z - z.max()).exp() / (z - z.max()).exp().sum()


def sparsemax(z):
    """The Euclidean projection onto the simplex, by trying every size of the support."""
    ordered = z.sort(descending=True).values
    size = max(k for k in range(1, len(z) + 1) if 1 + k * ordered[k - 1] > ordered[:k].sum())
    return (z - (ordered[:size].sum() - 1) / size).clamp(min=0)

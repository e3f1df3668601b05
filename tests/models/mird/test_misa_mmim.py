"""MISA and MMIM: losses against plain formulas, phases, and padding."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from models.baselines.misa import MISA, MISASettings, moment_distance, overlap
from models.baselines.mmim import MMIM, MMIMSettings
from models.batch import Inputs, Target
from models.data import Dataset, Modality
from models.layers.utterance import BiLSTM

MODELS = {
    "misa": lambda data: MISA(MISASettings(hidden=3, dim=4, embedding=5, dropout=0.0), data),
    "mmim": lambda data: MMIM(MMIMSettings(hidden=3, dim=4, fused=6, embedding=5, dropout=0.0), data),
}


def made(rows=24):
    generator = torch.Generator().manual_seed(0)
    ends = [torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(1, 6, (rows,), generator=generator)]).cumsum(0)
            for _ in range(2)]  # fmt: skip
    modalities = (
        Modality("words", torch.randint(1, 9, (int(ends[0][-1]),), generator=generator), ends[0], vocabulary=9),
        Modality("frames", torch.randn(int(ends[1][-1]), 3, generator=generator), ends[1]),
        Modality("vector", torch.randn(rows, 4, generator=generator)),
    )
    return Dataset(
        "made", modalities, torch.randn(rows, generator=generator), Target.regression(), torch.arange(rows) % 4 // 3
    )


def make(name):
    torch.manual_seed(0)
    data = made()
    return MODELS[name](data).double().eval(), data.batch(data.rows("train")).to(torch.float64)


@pytest.mark.parametrize("layers", [1, 2])
def test_both_directions_are_torchs(layers):
    torch.manual_seed(0)
    net = BiLSTM(3, 4, layers).double()
    lengths = torch.tensor([5, 2, 3])
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    found = net(Inputs(x, lengths))
    for row, length in enumerate(lengths.tolist()):
        h, ends = x[row : row + 1, :length], []
        for depth in range(layers):
            plain = torch.nn.LSTM(h.shape[2], 4, batch_first=True, bidirectional=True).double()
            for suffix, mine in (("", net.forwards[depth]), ("_reverse", net.backwards[depth])):
                for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    getattr(plain, f"{kind}_l0{suffix}").data.copy_(getattr(mine, kind))
            h, (last, _) = plain(h)
            ends += [last[0, 0], last[1, 0]]
            if depth + 1 < layers:
                h = net.norms[depth](h)
        torch.testing.assert_close(found[row], torch.cat(ends))


def test_moment_distance_and_overlap_are_their_formulas():
    torch.manual_seed(0)
    a, b = torch.rand(2, 9, 4, dtype=torch.float64)
    want = (a.mean(0) - b.mean(0)).norm()
    for k in range(2, 6):
        want = want + (((a - a.mean(0)) ** k).mean(0) - ((b - b.mean(0)) ** k).mean(0)).norm()
    torch.testing.assert_close(moment_distance(a, b), want)
    p, q = (F.normalize(x - x.mean(0), dim=1) for x in (a, b))
    torch.testing.assert_close(overlap(a, b), (p.T @ q).square().mean(), rtol=1e-4, atol=0)
    same = a.clone().requires_grad_()
    moment_distance(same, same.detach()).backward()
    assert same.grad.isfinite().all()


def test_misa_is_its_formula():
    net, x = make("misa")
    h, private, shared = net.parts(x.inputs)
    terms = net.loss(x).terms
    similar = [moment_distance(a, b) for a, b in combinations(shared, 2)]
    torch.testing.assert_close(terms["similarity"], sum(similar) / 3)
    apart = [overlap(private[m], shared[m]) for m in range(3)] + [overlap(a, b) for a, b in combinations(private, 2)]
    torch.testing.assert_close(terms["difference"], sum(apart))
    errors = [(net.rebuild[m](private[m] + shared[m]) - h[m]).square().mean() for m in range(3)]
    torch.testing.assert_close(terms["reconstruction"], sum(errors) / 3)
    want = terms["l1"] + terms["similarity"] + 0.3 * terms["difference"] + terms["reconstruction"]
    torch.testing.assert_close(net.loss(x).total, want)


def test_mmim_is_its_formula():
    net, x = make("mmim")
    codes = net.encoded(x)
    fused = net.fusion(torch.cat(codes, 1))
    found = net.loss(x)
    contrast = 0.0
    for z, predictor in zip(codes, net.predictors, strict=True):
        scores = F.normalize(z, dim=1) @ F.normalize(predictor(fused), dim=1).T
        contrast = contrast + F.cross_entropy(scores, torch.arange(x.size))
    torch.testing.assert_close(found.terms["contrast"], contrast)
    want = found.terms["l1"] + 0.1 * found.terms["contrast"] - 0.1 * found.terms["bound"]
    torch.testing.assert_close(found.total, want)
    main, bound = net.phases()
    assert {id(p) for p in bound.parameters} == {id(p) for p in net.q.parameters()}
    assert len(main.parameters) + len(bound.parameters) == len(list(net.parameters()))
    before = bound.loss(bound.fixed(x)).total
    optimizer = torch.optim.Adam(bound.parameters, lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        bound.loss(bound.fixed(x)).total.backward()
        optimizer.step()
    assert bound.loss(bound.fixed(x)).total < before


@pytest.mark.parametrize("name", MODELS)
def test_padding_is_never_read_and_gradients_reach_everything(name):
    net, x = make(name)
    want = net.loss(x).total
    frames = x.inputs["frames"]
    beyond = torch.arange(frames.values.shape[1] + 2) >= frames.lengths[:, None]
    values = F.pad(frames.values, (0, 0, 0, 2)).masked_fill(beyond[..., None], 1e3)
    other = x._replace(inputs={**x.inputs, "frames": Inputs(values, frames.lengths)})
    torch.testing.assert_close(net.loss(other).total, want)
    want.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_settings_are_checked():
    with pytest.raises(ValueError, match="difference must not be negative"):
        replace(MISASettings(), difference=-1.0)
    with pytest.raises(ValueError, match="contrast must not be negative"):
        replace(MMIMSettings(), contrast=-1.0)


def test_mmim_takes_16_bit_codes_and_two_modalities():
    torch.manual_seed(0)
    data = made()
    model = MODELS["mmim"](data).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(data.batch(data.rows("train")))
    assert loss.total.isfinite() and loss.terms["bound"].isfinite()
    with pytest.raises(ValueError, match="mmim needs two modalities or more, the data has words"):
        MODELS["mmim"](data.choose(("words",)))

"""mi_kernels.compat.info_nce against fp64 formulas and, where installed, info-nce-pytorch."""

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat.info_nce import InfoNCE, info_nce
from tests.compat.originals import draw, largest_saved, original, parameters, same


def inputs(negatives):
    shape = {None: None, "unpaired": (7, 5), "paired": (9, 7, 5)}[negatives]
    return draw(9, 5), draw(9, 5, seed=1), None if shape is None else draw(*shape, seed=2)


def formula(query, key, negatives, temperature, reduction, mode):
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    if negatives is None:
        return F.cross_entropy(query @ key.T / temperature, torch.arange(len(query)), reduction=reduction)
    negatives = F.normalize(negatives, dim=-1)
    rest = query @ negatives.T if mode == "unpaired" else torch.einsum("nd,nmd->nm", query, negatives)
    logits = torch.cat([(query * key).sum(1, keepdim=True), rest], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long), reduction=reduction)


def test_signatures():
    assert parameters(info_nce) == [
        "query",
        "positive_key",
        "negative_keys=None",
        "temperature=0.1",
        "reduction='mean'",
        "negative_mode='unpaired'",
    ]
    assert parameters(InfoNCE) == ["temperature=0.1", "reduction='mean'", "negative_mode='unpaired'"]
    assert parameters(InfoNCE.forward) == ["query", "positive_key", "negative_keys=None"]
    assert InfoNCE().state_dict() == {}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_equals(reduction, negatives, oracle):
    query, key, rest = inputs(negatives)
    mode = negatives or "unpaired"
    want_of = formula if oracle == "formula" else original("info_nce").info_nce
    want = want_of(query, key, rest, 0.2, reduction, mode)
    got = InfoNCE(0.2, reduction, mode)(query, key, rest)
    assert got.shape == want.shape
    weights = torch.linspace(1, 2, want.numel(), dtype=torch.float64).reshape(want.shape)
    same((got * weights).sum(), (want * weights).sum(), [t for t in (query, key, rest) if t is not None])


def test_no_scores_are_stored():
    query, key = draw(256, 4), draw(256, 4, seed=1)
    assert largest_saved(lambda: info_nce(query, key)) < 256 * 16


@pytest.mark.parametrize("temperature", [0, 0.0, -0.1, float("nan"), float("inf")])
def test_temperature_that_is_not_positive_raises(temperature):
    with pytest.raises(ValueError, match="temperature"):
        info_nce(draw(3, 2), draw(3, 2), temperature=temperature)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"negative_mode": "pairs"}, "negative_mode"),
        ({"reduction": "average"}, "reduction"),
        ({"query": draw(3)}, "query"),
        ({"query": draw(0, 2), "positive_key": draw(0, 2)}, "query"),
        ({"positive_key": draw(3, 2, 1)}, "positive_key"),
        ({"positive_key": draw(4, 2)}, "positive_key"),
        ({"positive_key": draw(3, 3)}, "positive_key"),
        ({"negative_keys": draw(3, 4, 2)}, "negative_keys"),
        ({"negative_keys": draw(4, 3)}, "negative_keys"),
        ({"negative_keys": draw(4, 2), "negative_mode": "paired"}, "negative_keys"),
        ({"negative_keys": draw(4, 4, 2), "negative_mode": "paired"}, "negative_keys"),
    ],
)
def test_bad_input_is_named(change, name):
    with pytest.raises(ValueError, match=name):
        info_nce(**({"query": draw(3, 2), "positive_key": draw(3, 2)} | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_inputs_give_an_fp32_loss(dtype):
    query, key = draw(64, 8, dtype=dtype), draw(64, 8, seed=1, dtype=dtype)
    loss = info_nce(query, key, temperature=0.05)
    assert loss.dtype == torch.float32
    want = formula(query.double(), key.double(), None, 0.05, "mean", "unpaired")
    torch.testing.assert_close(loss.double(), want, rtol=2e-2, atol=0)

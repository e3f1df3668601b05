"""mi_kernels.compat.supcontrast against the formula of Khosla et al. 2020 in fp64."""

import pytest
import torch

from mi_kernels.compat import factorcl, supcontrast
from mi_kernels.compat.supcontrast import SupConLoss
from tests.compat.originals import draw, largest_saved, parameters, same

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3])


def formula(features, mask, temperature=0.07, mode="all", base=0.07):
    """The loss, anchor by anchor. An anchor without positives adds 0 but counts in the mean."""
    items, views = features.shape[:2]
    features = features.flatten(2)
    anchors = [(i, v) for v in range(views if mode == "all" else 1) for i in range(items)]
    total = 0
    for i, v in anchors:
        score = {
            (j, w): features[i, v] @ features[j, w] / temperature
            for j in range(items)
            for w in range(views)
            if (j, w) != (i, v)
        }
        weight = {pair: float(mask[i, pair[0]]) for pair in score}
        if sum(weight.values()) > 0:
            log_sum = torch.stack(list(score.values())).logsumexp(0)
            positive = sum(weight[pair] * (score[pair] - log_sum) for pair in score) / sum(weight.values())
            total = total - temperature / base * positive
    return total / len(anchors)


def test_signature():
    assert parameters(SupConLoss) == ["temperature=0.07", "contrast_mode='all'", "base_temperature=0.07"]
    assert parameters(SupConLoss.forward) == ["features", "labels=None", "mask=None"]
    assert SupConLoss().state_dict() == {}
    assert factorcl.SupConLoss is SupConLoss


@pytest.fixture(params=["scores held", "operator"])
def route(request, monkeypatch):
    if request.param == "operator":
        monkeypatch.setattr(supcontrast, "_HELD", 0)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("given", ["labels", "column", "mask", "asymmetric", "weights", "nothing"])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_equals_the_formula(mode, given, views):
    features = draw(7, views, 4, unit=True)
    mask = (LABELS[:, None] == LABELS).double()
    if given == "asymmetric":
        mask = (torch.rand(7, 7) < 0.4).double()
    elif given == "weights":
        mask = torch.rand(7, 7, dtype=torch.float64)
    elif given == "nothing":
        mask = torch.eye(7)
    arguments = {"nothing": {}, "labels": {"labels": LABELS}, "column": {"labels": LABELS[:, None]}}
    loss = SupConLoss(0.1, mode, 0.07)(features, **arguments.get(given, {"mask": mask}))
    want = formula(features, mask, 0.1, mode)
    if given == "nothing" and views == 1:
        assert loss == 0
    else:
        same(loss, want, [features])


def test_more_dimensions_are_flattened():
    features = draw(7, 2, 3, 2)
    want = SupConLoss()(features.flatten(2), LABELS)
    same(SupConLoss()(features, LABELS), want, [features])


@pytest.mark.usefixtures("route")
def test_features_that_are_not_normalised_give_a_finite_loss():
    features = 30 * draw(7, 2, 16)
    loss = SupConLoss()(features, LABELS)
    assert loss.isfinite() and torch.autograd.grad(loss, features, retain_graph=True)[0].isfinite().all()
    same(loss, formula(features, (LABELS[:, None] == LABELS).double()), [features])
    assert SupConLoss()(features.float(), LABELS).isfinite()


@pytest.mark.usefixtures("route")
def test_anchors_without_positives_add_zero_and_count():
    features = draw(7, 1, 4, unit=True)
    lonely = torch.arange(7)
    loss = SupConLoss()(features, lonely)
    assert loss == 0 and (torch.autograd.grad(loss, features)[0] == 0).all()
    same(SupConLoss()(features, LABELS), formula(features, (LABELS[:, None] == LABELS).double()), [features])


def test_a_learnable_mask_gets_the_gradient_of_the_formula():
    features, mask = draw(5, 2, 3, unit=True), draw(5, 5, seed=1).detach().abs().requires_grad_()
    loss = SupConLoss()(features, mask=mask)
    scores = features.transpose(0, 1).flatten(0, 1) @ features.transpose(0, 1).flatten(0, 1).T / 0.07
    own = torch.eye(10, dtype=torch.bool)
    weight = mask.repeat(2, 2).masked_fill(own, 0)
    log_p = (scores - scores.masked_fill(own, -torch.inf).logsumexp(1, keepdim=True)).masked_fill(own, 0)
    same(loss, -((weight * log_p).sum(1) / weight.sum(1)).mean(), [features, mask])


@pytest.mark.parametrize("given", ["labels", "mask"])
def test_no_scores_are_stored(given):
    features = draw(256, 2, 4, unit=True)
    labels = torch.arange(256) % 17
    mask = labels[:, None] == labels
    arguments = {"labels": labels} if given == "labels" else {"mask": mask}
    assert largest_saved(lambda: SupConLoss()(features, **arguments)) <= 256 * 256  # the mask, but no scores


def test_bad_input_is_named():
    features = draw(7, 2, 4)
    for arguments, name in (
        ({"labels": LABELS, "mask": torch.eye(7)}, "labels and mask"),
        ({"labels": LABELS[:3]}, "labels"),
        ({"mask": torch.eye(3)}, "mask"),
    ):
        with pytest.raises(ValueError, match=name):
            SupConLoss()(features, **arguments)
    with pytest.raises(ValueError, match="features"):
        SupConLoss()(features[:, 0])
    with pytest.raises(ValueError, match="contrast_mode"):
        SupConLoss(contrast_mode="two")(features)
    with pytest.raises(ValueError, match="temperature"):
        SupConLoss(0)(features)

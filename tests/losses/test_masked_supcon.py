"""mk.sup_con with a mask of positives: several labels per item, weights, asymmetric masks."""

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mk
from mi_kernels.losses import supcon

B, V, D = 9, 2, 5


def features(dtype=torch.float64, views=V, seed=0):
    draw = torch.randn(B, views, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(draw, dim=-1).to(dtype)


def masks() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    tags = torch.rand(B, 4, generator=draw) < 0.4
    tags[3] = False  # an item without tags has no positive, not even its own other view
    shared = (tags.double() @ tags.double().mT) > 0
    weights = torch.rand(B, B, generator=draw, dtype=torch.float64)
    weights[:, 4] = 0
    return {
        "several labels": shared,
        "weights": weights,
        "tiny weights": weights * 1e-12,
        "a large own weight": weights + 1e9 * torch.eye(B),
        "asymmetric": weights.tril() > 0.3,
    }


def formula(x: torch.Tensor, mask: torch.Tensor, mode: str, temperature: float) -> torch.Tensor:
    """L_out of Khosla et al. 2020 with a weighted mean over the positives, anchor by anchor."""
    views, rows = x.shape[1], []
    for v in range(views if mode == "all" else 1):
        for i in range(len(x)):
            others = [(j, w) for j in range(len(x)) for w in range(views) if (j, w) != (i, v)]
            log_p = (torch.stack([x[j, w] for j, w in others]) @ x[i, v] / temperature).log_softmax(0)
            weight = torch.stack([mask[i, j].to(x.dtype) for j, _ in others])
            if weight.sum() > 0:
                rows.append(-(weight * log_p).sum() / weight.sum())
    return torch.stack(rows).mean() * temperature / 0.07


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("name", list(masks()))
def test_is_the_weighted_formula(name, mode, views, monkeypatch) -> None:
    monkeypatch.setattr(supcon, "_BLOCK", 20)  # several blocks of rows
    x, mask = features(views=views).requires_grad_(), masks()[name]
    found = mk.sup_con(x, mask=mask, temperature=0.3, contrast_mode=mode)
    expected = formula(x, mask, mode, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pair = [torch.autograd.grad(t, x)[0] for t in (found, expected)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_types_are_the_formula_of_what_they_hold(dtype) -> None:
    x, mask = features(dtype).requires_grad_(), masks()["weights"].to(dtype)
    wide = x.detach().double().requires_grad_()
    found, expected = mk.sup_con(x, mask=mask), formula(wide, mask, "all", 0.07)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    g, reference = torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, wide)[0]
    eps = torch.finfo(dtype).eps
    assert (g.double() - reference).norm() <= (2 * eps + 1e-5) * reference.norm()


def test_a_mask_of_classes_is_labels() -> None:
    x, labels = features(), torch.arange(B) % 3
    expected = mk.sup_con(x, labels)
    torch.testing.assert_close(mk.sup_con(x, mask=labels[:, None] == labels), expected)
    torch.testing.assert_close(mk.sup_con(x, mask=torch.eye(B)), mk.sup_con(x))


def test_second_derivatives_and_transforms() -> None:
    mask = masks()["weights"]
    x = features().requires_grad_()
    loss = lambda t: mk.sup_con(t, mask=mask, temperature=0.5)  # noqa: E731
    assert torch.autograd.gradgradcheck(loss, x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), torch.autograd.grad(loss(x), x)[0])
    several = torch.stack([features(), features(seed=3)])
    torch.testing.assert_close(torch.vmap(loss)(several), torch.stack([loss(t) for t in several]))


def test_an_empty_mask_is_zero_with_zero_gradient() -> None:
    x = features().requires_grad_()
    loss = mk.sup_con(x, mask=torch.zeros(B, B, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss == 0 and (gradient == 0).all()


def test_no_copy_of_the_mask_is_kept_or_made() -> None:
    items, kept = 300, []
    x, mask = torch.randn(items, 2, 8, requires_grad=True), torch.rand(items, items) < 0.1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        mk.sup_con(x, mask=mask)
    square = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= items * items}
    assert square == {mask.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("given", "message"), [
    ({"labels": torch.arange(B), "mask": torch.eye(B)}, "labels and mask"),
    ({"mask": torch.eye(B, dtype=torch.long)}, "mask must be boolean or hold floating-point"),
    ({"mask": torch.ones(B, B + 1)}, r"mask must have shape \(9, 9\)"),
    ({"mask": -torch.eye(B)}, "mask must hold finite weights of at least 0"),
    ({"mask": torch.full((B, B), torch.nan)}, "mask must hold finite weights"),
    ({"mask": torch.full((B, B), torch.inf)}, "mask must hold finite weights"),
    ({"labels": torch.rand(B)}, "labels must be of an integer type.*got torch.float32"),
    ({"labels": torch.ones(B, dtype=torch.bool)}, "labels must be of an integer type.*got torch.bool"),
])
def test_what_is_refused(given, message) -> None:
    with pytest.raises(ValueError, match=message):
        mk.sup_con(features(), **given)

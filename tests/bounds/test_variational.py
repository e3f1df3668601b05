"""Bounds whose negatives are the off-diagonal pairs: formulas on materialised scores, gradients, baselines, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mi_kernels.bounds import MINE, NWJ, SMILE, TUBA, InterpolatedBound, WassersteinDependency
from mi_kernels.critics import BilinearCritic, ConcatCritic, DotCritic
from tests.bounds.formulas import BOUNDS, CRITICS, interpolated, pair, tuba

CASES = [(name, lead) for name in CRITICS for lead in ((), (2, 2)) if name != "grouped"] + [("grouped", (3,))]


def gradients(value: Tensor, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((value * weights.to(value)).sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("critic_name", "lead"), CASES)
@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_and_their_gradients_are_those_of_materialised_scores(
    name: str, critic_name: str, lead: tuple[int, ...], dtype: torch.dtype
) -> None:
    build, value, objective = BOUNDS[name]
    critic = CRITICS[critic_name]().to(dtype)
    exact_critic = copy.deepcopy(critic).double()
    x, y = (t.requires_grad_() for t in pair(*lead, dtype=dtype))
    exact_x, exact_y = (t.detach().double().requires_grad_() for t in (x, y))
    bound = build(critic)
    weights = torch.randn(lead, dtype=torch.float64)
    tolerance = dict(rtol=1e-9, atol=1e-11) if dtype == torch.float64 else dict(rtol=2e-5, atol=4e-6)

    exact_inputs = [exact_x, exact_y, *exact_critic.parameters()]
    wants = gradients(objective(exact_critic(exact_x, exact_y)), weights, exact_inputs)
    with torch.no_grad():
        scores = exact_critic(exact_x, exact_y)
    for got, want, sign in (
        (bound(x, y), value(scores), 1),
        (bound.learning_loss(x, y), -objective(scores), -1),
    ):
        assert got.shape == lead and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **tolerance)
        for g, w in zip(gradients(got, weights, [x, y, *critic.parameters()]), wants, strict=True):
            torch.testing.assert_close(sign * g.double(), w, **tolerance)


@pytest.mark.parametrize("name", BOUNDS)
def test_short_inputs_and_autocast_give_fp32_values_near_the_exact_ones(name: str) -> None:
    critic, (x, y) = CRITICS["separable"](), pair(batch=32, dtype=torch.float32)
    exact = BOUNDS[name][1](copy.deepcopy(critic).double()(x.double(), y.double()))
    bound = BOUNDS[name][0](critic)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bound(x, y)
    short = BOUNDS[name][0](critic.bfloat16())(x.bfloat16(), y.bfloat16())
    for value in (cast, short):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("build", [TUBA, InterpolatedBound])
@pytest.mark.parametrize("shape", ["rows", "column", "number"])
def test_a_baseline_is_subtracted_per_sample_of_its_anchor(build, shape: str) -> None:
    net = nn.Linear(4, 1).double()
    baseline = {
        "rows": lambda t: net(t).squeeze(-1),
        "column": net,
        "number": lambda t: net.bias[0],
    }[shape]
    critic, (x, y) = CRITICS["bilinear"]().double(), pair(2)
    for anchor, t in (("y", y), ("x", x)):
        scores = critic(x, y) if anchor == "y" else critic(x, y).mT
        log_a = net.bias[0].expand(2, 7) if shape == "number" else net(t).squeeze(-1)
        shifted = scores - log_a[:, None, :]
        want = tuba(shifted) if build is TUBA else interpolated(shifted)
        got = build(critic, baseline=baseline, anchor=anchor)(x, y)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), net.bias)[0] for v in (got, want)))


def test_a_baseline_module_is_part_of_the_bound() -> None:
    assert len(list(TUBA(DotCritic(), baseline=nn.Linear(4, 1)).parameters())) == 2
    with pytest.raises(ValueError, match="baseline must return"):
        TUBA(DotCritic(), baseline=lambda t: t)(*pair())


@pytest.mark.parametrize("name", BOUNDS)
def test_permuting_the_batch_changes_nothing(name: str) -> None:
    bound = BOUNDS[name][0](CRITICS["concat"]().double()).eval()
    (x, y), order = pair(batch=11), torch.randperm(11)
    torch.testing.assert_close(bound(x[order], y[order]), bound(x, y))
    torch.testing.assert_close(bound.learning_loss(x[order], y[order]), bound.learning_loss(x, y))


@pytest.mark.parametrize("name", [n for n in BOUNDS if not n.endswith(("_x", "_inf"))])
def test_compiles_without_graph_breaks(name: str) -> None:
    module = BOUNDS[name][0](ConcatCritic(4, 4, hidden_dims=(8, 8), memory_budget=512))
    x, y = pair(dtype=torch.float32)
    module(x, y)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), module(x, y))


@pytest.mark.parametrize("name", BOUNDS)
def test_bad_inputs_are_named(name: str) -> None:
    bound = BOUNDS[name][0](BilinearCritic(4, 4).double())
    x, y = pair()
    for bad_x, bad_y, message in [
        (x[:1], y[:1], "x must hold at least 2 samples"),
        (x[:0], y[:0], "x must"),
        (x[:5], y, "y must have the batch dimensions of x"),
        (x, y[0], "y must"),
        (x[:, :3], y, "x must"),
    ]:
        for call in (bound, bound.learning_loss):
            with pytest.raises(ValueError, match=message):
                call(bad_x, bad_y)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MINE(DotCritic(), decay=1.0), "decay must be in"),
        (lambda: SMILE(DotCritic(), clip=0.0), "clip must be positive"),
        (lambda: InterpolatedBound(DotCritic(), alpha=1.5), "alpha must be in"),
        (lambda: InterpolatedBound(DotCritic(), anchor="z"), "anchor must be one of"),
        (lambda: TUBA(DotCritic(), anchor="z"), "anchor must be one of"),
        (lambda: WassersteinDependency(DotCritic(), penalty=-1.0), "penalty must not be negative"),
    ],
)
def test_bad_settings_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_critic_without_statistics_is_refused() -> None:
    with pytest.raises(TypeError, match="critic must have a method statistics"):
        NWJ(nn.Linear(3, 1))  # type: ignore[arg-type]

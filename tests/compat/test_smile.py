"""mi_kernels.compat.smile against formulas in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat import smile
from tests.compat.originals import draw, largest_saved, parameters, same


def parts(f):
    """The diagonal, and the off-diagonal scores as a list."""
    return f.diagonal(), f[~torch.eye(len(f), dtype=torch.bool)]


def nwj(f):
    joint, product = parts(f)
    return joint.mean() - (product - 1).exp().mean()


def dv(f, clip=math.inf):
    joint, product = parts(f)
    return joint.mean() - product.clamp(-clip, clip).exp().mean().log()


def js(f):
    joint, product = parts(f)
    return -F.softplus(-joint).mean() - F.softplus(product).mean()


def infonce(f):
    return math.log(len(f)) + (f.diagonal() - f.logsumexp(1)).mean()


def test_signatures():
    assert parameters(smile.tuba_lower_bound) == ["scores", "log_baseline=None"]
    for name in ("nwj_lower_bound", "infonce_lower_bound"):
        assert parameters(getattr(smile, name)) == ["scores"]
    for name in ("js_fgan_lower_bound", "js_lower_bound", "dv_upper_lower_bound"):
        assert parameters(getattr(smile, name)) == ["f"]
    assert parameters(smile.mine_lower_bound) == ["f", "buffer=None", "momentum=0.9"]
    assert parameters(smile.smile_lower_bound) == ["f", "clip=None"]
    # The original's default is device='cuda'; the drop-in uses the input's device.
    assert parameters(smile.logmeanexp_diag) == ["x", "device=None"]
    assert parameters(smile.logmeanexp_nodiag) == ["x", "dim=None", "device=None"]
    assert parameters(smile.estimate_mutual_information) == [
        "estimator",
        "x",
        "y",
        "critic_fn",
        "baseline_fn=None",
        "alpha_logit=None",
        "**kwargs",
    ]
    critic = ["dim", "hidden_dim", "embed_dim", "layers", "activation", "**extra_kwargs"]
    assert parameters(smile.SeparableCritic) == critic
    assert parameters(smile.ConcatCritic) == [name for name in critic if name != "embed_dim"]
    assert parameters(smile.sample_correlated_gaussian) == ["rho=0.5", "dim=20", "batch_size=128", "cubic=None"]
    assert parameters(smile.rho_to_mi) == ["dim", "rho"]
    assert parameters(smile.mi_to_rho) == ["dim", "mi"]
    assert parameters(smile.mi_schedule) == ["n_iter"]


def test_bounds_with_their_own_gradient():
    f = 3 * draw(9, 9).detach().requires_grad_()
    f = f.detach().requires_grad_()
    baseline = draw(9, seed=1)
    same(smile.nwj_lower_bound(f), nwj(f), [f])
    same(smile.dv_upper_lower_bound(f), dv(f), [f])
    same(smile.infonce_lower_bound(f), infonce(f), [f])
    same(smile.js_fgan_lower_bound(f), js(f), [f])
    shifted = f - baseline[:, None]
    want = 1 + shifted.diagonal().mean() - parts(shifted)[1].exp().mean()
    same(smile.tuba_lower_bound(f, baseline), want, [f, baseline])
    same(smile.logmeanexp_diag(f), f.diagonal().exp().mean().log(), [f])
    same(smile.logmeanexp_nodiag(f), parts(f)[1].exp().mean().log(), [f])
    rows = parts(f)[1].view(9, 8).exp().mean(1).log()
    for dim in (1, (1,)):
        same(smile.logmeanexp_nodiag(f, dim=dim).sum(), rows.sum(), [f])


@pytest.mark.parametrize("clip", [None, 1.0, 5.0])
def test_js_and_smile_have_the_gradient_of_js(clip):
    f = (3 * draw(9, 9)).detach().requires_grad_()
    for got, value in (
        (smile.smile_lower_bound(f, clip), dv(f, clip or math.inf)),
        (smile.js_lower_bound(f), nwj(f)),
    ):
        torch.testing.assert_close(got, value)
        torch.testing.assert_close(torch.autograd.grad(got, f), torch.autograd.grad(js(f), f))


def test_mine_has_dvs_value_and_the_running_means_gradient():
    f = (3 * draw(9, 9)).detach().requires_grad_()
    buffer = torch.tensor(2.5, dtype=torch.float64)
    got, update = smile.mine_lower_bound(f, buffer, 0.9)
    mean = parts(f)[1].exp().mean()
    torch.testing.assert_close(got, dv(f))
    torch.testing.assert_close(update, mean)
    surrogate = f.diagonal().mean() - mean / (0.9 * buffer + 0.1 * mean).detach()
    torch.testing.assert_close(torch.autograd.grad(got, f), torch.autograd.grad(surrogate, f))
    first, _ = smile.mine_lower_bound(f)
    same(first, smile.mine_lower_bound(f, torch.tensor(1.0, dtype=torch.float64))[0], [f])


def test_mine_stays_finite_at_scores_of_500():
    f = torch.full((4, 4), 500.0).requires_grad_()
    buffer = None
    for _ in range(3):
        bound, buffer = smile.mine_lower_bound(f, buffer)
        (gradient,) = torch.autograd.grad(bound, f)
        assert bound == 0 and buffer.isfinite() and gradient.isfinite().all()


def test_tuba_leaves_its_input_alone():
    f = draw(5, 5).detach()
    before = f.clone()
    smile.tuba_lower_bound(f, draw(5, seed=1).detach())
    assert torch.equal(f, before)


@pytest.mark.parametrize("estimator", ["infonce", "nwj", "tuba", "js", "smile", "dv"])
@pytest.mark.parametrize("kind", ["separable", "concat"])
def test_estimates(estimator, kind):
    x, y = draw(6, 3).detach(), draw(6, 3, seed=1).detach()
    arguments = {"dim": 3, "hidden_dim": 8, "embed_dim": 4, "layers": 1, "activation": "relu", "rho": None}
    critic = {"separable": smile.SeparableCritic, "concat": smile.ConcatCritic}[kind](**arguments).double()
    if kind == "separable":
        f = critic._h(y) @ critic._g(x).T
        prefixes = {"_g", "_h"}
    else:
        f = torch.stack([torch.cat([critic._f(torch.cat([a, b])) for b in y]) for a in x])
        prefixes = {"_f"}
    baseline = torch.nn.Linear(3, 1).double()
    extra = {"clip": 1.0} if estimator == "smile" else {}
    got = smile.estimate_mutual_information(estimator, x, y, critic, baseline, **extra)
    shifted = f - baseline(y)
    want = {
        "infonce": infonce(f),
        "nwj": nwj(f),
        "tuba": 1 + shifted.diagonal().mean() - parts(shifted)[1].exp().mean(),
        "js": nwj(f),
        "smile": dv(f, 1.0),
        "dv": dv(f),
    }[estimator]
    torch.testing.assert_close(got, want)
    names = {f"{p}.{k}.{t}" for p in prefixes for k in (0, 2, 4) for t in ("weight", "bias")}
    assert set(critic.state_dict()) == names


def test_data_helpers():
    pytest.importorskip("numpy")
    torch.manual_seed(3)
    x, y = smile.sample_correlated_gaussian(0.8, 2, 20000)
    assert x.shape == y.shape == (20000, 2)
    correlation = torch.corrcoef(torch.stack([x[:, 0], y[:, 0]]))[0, 1]
    assert abs(float(correlation) - 0.8) < 0.02
    torch.manual_seed(3)
    assert torch.equal(smile.sample_correlated_gaussian(0.8, 2, 20000, cubic=True)[1], y**3)
    assert math.isclose(smile.rho_to_mi(20, smile.mi_to_rho(20, 4.0)), 4.0)
    schedule = smile.mi_schedule(1000)
    assert schedule.dtype == "float32" and schedule.shape == (1000,)
    assert schedule[[1, 199, 201, 399, 401, 599, 601, 799, 801, 999]].tolist() == [2, 2, 4, 4, 6, 6, 8, 8, 10, 10]
    want = torch.distributions.Normal(0, 1).log_prob(x).sum(-1)
    torch.testing.assert_close(smile.log_prob_gaussian(x), want)


BOUNDS = [name for name in smile.__all__ if name.endswith("_lower_bound")]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scores_are_widened_before_they_cancel(name, dtype):
    scores = (draw(6, 6).detach() / 8 + 8).to(dtype)
    found, want = (getattr(smile, name)(s) for s in (scores, scores.double()))
    if name == "mine_lower_bound":
        found, want = found[0], want[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*BOUNDS, "logmeanexp_diag", "logmeanexp_nodiag"])
def test_scores_that_are_no_square_of_floats_are_named(name):
    for scores in (torch.randn(6), torch.randn(5, 6), torch.randn(2, 6, 6), torch.ones(6, 6, dtype=torch.long)):
        with pytest.raises(ValueError, match="scores"):
            getattr(smile, name)(scores)
    with pytest.raises(TypeError, match="scores"):
        getattr(smile, name)([[1.0, 2.0], [3.0, 4.0]])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="estimator"):
        smile.estimate_mutual_information("mine", draw(3, 2), draw(3, 2), lambda x, y: x @ y.T)
    with pytest.raises(ValueError, match="scores"):
        smile.infonce_lower_bound(draw(3, 2))
    with pytest.raises(ValueError, match="scores"):
        smile.nwj_lower_bound(draw(1, 1))
    with pytest.raises(ValueError, match="log_baseline"):
        smile.tuba_lower_bound(draw(3, 3), draw(3, 1))
    with pytest.raises(ValueError, match="momentum"):
        smile.mine_lower_bound(draw(3, 3), momentum=1.5)
    with pytest.raises(ValueError, match="activation"):
        smile.mlp(2, 3, 1, 1, "step")


@pytest.mark.parametrize("items", [9, 40])
@pytest.mark.parametrize("estimator", ["infonce", "nwj", "dv", "js", "smile", "tuba"])
def test_estimates_of_a_concatenated_critic_equal_those_of_its_scores(estimator, items):
    x, y = draw(items, 3), draw(items, 3, seed=1)
    critic = smile.ConcatCritic(3, 8, 1, "relu").double()
    got = smile.estimate_mutual_information(estimator, x, y, critic)
    want = smile.estimate_mutual_information(estimator, x, y, lambda a, b: critic(a, b))
    same(got, want, [x, y, *critic.parameters()])


def test_infonce_of_a_concatenated_critic_stores_no_activations():
    x, y = draw(128, 3).float(), draw(128, 3, seed=1).float()
    critic = smile.ConcatCritic(3, 8, 1, "relu")
    kept = largest_saved(lambda: smile.estimate_mutual_information("infonce", x, y, critic))
    assert kept < 128 * 128 * 8 <= largest_saved(lambda: critic(x, y))  # at most one bit per hidden unit and pair

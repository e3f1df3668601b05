"""mi_kernels.compat.club against formulas over all pairs in fp64."""

import math

import pytest
import torch

from mi_kernels.compat import club
from tests.compat.originals import draw, largest_saved, parameters, same

GAUSSIAN = ["CLUB", "CLUBSample", "L1OutUB", "VarUB"]


def data(items=8):
    return draw(items, 3), draw(items, 2, seed=1)


def log_q(mu, logvar, y):
    """log q(y_j | x_i) without the constant, as [i, j]."""
    return (-((y[None] - mu[:, None]) ** 2) / logvar[:, None].exp() - logvar[:, None]).sum(-1) / 2


def pair_scores(network, x, y):
    """f(x_j, y_i) as [i, j]."""
    return torch.stack([torch.cat([network(torch.cat([a, b])) for a in x]) for b in y])


def test_signatures():
    for name in (*GAUSSIAN, "MINE", "NWJ", "InfoNCE"):
        kind = getattr(club, name)
        assert parameters(kind) == ["x_dim", "y_dim", "hidden_size"]
        assert parameters(kind.forward) == parameters(kind.learning_loss) == ["x_samples", "y_samples"]
    assert parameters(club.CLUBMean) == ["x_dim", "y_dim", "hidden_size=None"]
    assert parameters(club.CLUBForCategorical) == ["input_dim", "label_num", "hidden_size=None"]
    for method in ("forward", "loglikeli", "learning_loss"):
        assert parameters(getattr(club.CLUBForCategorical, method)) == ["inputs", "labels"]
    for name in (*GAUSSIAN, "CLUBMean"):
        assert parameters(getattr(club, name).loglikeli) == ["x_samples", "y_samples"]
        assert parameters(getattr(club, name).get_mu_logvar) == ["x_samples"]


def layers(prefix, *numbers):
    return {f"{prefix}.{k}.{t}" for k in numbers for t in ("weight", "bias")}


def test_state_dict_names_and_widths():
    for name in GAUSSIAN:
        state = getattr(club, name)(3, 2, 9).state_dict()
        assert set(state) == layers("p_mu", 0, 2) | layers("p_logvar", 0, 2)
        assert state["p_mu.0.weight"].shape == (4, 3) and state["p_logvar.2.weight"].shape == (2, 4)
    assert set(club.CLUBMean(3, 2).state_dict()) == {"p_mu.weight", "p_mu.bias"}
    mean = club.CLUBMean(3, 2, 9).state_dict()
    assert set(mean) == layers("p_mu", 0, 2) and mean["p_mu.0.weight"].shape == (9, 3)
    assert set(club.MINE(3, 2, 9).state_dict()) == layers("T_func", 0, 2)
    assert set(club.NWJ(3, 2, 9).state_dict()) == layers("F_func", 0, 2)
    assert set(club.InfoNCE(3, 2, 9).state_dict()) == layers("F_func", 0, 2)
    assert set(club.CLUBForCategorical(3, 4).state_dict()) == {"variational_net.weight", "variational_net.bias"}
    assert set(club.CLUBForCategorical(3, 4, 5).state_dict()) == layers("variational_net", 0, 2)


@pytest.mark.parametrize("name", [*GAUSSIAN, "CLUBMean"])
def test_gaussian_bounds(name):
    x, y = data()
    module = getattr(club, name)(3, 2, 10).double()
    inputs = [x, y, *module.parameters()]
    mu, logvar = module.get_mu_logvar(x)
    if name == "CLUBMean":
        assert logvar == 0
        logvar = torch.zeros_like(mu)
        likelihood = -((mu - y) ** 2).sum(1).mean()
    else:
        likelihood = (-((mu - y) ** 2) / logvar.exp() - logvar).sum(1).mean()
    same(module.loglikeli(x, y), likelihood, inputs)
    same(module.learning_loss(x, y), -likelihood, inputs)
    pairs = log_q(mu, logvar, y)
    torch.manual_seed(5)
    shuffled = y[torch.randperm(8)]
    want = {
        "CLUB": pairs.diagonal().mean() - pairs.mean(),
        "CLUBMean": pairs.diagonal().mean() - pairs.mean(),
        "CLUBSample": (pairs.diagonal() - log_q(mu, logvar, shuffled).diagonal()).mean(),
        "L1OutUB": (
            pairs.diagonal() - pairs.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf).logsumexp(0) + math.log(7)
        ).mean(),
        "VarUB": (mu**2 + logvar.exp() - 1 - logvar).mean() / 2,
    }[name]
    torch.manual_seed(5)
    same(module(x, y), want, inputs)


def test_leave_one_out_is_not_club():
    x, y = data()
    module = club.L1OutUB(3, 2, 10).double()
    other = club.CLUB(3, 2, 10).double()
    other.load_state_dict(module.state_dict())
    # In the original, an error in the mask's broadcasting makes both equal.
    assert abs((module(x, y) - other(x, y)).item()) > 1e-2


def test_leave_one_out_is_exact_in_fp32_far_from_the_origin():
    x, y = data(64)
    module = club.L1OutUB(3, 2, 10).double()
    mu, logvar = module.get_mu_logvar(x)
    pairs = log_q(mu + 100, logvar, y + 100)
    rest = pairs.masked_fill(torch.eye(64, dtype=torch.bool), -torch.inf).logsumexp(0) - math.log(63)
    module.p_mu[2].bias.data += 100
    got = module.float()(x.float(), (y + 100).float())
    torch.testing.assert_close(got.double(), (pairs.diagonal() - rest).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [None, 6])
def test_categorical(hidden):
    x, labels = draw(9, 3), torch.tensor([0, 2, 2, 3, 0, 2, 1, 0, 0])
    module = club.CLUBForCategorical(3, 5, hidden).double()
    inputs = [x, *module.parameters()]
    log_p = module.variational_net(x).log_softmax(1)
    pairs = torch.stack([log_p[:, c] for c in labels], 1)
    same(module(x, labels), pairs.diagonal().mean() - pairs.mean(), inputs)
    same(module.loglikeli(x, labels), pairs.diagonal().mean(), inputs)
    same(module.learning_loss(x, labels), -pairs.diagonal().mean(), inputs)


@pytest.mark.parametrize("name", ["MINE", "NWJ", "InfoNCE"])
def test_critic_bounds(name):
    x, y = data()
    module = getattr(club, name)(3, 2, 10).double()
    network = module.T_func if name == "MINE" else module.F_func
    inputs = [x, y, *module.parameters()]
    f = pair_scores(network, x, y)
    joint = f.diagonal().mean()
    torch.manual_seed(5)
    index = torch.randint(8, (8,))
    want = {
        "MINE": joint - network(torch.cat([x, y[index]], -1)).exp().mean().log(),
        "NWJ": joint - (f - 1).exp().mean(),
        "InfoNCE": joint - f.logsumexp(1).mean() + math.log(8),
    }[name]
    torch.manual_seed(5)
    same(module(x, y), want, inputs)
    torch.manual_seed(5)
    same(module.learning_loss(x, y), -want, inputs)


def test_mine_is_finite_at_scores_of_500():
    x, y = (t.float() for t in data())
    module = club.MINE(3, 2, 10)
    module.T_func[2].bias.data.fill_(500)
    loss = module(x, y)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("name", ["CLUB", "CLUBMean", "L1OutUB", "CLUBForCategorical"])
def test_no_pairs_are_stored(name):
    x, y = (t.float() for t in data(512))
    if name == "CLUBForCategorical":
        y = torch.arange(512) % 5
    module = getattr(club, name)(3, 5 if name == "CLUBForCategorical" else 2, 8)
    assert largest_saved(lambda: module(x, y)) < 512 * 32


def test_club_of_a_known_gaussian():
    # q is exact: CLUB's expectation is (1 - 1/B) d rho^2 / (1 - rho^2).
    d, rho = 4, 0.6
    g = torch.Generator().manual_seed(0)
    module = club.CLUBMean(d, d).double()
    # Unit variances: scale y so that its conditional variance is 1.
    scale = 1 / math.sqrt(1 - rho**2)
    module.p_mu.weight.data.copy_(rho * scale * torch.eye(d))
    module.p_mu.bias.data.zero_()
    values = []
    for _ in range(200):
        x = torch.randn(64, d, generator=g, dtype=torch.float64)
        noise = torch.randn(64, d, generator=g, dtype=torch.float64)
        values.append(module(x, (rho * x + noise / scale) * scale).detach())
    mean, error = torch.stack(values).mean(), torch.stack(values).std() / math.sqrt(200)
    assert abs(float(mean) - 63 / 64 * d * rho**2 / (1 - rho**2)) < 4 * float(error)


def test_bad_input_is_named():
    x, y = data()
    for name in (*GAUSSIAN, "MINE", "NWJ", "InfoNCE", "CLUBMean"):
        module = getattr(club, name)(3, 2, 10).double()
        with pytest.raises(ValueError, match="y_samples"):
            module(x, y[:3])
        with pytest.raises(ValueError, match="x_samples"):
            module(x[:0], y[:0])
        for method in (module, *(getattr(module, n) for n in ("learning_loss", "loglikeli") if hasattr(module, n))):
            with pytest.raises(ValueError, match=r"y_samples.* features"):
                method(x, torch.cat([y, y], 1))
    with pytest.raises(ValueError, match="two samples"):
        club.L1OutUB(3, 2, 10).double()(x[:1], y[:1])
    with pytest.raises(ValueError, match="hidden_size"):
        club.CLUB(3, 2, 1)
    module = club.CLUBForCategorical(3, 4).double()
    for labels in (torch.arange(8), torch.arange(7), torch.zeros(8), -torch.ones(8, dtype=torch.long)):
        with pytest.raises(ValueError, match="labels"):
            module(x, labels)
    with pytest.raises(ValueError, match="inputs"):
        module(x[0], torch.zeros(3, dtype=torch.long))


def literal_club(mu, logvar, y):
    """The original's formula: negatives are averaged over the first dimension of y, for every position."""
    positive = -((mu - y) ** 2) / 2 / logvar.exp()
    negative = -((y[None] - mu[:, None]) ** 2).mean(1) / 2 / logvar.exp()
    return (positive.sum(-1) - negative.sum(-1)).mean()


@pytest.mark.parametrize("positions", [(3,), (2, 3)])
def test_inputs_of_more_dimensions(positions):
    x, y = draw(5, *positions, 4), draw(5, *positions, 2, seed=1)
    model = club.CLUB(4, 2, 8).double()
    mu, logvar = model.get_mu_logvar(x)
    same(model(x, y), literal_club(mu, logvar, y), [x, y])
    mean = club.CLUBMean(4, 2).double()
    same(mean(x, y), literal_club(mean.p_mu(x), torch.zeros(()), y), [x, y])
    out = club.L1OutUB(4, 2, 8).double()
    mu, logvar = out.get_mu_logvar(x)
    log_q = (-((y[None] - mu[:, None]) ** 2) / 2 / logvar[:, None].exp() - logvar[:, None] / 2).sum(-1)  # [x, y, ...]
    own = torch.eye(5, dtype=torch.bool).reshape(5, 5, *(1,) * len(positions))
    leave_out = log_q.masked_fill(own, -torch.inf).logsumexp(0) - math.log(4)
    positive = torch.stack([log_q[i, i] for i in range(5)])
    same(out(x, y), (positive - leave_out).mean(), [x, y])
    for name in ("CLUBSample", "MINE", "VarUB"):
        value = getattr(club, name)(4, 2, 8).double()(x, y)
        assert value.dim() == 0 and value.isfinite()
    for name in ("NWJ", "InfoNCE"):
        with pytest.raises(ValueError, match="x_samples"):
            getattr(club, name)(4, 2, 8).double()(x, y)


def test_log_sum_exp():
    value = draw(3, 4)
    for dim, keep in ((0, False), (1, True), (-1, False)):
        want = value.exp().sum(dim, keepdim=keep).log()
        torch.testing.assert_close(club.log_sum_exp(value, dim, keep), want)
        assert club.log_sum_exp(value + 1000, dim, keep).isfinite().all()
    torch.testing.assert_close(club.log_sum_exp(value), value.exp().sum().log())


def test_mine_is_finite_where_exp_overflows():
    model = club.MINE(2, 2, 4)
    with torch.no_grad():
        model.T_func[2].bias.fill_(500.0)
    value = model(draw(6, 2).float(), draw(6, 2, seed=1).float())
    assert value.isfinite()


@pytest.mark.parametrize("name", ["CLUB", "CLUBSample", "CLUBMean", "MINE", "NWJ", "InfoNCE", "L1OutUB", "VarUB"])
def test_integers_and_other_types_are_named(name):
    model = getattr(club, name)(3, 3, 8)
    x, integers = torch.randn(4, 3), torch.arange(12).reshape(4, 3)
    for arguments, error, argument in (
        ((integers, x), ValueError, "x_samples"),
        ((x, integers), ValueError, "y_samples"),
        ((None, x), TypeError, "x_samples"),
        ((x, x.tolist()), TypeError, "y_samples"),
    ):
        with pytest.raises(error, match=argument):
            model(*arguments)
        with pytest.raises(error, match=argument):
            model.learning_loss(*arguments)
    with pytest.raises(TypeError, match="labels"):
        club.CLUBForCategorical(3, 2)(x, [0, 1, 0, 1])

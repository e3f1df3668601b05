"""mi_kernels.compat.factorcl: golden numbers, formulas in fp64, names."""

import math

import pytest
import torch

from mi_kernels.compat import factorcl
from tests.compat.originals import draw, parameters, same


def wave(shape, k):
    return torch.sin(k * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(shape)


def golden(kind):
    critic = kind(3, 2, 6, 1, "relu").double()
    widths = [5, 6, 6, 1]
    state = {}
    for i, name in enumerate((0, 2, 4)):
        state[f"_f.{name}.weight"] = wave((widths[i + 1], widths[i]), 0.7 + 0.1 * i)
        state[f"_f.{name}.bias"] = 0.1 * wave((widths[i + 1],), 0.7 + 0.05 * i)
    critic.load_state_dict(state)
    return critic, wave((4, 3), 1.3).requires_grad_(), wave((4, 2), 0.9).requires_grad_()


def info_nce_loss(network, first, second, anchor, temperature=1.0):
    """Minus InfoNCE with scores network([first_i, second_j]). Each item of side `anchor` is compared with all of the
    other side."""
    scores = torch.stack([torch.cat([network(torch.cat([a, b])) for b in second]) for a in first]) / temperature
    return scores.logsumexp(1 if anchor == "first" else 0).mean() - scores.diagonal().mean() - math.log(len(first))


def test_signatures():
    critic = ["A_dim", "B_dim", "hidden_dim", "layers", "activation", "**extra_kwargs"]
    for name in ("InfoNCECritic", "CLUBInfoNCECritic", "ConcatCritic"):
        assert parameters(getattr(factorcl, name)) == critic
    for name in ("InfoNCECritic", "CLUBInfoNCECritic"):
        assert parameters(getattr(factorcl, name).forward) == ["x_samples", "y_samples"]
    assert parameters(factorcl.CLUBInfoNCECritic.learning_loss) == ["x_samples", "y_samples"]
    assert parameters(factorcl.SeparableCritic) == [
        "x1_dim",
        "x2_dim",
        "hidden_dim",
        "embed_dim",
        "layers",
        "activation",
    ]
    assert parameters(factorcl.SeparableCritic.pointwise_mi) == ["x", "y", "estimator"]
    assert parameters(factorcl.mlp) == ["dim", "hidden_dim", "output_dim", "layers", "activation"]
    assert parameters(factorcl.probabilistic_classifier_obj) == ["f"]
    assert parameters(factorcl.probabilistic_classifier_eval) == ["f"]
    assert parameters(factorcl.infonce_lower_bound_obj) == ["scores"]


def test_golden_numbers():
    critic, x, y = golden(factorcl.InfoNCECritic)
    assert abs(critic(x, y).item() - 0.5189812194) < 1e-9
    same(critic(x, y), info_nce_loss(critic._f, x, y, "second"), [x, y, *critic.parameters()])
    critic, x, y = golden(factorcl.CLUBInfoNCECritic)
    assert abs(critic(x, y).item() + 0.4357665150) < 1e-9
    assert abs(critic.learning_loss(x, y).item() - 0.5832068440) < 1e-9


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("temperature", [None, 1, 0.3])
def test_critics(layers, activation, temperature):
    x, y = draw(6, 3), draw(6, 2, seed=1)
    extra = {} if temperature is None else {"temperature": temperature}
    t = temperature or 1
    critic = factorcl.InfoNCECritic(3, 2, 5, layers, activation, **extra).double()
    inputs = [x, y, *critic.parameters()]
    same(critic(x, y), info_nce_loss(critic._f, x, y, "second", t), inputs)
    critic = factorcl.CLUBInfoNCECritic(3, 2, 5, layers, activation, **extra).double()
    inputs = [x, y, *critic.parameters()]
    same(critic.learning_loss(x, y), info_nce_loss(critic._f, y, x, "first", t), inputs)
    scores = torch.stack([torch.cat([critic._f(torch.cat([b, a])) for a in x]) for b in y]) / t
    same(critic(x, y), scores.diagonal().mean() - scores.mean(), inputs)


def test_score_critics():
    x, y = draw(6, 3), draw(6, 2, seed=1)
    concat = factorcl.ConcatCritic(3, 2, 5, 1, "relu").double()
    want = torch.stack([torch.cat([concat._f(torch.cat([a, b])) for b in y]) for a in x])
    same((concat(x, y) ** 2).sum(), (want**2).sum(), [x, y, *concat.parameters()])
    critic = factorcl.SeparableCritic(3, 2, 5, 4, 1, "relu").double()
    scores = critic.transformed_y(y) @ critic.transformed_x(x).T
    torch.testing.assert_close(critic(x, y), scores)
    pointwise = critic.pointwise_mi(x, y, "probabilistic_classifier")
    torch.testing.assert_close(pointwise, scores.diagonal() + math.log(5))
    assert {name.split(".")[0] for name in critic.state_dict()} == {"_g", "_h"}
    with pytest.raises(NotImplementedError, match="estimator"):
        critic.pointwise_mi(x, y, "nwj")


def test_objectives_of_scores():
    f = draw(5, 5)
    labels = torch.eye(5, dtype=torch.float64)
    p = f.sigmoid()
    want = (labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    same(factorcl.probabilistic_classifier_obj(f), want, [f])
    diagonal = p.diagonal()
    same(factorcl.probabilistic_classifier_eval(f), (4 * diagonal / (1 - diagonal)).log().mean(), [f])
    limit = math.log(4) + math.log((1 - 1e-6) / 1e-6)
    assert abs(float(factorcl.probabilistic_classifier_eval(100 * torch.eye(5))) - limit) < 1e-5
    want = math.log(5) + f.diagonal().mean() - f.logsumexp(1).mean()
    same(factorcl.infonce_lower_bound_obj(f), want, [f])
    with pytest.raises(ValueError, match="scores"):
        factorcl.probabilistic_classifier_obj(draw(3, 2))


def test_bound_of_a_zero_critic_is_zero():
    critic = factorcl.CLUBInfoNCECritic(3, 2, 5, 1, "relu", embed_dim=7)
    for parameter in critic.parameters():
        parameter.data.zero_()
    x, y = draw(6, 3, dtype=torch.float32), draw(6, 2, dtype=torch.float32)
    assert critic(x, y) == 0 and abs(critic.learning_loss(x, y).item()) < 1e-6


def test_bad_input_is_named():
    critic = factorcl.InfoNCECritic(3, 2, 5, 1, "relu")
    with pytest.raises(ValueError, match="y_samples"):
        critic(torch.ones(4, 3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="x_samples"):
        critic(torch.ones(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="temperature"):
        factorcl.InfoNCECritic(3, 2, 5, 1, "relu", temperature=0)
    with pytest.raises(ValueError, match="activation"):
        factorcl.InfoNCECritic(3, 2, 5, 1, "gelu")

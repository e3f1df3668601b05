"""torch.func transforms of operators, tested on an operator that records whether its kernel or its formula ran."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mi_kernels.ops.common import transforms

calls: list[str] = []


class _Kernel(torch.autograd.Function):
    """sum_d x^2 y over the last dimension. It is differentiable once and has no rules for transforms."""

    @staticmethod
    def forward(ctx, x, y):
        calls.append("forward")
        ctx.save_for_backward(x, y)
        return (x.square() * y).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        calls.append("backward")
        x, y = ctx.saved_tensors
        return 2 * g[..., None] * x * y, g[..., None] * x.square()


def _run(lead: tuple[int, ...], x: Tensor, y: Tensor) -> list[Tensor]:
    assert x.shape[: len(lead)] == lead == y.shape[: len(lead)]
    return [_Kernel.apply(x, y)]


def _formula(lead: tuple[int, ...], x: Tensor, y: Tensor) -> list[Tensor]:
    calls.append("formula")
    return [(x.square() * y).sum(-1)]


def op(x: Tensor, y: Tensor) -> Tensor:
    return transforms.apply(transforms.Operator(_run, _formula), x, y)[0]


def plain(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() * y).sum(-1)


def agree(transformed, *inputs: Tensor) -> None:
    torch.testing.assert_close(transformed(op)(*inputs), transformed(plain)(*inputs))


X, Y = torch.randn(3, 5, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)


def test_first_gradients_and_vmap_use_the_kernels() -> None:
    from torch.func import grad, vmap

    calls.clear()
    agree(lambda f: grad(lambda x, y: f(x, y).sum(), argnums=(0, 1)), X, Y)
    agree(lambda f: vmap(f), X, Y)
    agree(lambda f: vmap(f, in_dims=(0, None)), X, Y[0])
    agree(lambda f: vmap(f, in_dims=(1, 1), out_dims=0), X.mT, Y.mT)
    agree(lambda f: vmap(vmap(f)), X[None], Y[None])
    agree(lambda f: vmap(grad(f)), X, Y)
    agree(lambda f: grad(lambda x, y: vmap(f)(x, y).sum()), X, Y)
    assert calls.count("backward") and "formula" not in calls


def test_forward_mode_and_second_derivatives_use_the_formula() -> None:
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

    agree(lambda f: lambda x, y: jvp(f, (x, y), (y, x)), X, Y)
    agree(lambda f: jacfwd(f), X, Y)
    agree(lambda f: jacrev(f), X, Y)
    agree(lambda f: hessian(f), X[0], Y[0])
    agree(lambda f: jacfwd(jacfwd(f)), X[0], Y[0])
    agree(lambda f: lambda x, y: jvp(lambda z: jvp(lambda w: f(w, y), (z,), (y,))[1], (x,), (y,)), X, Y)
    agree(lambda f: grad(lambda x, y: grad(f)(x, y).square().sum()), X[0], Y[0])
    agree(lambda f: vmap(grad(lambda x, y: grad(f)(x, y).square().sum())), X, Y)
    agree(lambda f: vmap(lambda x, y: jvp(f, (x, y), (y, x))), X, Y)


def test_dual_numbers_outside_of_torch_func() -> None:
    with forward_ad.dual_level():
        x, y = forward_ad.make_dual(X, Y), Y
        assert transforms.active()
        got, want = (forward_ad.unpack_dual(f(x, y)) for f in (op, plain))
        torch.testing.assert_close(got.tangent, want.tangent)
        torch.testing.assert_close(got.primal, want.primal)
    assert not transforms.active()

"""Shared by the transform tests of several operators: every torch.func transform, compared with a plain formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jvp, vmap

Function = Callable[..., Any]


def weighted(outputs: Any) -> Tensor:
    """A scalar to which every entry of every output contributes with a different weight."""
    tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
    ramps = (torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in tensors)
    return torch.stack([(t.sin() * ramp).sum() for t, ramp in zip(tensors, ramps, strict=True)]).sum()


def assert_transforms(op: Function, plain: Function, inputs: tuple[Tensor, ...]) -> None:
    """Asserts that transforms of `op` equal those of `plain`. All inputs are floating-point and differentiated."""
    many = tuple(torch.stack([t, t.cos(), t / 2]) for t in inputs)
    tangents = tuple(t.sin() for t in inputs)
    every = tuple(range(len(inputs)))
    rest = inputs[1:]
    loss = lambda f: lambda *a: weighted(f(*a))  # noqa: E731
    first = (0, *(None,) * len(rest))
    ways: dict[str, Callable[[Function], Any]] = {
        "grad": lambda f: grad(loss(f), every)(*inputs),
        "vmap": lambda f: vmap(f)(*many),
        "per-sample gradients of shared parameters": lambda f: vmap(grad(loss(f), every), first)(many[0], *rest),
        "per-sample gradients of inputs alone": lambda f: vmap(grad(loss(f)), first)(many[0], *rest),
        "per-sample gradients": lambda f: vmap(grad(loss(f), every))(*many),
        "grad of vmap": lambda f: grad(lambda a: weighted(vmap(f, first)(a, *rest)))(many[0]),
        "two vmaps": lambda f: vmap(vmap(f, first), first)(torch.stack([many[0], many[0] + 1]), *rest),
        "jvp": lambda f: jvp(f, inputs, tangents),
        "jvp of vmap": lambda f: jvp(lambda a: vmap(f, first)(a, *rest), (many[0],), (many[0].sin(),)),
        "hessian-vector product": lambda f: jvp(grad(lambda a: loss(f)(a, *rest)), inputs[:1], tangents[:1]),
        "hessians": lambda f: vmap(hessian(lambda a: loss(f)(a, *rest)))(many[0]),
        "jacfwd": lambda f: jacfwd(lambda a: loss(f)(a, *rest))(inputs[0]),
        "dual numbers": lambda f: dual(f, inputs[0], tangents[0], rest),
    }
    for way, apply in ways.items():
        torch.testing.assert_close(apply(op), apply(plain), msg=lambda text, way=way: f"{way}: {text}")


def dual(f: Function, x: Tensor, tangent: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(weighted(f(forward_ad.make_dual(x, tangent), *rest))).tangent
        assert found is not None
        return found


def assert_batched_and_repeated_backward(f: Function, x: Tensor) -> None:
    """Asserts that gradients of f(x) are the same with and without create_graph, one by one, with `is_grads_batched`
    and under vmap. The inputs of the operator in f may depend on each other through x."""
    x = x.detach().requires_grad_()
    out = f(x)
    slopes = torch.randn(3, *out.shape, dtype=out.dtype)
    backward = lambda g, **options: torch.autograd.grad(out, x, g, retain_graph=True, **options)[0]  # noqa: E731
    want = torch.stack([backward(g) for g in slopes])
    torch.testing.assert_close(torch.stack([backward(g, create_graph=True) for g in slopes]), want)
    torch.testing.assert_close(backward(slopes, is_grads_batched=True), want)
    torch.testing.assert_close(vmap(backward)(slopes), want)

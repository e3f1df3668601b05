"""readable(): whether Python may read a tensor's values. Validators, losses and backward passes ask it."""

from __future__ import annotations

import torch
from torch import Tensor

from mi_kernels.ops.common.autograd import readable


def asked(found: list[bool], t: Tensor) -> Tensor:
    found.append(readable(t))
    return t.sum()


def test_plain_cpu_tensors_are_readable_whatever_other_tensors_are() -> None:
    found: list[bool] = []
    labels = torch.arange(3)
    assert readable(labels) and readable(torch.ones(2, requires_grad=True))
    torch.func.vmap(lambda t: t.sum() + asked(found, labels))(torch.ones(2, 3))
    assert found == [True]


def test_other_devices_and_transformed_tensors_are_not() -> None:
    found: list[bool] = []
    assert not readable(torch.ones(2, device="meta"))
    torch.func.vmap(lambda t: asked(found, t))(torch.ones(2, 3))
    torch.func.grad(lambda t: asked(found, t))(torch.ones(3))
    torch.func.jvp(lambda t: asked(found, t), (torch.ones(3),), (torch.ones(3),))
    assert found == [False] * 3


def test_batches_of_gradients_are_not() -> None:
    found: list[bool] = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t: Tensor) -> Tensor:
            return t * 1

        @staticmethod
        def backward(ctx, g: Tensor) -> Tensor:
            found.append(readable(g))
            return g

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Node.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert found == [False]


def test_graphs_that_are_compiled_do_not_read() -> None:
    step = torch.compile(lambda t: t + 1 if readable(t) else t - 1, backend="eager", fullgraph=True)
    assert torch.equal(step(torch.zeros(3)), -torch.ones(3))

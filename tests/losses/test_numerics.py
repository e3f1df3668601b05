"""Losses of dot-product scores in numerically difficult cases: cancellation, 16 bits, loss scales, large scores."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mk
from mi_kernels.ops.dot_critic import api

BACKENDS = [name for name in ("reference", "chunked", "cpu") if mk.backends()[name] == "available"]
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES: dict[str, Callable[[str], Loss]] = {
    "info_nce": lambda b: lambda x, y: mk.info_nce(x, y, backend=b),
    "info_nce, symmetric": lambda b: lambda x, y: mk.info_nce(x, y, symmetric=True, normalize=False, backend=b),
    "info_nce, rows": lambda b: lambda x, y: mk.info_nce(x, y, reduction="none", backend=b).square().sum(),
    "info_nce, negatives": lambda b: lambda x, y: mk.info_nce(x, y, x + y, backend=b),
    "clip_loss": lambda b: lambda x, y: mk.clip_loss(x, y, 2.0, backend=b),
    "siglip_loss": lambda b: lambda x, y: mk.siglip_loss(x, y, 2.0, -1.0, backend=b),
    "nt_xent": lambda b: lambda x, y: mk.nt_xent(x, y, backend=b),
    "sup_con": lambda b: lambda x, y: mk.sup_con(torch.stack([x, y], 1), temperature=0.5, backend=b),
    "sup_con, labels": lambda b: (
        lambda x, y: mk.sup_con(torch.stack([x, y], 1), torch.arange(len(x)) // 3, temperature=0.5, backend=b)
    ),
}
BOUNDS: dict[str, Callable[[], torch.nn.Module]] = {
    "InfoNCE": lambda: mk.InfoNCE(mk.DotCritic(0.5)),
    "InfoNCE, cosine": lambda: mk.InfoNCE(mk.DotCritic(0.5, normalize=True)),
    "NWJ": lambda: mk.NWJ(mk.DotCritic()),
    "SMILE": lambda: mk.SMILE(mk.DotCritic()),
    "JensenShannon": lambda: mk.JensenShannon(mk.DotCritic()),
    "NCECLUB": lambda: mk.NCECLUB(mk.DotCritic()),
}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_create_graph_leaves_the_first_gradient_of_dependent_inputs_alone(name: str, backend: str) -> None:
    z = torch.randn(12, 6, dtype=torch.double, requires_grad=True)
    loss = LOSSES[name](backend)
    plain, again = (torch.autograd.grad(loss(z * 1, z.sin()), z, create_graph=c)[0] for c in (False, True))
    assert relative(again, plain) < 1e-12
    (penalty,) = torch.autograd.grad(again.square().sum(), z)
    step = 1e-6 * torch.randn_like(z)
    moved = [
        torch.autograd.grad(loss(w * 1, w.sin()), w)[0].square().sum()
        for w in ((z + s * step).detach().requires_grad_() for s in (1, -1))
    ]
    torch.testing.assert_close((penalty * step).sum(), (moved[0] - moved[1]) / 2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", BOUNDS)
def test_create_graph_leaves_the_first_gradient_of_bounds_alone(name: str) -> None:
    z = torch.randn(12, 6, dtype=torch.double, requires_grad=True)
    bound = BOUNDS[name]()
    plain, again = (torch.autograd.grad(bound.learning_loss(z, z.sin()), z, create_graph=c)[0] for c in (False, True))
    assert relative(again, plain) < 1e-12


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lead", [(2, 2), (1, 1), (3, 2, 2), (4,)])
def test_any_group_shape_and_a_learnable_scale_or_bias(lead: tuple[int, ...], compiled: bool) -> None:
    q, k = torch.randn(*lead, 4, 5, dtype=torch.double), torch.randn(*lead, 4, 5, dtype=torch.double)
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "info_nce": lambda a, b, t: mk.info_nce(a, b, temperature=t),
        "clip_loss": lambda a, b, t: mk.clip_loss(a, b, t),
        "siglip_loss": lambda a, b, t: mk.siglip_loss(a, b, 10.0, t),
        "nt_xent": lambda a, b, t: mk.nt_xent(a, b, t),
    }
    names = ["clip_loss"] if compiled else list(losses)
    for name in names:
        loss = losses[name]
        t = (torch.rand(lead, dtype=torch.double) + 0.5).requires_grad_()
        x = q.clone().requires_grad_()
        run = torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss
        found = torch.autograd.grad(run(x, k, t), [x, t])
        # One group at a time: groups have equal sizes, so the mean over all samples is the mean over the groups' means.
        ones = [loss(x.flatten(0, -3)[g], k.flatten(0, -3)[g], t.flatten()[g]) for g in range(t.numel())]
        want = torch.autograd.grad(torch.stack(ones).mean(), [x, t])
        torch.testing.assert_close(found, want, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sup_con", "sup_con, labels", "InfoNCE", "InfoNCE, bilinear", "negatives"])
def test_16_bit_gradients_near_convergence_are_those_of_upcast_features(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, t = 128, 0.07
    a = F.normalize(torch.randn(batch, 64, generator=generator), dim=1)
    b = F.normalize(a + 0.04 * torch.randn(batch, 64, generator=generator), dim=1)
    bilinear = mk.BilinearCritic(64, 64)
    torch.nn.init.eye_(bilinear.weight).data.div_(t)
    labels = torch.arange(batch)
    losses: dict[str, Loss] = {
        "sup_con": lambda x, y: mk.sup_con(torch.stack([x, y], 1), temperature=t),
        "sup_con, labels": lambda x, y: mk.sup_con(torch.stack([x, y], 1), labels, temperature=t),
        "InfoNCE": lambda x, y: -mk.InfoNCE(mk.DotCritic(t))(x, y),
        "InfoNCE, bilinear": lambda x, y: -mk.InfoNCE(bilinear.to(x.dtype))(x, y),
        "negatives": lambda x, y: mk.info_nce(x, y, y.roll(1, 0), temperature=t, normalize=False),
    }

    def loss(p: Tensor, q: Tensor) -> Tensor:
        return 1024 * losses[name](p, q)  # a loss scale keeps fp16 gradients out of the subnormal range

    x, y = a.to(dtype).requires_grad_(), b.to(dtype)
    got = torch.autograd.grad(loss(x, y), x)[0]
    z = x.detach().double().requires_grad_()
    want = torch.autograd.grad(loss(z, y.double()), z)[0]
    z = x.detach().float().requires_grad_()
    upcast = torch.autograd.grad(loss(z, y.float()), z)[0].to(dtype)
    if "bilinear" in name:  # its features x W are rounded too
        features = (x.detach() @ bilinear.weight.to(dtype)).double().requires_grad_()
        scores = features @ y.double().T
        want = torch.autograd.grad(F.cross_entropy(scores, labels), features)[0] * 1024 / t
    assert relative(got, want) < 2 * relative(upcast, want) + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_scale_reaches_fp16_gradients_before_they_are_rounded(backend: str, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, scale, t = 512, 65536.0, 0.06
    a = F.normalize(torch.randn(batch, 128, generator=generator), dim=1).half()
    b = F.normalize(a.float() + 0.009 * torch.randn(batch, 128, generator=generator), dim=1).half()
    x, z = a.clone().requires_grad_(), a.double().requires_grad_()
    loss = mk.info_nce(x, b, temperature=t, reduction=reduction, backend=backend).mean()
    scores = F.normalize(z, dim=1) @ F.normalize(b.double(), dim=1).T / t
    got = torch.autograd.grad(scale * loss, x)[0]
    want = torch.autograd.grad(scale * F.cross_entropy(scores, torch.arange(batch)), z)[0]
    assert loss.item() < 1e-3 and relative(got, want) < 0.03


def test_the_compiled_path_keeps_gradients_wide_until_the_slope_is_known() -> None:
    torch._dynamo.reset()
    a, b = torch.randn(64, 16).half(), torch.randn(64, 16).half()
    step = torch.compile(lambda x, y: 2.0**20 * mk.info_nce(x, y, temperature=0.02), backend="aot_eager")
    grads = []
    for run in (step, lambda x, y: 2.0**20 * mk.info_nce(x, y, temperature=0.02)):
        x = a.clone().requires_grad_()
        grads.append(torch.autograd.grad(run(x, b), x)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_row_of_zeros_stays_finite(dtype: torch.dtype) -> None:
    x, y, n = (torch.randn(8, 16).to(dtype) for _ in range(3))
    x[0], n[2] = 0, 0
    x.requires_grad_()
    found = [
        mk.info_nce(x, y),
        mk.info_nce(x, y, n),
        mk.info_nce(x, y, n.expand(8, 8, 16), negative_mode="paired"),
        mk.nt_xent(x, y),
        mk.InfoNCE(mk.DotCritic(normalize=True))(x, y),
    ]
    for value in found:
        (grad,) = torch.autograd.grad(value, x)
        assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "cpu"])
@pytest.mark.parametrize("how", ["symmetric", "rows", "one-sided"])
def test_large_common_scores_cost_no_digits_of_the_gradient(how: str, backend: str) -> None:
    x, y = torch.randn(96, 32), torch.randn(96, 32)
    bias = torch.tensor(900.0)  # cancels in every softmax, but makes fp32 scores multiples of 6e-5

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        z = x.to(dtype).requires_grad_()
        rows = bias.to(dtype).expand(96)
        prepared = api.prepare(z, y.to(dtype), 1.0, row_bias=rows, positive_shift=0)
        if how == "rows":
            loss = api.row_losses(prepared, backend=backend).mean()
        else:
            w = {"w_row": 1 / 192, "w_col": 1 / 192} if how == "symmetric" else {"w_row": 1 / 96}
            loss = api.loss(prepared, **w, w_pos=1 / 96, backend=backend)
        return torch.autograd.grad(loss, z)[0]

    z = x.clone().requires_grad_()
    scores = z @ y.T + bias
    target = torch.arange(96)
    eager = F.cross_entropy(scores, target)
    if how == "symmetric":
        eager = (eager + F.cross_entropy(scores.T, target)) / 2
    want = gradient(torch.double, "reference")
    plain = relative(torch.autograd.grad(eager, z)[0], want)
    assert relative(gradient(torch.float, backend), want) < 1.2 * plain + 1e-6


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_temperature_that_changes_compiles_once_more_at_most(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(
        lambda a, b, t: mk.info_nce(a, b, temperature=t), fullgraph=True, dynamic=dynamic, backend=counter
    )
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    for t in (0.1, 0.2, 0.3, 0.4):
        torch.testing.assert_close(step(x, y, t), mk.info_nce(x, y, temperature=t))
    assert counter.frame_count <= 2


def test_sup_con_is_exported_and_compiled_whole() -> None:
    class Model(torch.nn.Module):
        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return mk.sup_con(features, labels)

    features, labels = F.normalize(torch.randn(8, 2, 4), dim=-1), torch.randint(3, (8,))
    want = mk.sup_con(features, labels)
    exported = torch.export.export(Model(), (features, labels)).module()
    torch.testing.assert_close(exported(features, labels), want)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Model(), fullgraph=True, backend="eager")(features, labels), want)


TRANSFORMED = [*LOSSES, *BOUNDS]


def loss_of(name: str) -> Loss:
    return LOSSES[name]("") if name in LOSSES else BOUNDS[name]().learning_loss  # type: ignore[operator]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_torch_func(name: str) -> None:
    from torch.func import grad, jvp, vmap

    loss = loss_of(name)
    x, y = torch.randn(3, 5, 4, dtype=torch.double), torch.randn(3, 5, 4, dtype=torch.double)
    each = [x[i].clone().requires_grad_() for i in range(3)]
    gradients = torch.stack([torch.autograd.grad(loss(each[i], y[i]), each[i])[0] for i in range(3)])
    torch.testing.assert_close(grad(loss)(x[0], y[0]), gradients[0])
    torch.testing.assert_close(vmap(loss)(x, y), torch.stack([loss(x[i], y[i]) for i in range(3)]))
    torch.testing.assert_close(vmap(grad(loss))(x, y), gradients)
    value, tangent = jvp(lambda a: loss(a, y[0]), (x[0],), (y[1],))
    torch.testing.assert_close(value, loss(x[0], y[0]))
    if name not in ("SMILE", "JensenShannon"):  # their values are not those of the objectives that they differentiate
        torch.testing.assert_close(tangent, (gradients[0] * y[1]).sum())


@pytest.mark.parametrize("name", TRANSFORMED)
def test_batched_slopes_and_dual_numbers(name: str) -> None:
    loss = loss_of(name)
    x, y = torch.randn(5, 4, dtype=torch.double, requires_grad=True), torch.randn(5, 4, dtype=torch.double)
    (want,) = torch.autograd.grad(loss(x, y), x)
    slopes = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)
    (found,) = torch.autograd.grad(loss(x, y), x, slopes, is_grads_batched=True)
    torch.testing.assert_close(found, slopes[:, None, None] * want)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), y)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual, y)).tangent
    torch.testing.assert_close(tangent, (want * y).sum())


def test_vmap_over_a_learnable_temperature() -> None:
    x, y, t = torch.randn(6, 4), torch.randn(6, 4), torch.rand(3) + 0.1
    got = torch.func.vmap(torch.func.grad(lambda s: mk.info_nce(x, y, temperature=s)))(t)
    for i in range(3):
        s = t[i].clone().requires_grad_()
        torch.testing.assert_close(got[i], torch.autograd.grad(mk.info_nce(x, y, temperature=s), s)[0])


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the extension is not built")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86 is slow there, and switched")
def test_kernels_flush_subnormal_results_and_the_callers_mode_stays() -> None:
    """Subnormal results are flushed to zero inside the kernels, and not outside.

    A product with a subnormal number takes a hundred cycles, which made losses of saturated scores 60 times slower.
    Every result here is a product of a number below 1/8 and the weight exp(-86), 4.5e-38.
    """
    a = torch.eye(8, requires_grad=True)
    q, k, v = torch.tensor([[1.0]]), torch.tensor([[0.0], [-86.0]]), torch.tensor([[0.0], [0.01]])
    flushed = {
        "siglip_loss": torch.autograd.grad(mk.siglip_loss(a, a.detach(), 172.0, -86.0, backend="cpu"), a)[0],
        "clip_loss": torch.autograd.grad(mk.clip_loss(a, a.detach(), 86.0, backend="cpu"), a)[0],
        "cross_attention": mk.cross_attention(q[None, None], k[None, None], v[None, None], scale=1.0, backend="cpu"),
    }
    for name, found in flushed.items():
        assert not found.any(), (name, found)
    assert torch.full((3,), torch.finfo(torch.float32).tiny).mul(0.1).gt(0).all()

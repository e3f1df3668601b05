"""The contrastive losses against formulas in fp64; their reductions, options and errors."""

import math

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mk

BACKENDS = ["reference", "chunked", "cpu"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if mk.backends()[request.param] != "available":
        pytest.skip(mk.backends()[request.param])
    return request.param


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def unit(t):
    return t / t.pow(2).sum(-1, keepdim=True).sqrt()


def same(got, want, inputs):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for g, w in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce(backend, reduction, symmetric):
    q, k = features(37, 9), features(37, 9, seed=1)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    s = unit(q) @ unit(k).T / t
    rows = s.logsumexp(1) - s.diagonal()
    if symmetric:
        rows = (rows + s.logsumexp(0) - s.diagonal()) / 2
    want = {"mean": rows.mean(), "sum": rows.sum(), "none": rows}[reduction]
    got = mk.info_nce(q, k, temperature=t, reduction=reduction, symmetric=symmetric, backend=backend)
    assert got.shape == want.shape
    w = torch.linspace(0.5, 1.5, 37, dtype=torch.float64) if reduction == "none" else 1.0
    same((got * w).sum(), (want * w).sum(), [q, k, t])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_losses_of_rows_in_groups_with_ids_differentiate_twice(backend, symmetric, normalize):
    q, k = features(2, 7, 3), features(2, 7, 3, seed=1)
    t = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1, 2, 0, 3, 1, 4], [0, 0, 0, 1, 2, 3, 4]])

    def rows(q, k, t):
        options = {"temperature": t, "reduction": "none", "symmetric": symmetric, "normalize": normalize}
        return mk.info_nce(q, k, query_ids=ids, backend=backend, **options)

    a, b = (unit(q), unit(k)) if normalize else (q, k)
    s = a @ b.mT / t[:, None, None]
    kept = (ids[:, :, None] != ids[:, None, :]) | torch.eye(7, dtype=torch.bool)
    s = s.masked_fill(~kept, -torch.inf)
    want = s.logsumexp(2) - s.diagonal(dim1=1, dim2=2)
    if symmetric:
        want = (want + s.logsumexp(1) - s.diagonal(dim1=1, dim2=2)) / 2
    w = torch.linspace(-1, 2, 14, dtype=torch.float64).view(2, 7)
    same((rows(q, k, t) * w).sum(), (want * w).sum(), [q, k, t])
    assert torch.autograd.gradgradcheck(rows, (q, k, t))


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_info_nce_with_explicit_negatives(backend, mode):
    q, k = features(11, 5), features(11, 5, seed=1)
    n = features(*((7, 5) if mode == "unpaired" else (11, 7, 5)), seed=2)
    positive = (unit(q) * unit(k)).sum(1, keepdim=True)
    negative = unit(q) @ unit(n).T if mode == "unpaired" else torch.einsum("bd,bmd->bm", unit(q), unit(n))
    want = F.cross_entropy(torch.cat([positive, negative], 1) / 0.2, torch.zeros(11, dtype=torch.long))
    same(mk.info_nce(q, k, n, 0.2, negative_mode=mode, backend=backend), want, [q, k, n])


def test_info_nce_in_groups_is_the_mean_of_the_groups(backend):
    q, k = features(2, 3, 10, 4), features(2, 3, 10, 4, seed=1)
    t = torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.2
    want = torch.stack(
        [mk.info_nce(q[i, j], k[i, j], temperature=t[i, j], backend="reference") for i in range(2) for j in range(3)]
    ).mean()
    same(mk.info_nce(q, k, temperature=t, backend=backend), want, [q, k])


def test_equal_ids_are_not_negatives(backend):
    q, k = features(20, 4), features(20, 4, seed=1)
    ids = torch.arange(20) % 7
    s = unit(q) @ unit(k).T / 0.1
    drop = (ids[:, None] == ids[None]) & ~torch.eye(20, dtype=torch.bool)
    s = s.masked_fill(drop, -torch.inf)
    same(mk.info_nce(q, k, query_ids=ids, backend=backend), (s.logsumexp(1) - s.diagonal()).mean(), [q, k])


def test_clip_loss(backend):
    a, b = features(33, 6), features(33, 6, seed=1)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for budget in (0, 1 << 24):
        s = scale * a @ b.T
        want = (F.cross_entropy(s, torch.arange(33)) + F.cross_entropy(s.T, torch.arange(33))) / 2
        same(mk.clip_loss(a, b, scale, memory_budget=budget, backend=backend), want, [a, b, scale])
    bias = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(mk.clip_loss(a, b, scale, bias, backend=backend), want)


@pytest.mark.parametrize("negative_only", [False, True])
def test_siglip_loss(backend, negative_only):
    a, b = features(21, 6), features(21, 6, seed=1)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    z = -torch.ones(21, 21, dtype=torch.float64)
    if not negative_only:
        z += 2 * torch.eye(21)
    want = -F.logsigmoid(z * (scale * a @ b.T + bias)).sum() / 21
    same(mk.siglip_loss(a, b, scale, bias, negative_only=negative_only, backend=backend), want, [a, b, scale, bias])


def test_nt_xent(backend):
    a, b = features(13, 6), features(13, 6, seed=1)
    z = unit(torch.cat([a, b]))
    s = (z @ z.T / 0.4).masked_fill(torch.eye(26, dtype=torch.bool), -torch.inf)
    target = (torch.arange(26) + 13) % 26
    same(mk.nt_xent(a, b, 0.4, backend=backend), F.cross_entropy(s, target), [a, b])


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("labelled", [True, False])
def test_sup_con(backend, mode, labelled):
    x = features(9, 3, 5)
    labels = torch.tensor([0, 1, 1, 2, 0, 3, 2, 2, 4]) if labelled else None
    of = labels if labelled else torch.arange(9)
    z = torch.cat([x[:, v] for v in range(3)])
    lab = of.repeat(3)
    s = z @ z.T / 0.2
    total, anchors = 0.0, 27 if mode == "all" else 9
    for i in range(anchors):
        others = [j for j in range(27) if j != i]
        positives = [j for j in others if lab[j] == lab[i]]
        total = total + s[i, others].logsumexp(0) - s[i, positives].mean()
    want = total / anchors * (0.2 / 0.07)
    same(mk.sup_con(x, labels, temperature=0.2, contrast_mode=mode, backend=backend), want, [x])


def test_sup_con_leaves_out_anchors_without_a_positive(backend):
    x = features(4, 1, 5)
    labels = torch.tensor([0, 0, 1, 2])
    got = mk.sup_con(x, labels, backend=backend)
    s = x[:, 0] @ x[:, 0].T / 0.07
    s = s.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
    same(got, (s[0].logsumexp(0) - s[0, 1] + s[1].logsumexp(0) - s[1, 0]) / 2, [x])


def test_a_converged_loss_keeps_its_digits(backend):
    """For a loss near exp(-10), a rounded log-sum-exp minus the positive score would be wrong in the third digit."""
    q = torch.eye(8) * 3
    loss = mk.info_nce(q, q, temperature=0.1, backend=backend)
    want = math.log1p(7 * math.exp(-10.0))
    assert loss.item() == pytest.approx(want, rel=1e-3 if backend == "cpu" else 1e-2)


def test_losses_never_exceed_log_n_below_and_stay_finite_at_logits_of_500(backend):
    q = features(40, 6).detach().float()
    loss = mk.info_nce(q, q.flip(0), temperature=0.002, backend=backend)
    assert torch.isfinite(loss) and loss >= 0
    zero = mk.info_nce(torch.zeros(40, 6), torch.zeros(40, 6), backend=backend)
    assert zero.item() == pytest.approx(math.log(40), rel=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_nan_or_infinite_feature_shows_in_the_loss(backend, poison, dtype):
    q = features(70, 6).detach().to(dtype)
    q[3, 2] = poison
    for loss in (
        mk.info_nce(q, q.flip(0), normalize=False, backend=backend),
        mk.info_nce(q, q.flip(0), symmetric=True, backend=backend),
        mk.info_nce(q.clone().requires_grad_(), q.flip(0), backend=backend),
        mk.clip_loss(q, q.flip(0), 2.0, backend=backend),
        mk.nt_xent(q, q.flip(0), backend=backend),
    ):
        assert not torch.isfinite(loss)
    assert not torch.isfinite(mk.siglip_loss(q, q.flip(0), 2.0, 0.0, backend=backend)) or poison == math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_features_give_fp32_losses_and_sixteen_bit_gradients(backend, dtype):
    q = features(30, 8).detach().to(dtype).requires_grad_()
    loss = mk.info_nce(q, q.detach().flip(0), backend=backend)
    (g,) = torch.autograd.grad(loss, q)
    assert loss.dtype == torch.float32 and g.dtype == dtype and torch.isfinite(g).all()


def test_autocast_keeps_sixteen_bit_features(backend):
    x = features(30, 8).detach().float()
    layer = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mk.info_nce(layer(x), layer(x.flip(0)), backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32


def test_compiles_into_one_graph(backend):
    functions = [
        lambda a, b, t: mk.info_nce(a, b, temperature=t, symmetric=True, backend=backend),
        lambda a, b, t: mk.info_nce(a, b, temperature=t, reduction="none", backend=backend).square().sum(),
        lambda a, b, t: mk.clip_loss(a, b, 1 / t, backend=backend),
        lambda a, b, t: mk.siglip_loss(a, b, 1 / t, -t, backend=backend),
        lambda a, b, t: mk.nt_xent(a, b, t, backend=backend),
    ]
    a, b = features(17, 5), features(17, 5, seed=1)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    for function in functions:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        same(compiled(a, b, t), function(a, b, t), [a, b, t])
    # With fp32 features, the log-sum-exps between the operators are fp64.
    single = [v.detach().float().requires_grad_() for v in (a, b, t)]
    compiled = torch.compile(functions[1], fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*single), single) for f in (compiled, functions[1]))
    torch.testing.assert_close(got, want)


def test_backend_context_and_environment(monkeypatch):
    q = features(5, 3)
    with mk.use_backend("reference"):
        inside = mk.info_nce(q, q.flip(0))
    torch.testing.assert_close(inside, mk.info_nce(q, q.flip(0)))
    monkeypatch.setenv("MI_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="MI_KERNELS_BACKEND"):
        mk.info_nce(q, q)
    with pytest.raises(ValueError, match="name must be one of"):
        mk.use_backend("nonsense")


def test_a_backend_named_by_the_caller_never_falls_back():
    if mk.backends()["triton"] == "available":
        pytest.skip("triton is available here")
    with pytest.raises(RuntimeError, match="backend 'triton' was requested"):
        mk.info_nce(torch.randn(4, 3), torch.randn(4, 3), backend="triton")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: mk.info_nce(q, q[:-1]), "query .* and positive_key"),
        (lambda q: mk.info_nce(q, q, temperature=0.0), "temperature must be positive"),
        (lambda q: mk.info_nce(q, q, temperature=-1.0), "temperature must be positive"),
        (lambda q: mk.info_nce(q, q, temperature=math.nan), "temperature must be positive"),
        (lambda q: mk.info_nce(q, q, temperature=torch.tensor(math.inf)), "temperature must be positive"),
        (lambda q: mk.info_nce(q, q, reduction="median"), "reduction must be"),
        (lambda q: mk.info_nce(q, q, q, negative_mode="both"), "negative_mode must be"),
        (lambda q: mk.info_nce(q, q, q, symmetric=True), "negative_keys cannot"),
        (lambda q: mk.info_nce(q, q, q, negative_mode="paired"), "negative_keys must have shape"),
        (lambda q: mk.info_nce(q, q, q.expand(6, 6, 4)[..., :3], negative_mode="paired"), "negative_keys must have"),
        (lambda q: mk.siglip_loss(q, q, 1.0, torch.zeros(2)), "logit_bias must be one number"),
        (lambda q: mk.info_nce(q[:0], q[:0]), "not be empty"),
        (lambda q: mk.nt_xent(q, q, 0), "temperature must be positive"),
        (lambda q: mk.sup_con(q), "features must have shape"),
        (lambda q: mk.sup_con(q[:, None], torch.zeros(3)), "labels must be of an integer type"),
        (lambda q: mk.sup_con(q[:, None], contrast_mode="some"), "contrast_mode must be"),
        (lambda q: mk.clip_loss(q, q[:, :-1], 1.0), "must have one shape"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 4))

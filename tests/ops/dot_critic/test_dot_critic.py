"""The dot critic against an independent fp64 formula: statistics, gradients, shapes, dtypes, memory, errors."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mi_kernels import backends
from mi_kernels.ops.dot_critic import api, dispatch
from mi_kernels.ops.dot_critic.schema import SIGNED
from tests.ops.dot_critic import large_scores

BACKENDS = ["reference", "chunked", "cpu"]
SHAPES = [
    (1, 1, 1, 1),
    (1, 2, 3, 5),
    (2, 7, 7, 3),
    (1, 64, 64, 64),
    (3, 33, 65, 17),
    (1, 131, 131, 129),
    (2, 200, 70, 65),
    (1, 1100, 1030, 3),  # more scores than the CPU kernel keeps without a budget
]
PAIRS = ["all", "off_diagonal", "unequal_ids", "unequal_ids_or_positive"]


def available(name):
    reason = backends()[name]
    if reason != "available":
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request):
    return available(request.param)


def draw(groups, rows, columns, depth, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    tensors = {
        "x": normal(groups, rows, depth),
        "y": normal(groups, columns, depth),
        "scale": (torch.rand(groups, generator=generator).double() / depth**0.5 + 0.2).float().requires_grad_(),
        "row_bias": normal(groups, rows).detach().float().requires_grad_(),
        "col_bias": normal(groups, columns).detach().float().requires_grad_(),
    }
    ids = {
        "row_ids": torch.randint(0, 4, (groups, rows), generator=generator),
        "col_ids": torch.randint(0, 4, (groups, columns), generator=generator),
    }
    return tensors, ids


def oracle_scores(t, ids, pairs, shift):
    """Unmasked and masked fp64 scores, computed without the package's code."""
    wide = {k: v.double() for k, v in t.items()}
    s = torch.einsum("gbd,gnd->gbn", wide["x"], wide["y"]) * wide["scale"].reshape(-1, 1, 1)
    s = s + wide["row_bias"].unsqueeze(2) + wide["col_bias"].unsqueeze(1)
    rows, columns = s.shape[1:]
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None]
    equal = ids["row_ids"][:, :, None] == ids["col_ids"][:, None, :]
    forbidden = {
        "all": torch.zeros_like(s, dtype=torch.bool),
        "off_diagonal": (i == j).expand_as(s),
        "unequal_ids": equal,
        "unequal_ids_or_positive": equal & (j != (i + shift) % columns),
    }[pairs]
    return s, s.masked_fill(forbidden, -torch.inf)


def oracle_loss(t, ids, pairs, shift, weights, signed):
    s, masked = oracle_scores(t, ids, pairs, shift)
    rows, columns = s.shape[1:]
    j = torch.tensor([(i + max(shift, 0)) % columns for i in range(rows)])
    positive = s[:, torch.arange(rows), j]
    w_row, w_col, w_soft, w_pos = weights
    total = 0.0
    if w_row:
        total = total + w_row * masked.logsumexp(2).sum(1)
    if w_col:
        total = total + w_col * masked.logsumexp(1).sum(1)
    if w_soft:
        sign = torch.ones_like(s)
        if signed:
            sign[:, torch.arange(rows), j] = -1
        total = total + w_soft * torch.nn.functional.softplus(masked * sign).masked_fill(masked == -torch.inf, 0).sum(
            (1, 2)
        )
    if w_pos:
        total = total - w_pos * positive.sum(1)
    return total


def relative(got, want):
    return ((got.double() - want).norm() / (want.norm() + 1e-12)).item()


CASES = [
    ("all", 0, (0.5, 0, 0, 0.4), False, 0),
    ("all", 2, (0.5, 0.25, 0, 0.75), False, 0),
    ("all", 0, (0.5, 0.25, 0, 0.75), False, 1 << 30),
    ("all", 0, (0, 0, 0.3, 0), True, 0),
    ("all", -1, (0, 0.7, 0, 0), False, 0),
    ("unequal_ids_or_positive", 0, (0.5, 0.25, 0, 0.7), False, 0),
    ("unequal_ids_or_positive", 1, (0.5, 0, 0, 0.3), False, 0),
    ("off_diagonal", 1, (0.5, 0, 0, 0.4), False, 0),
    ("off_diagonal", -1, (0, 0, 0.3, 0), False, 0),
]


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_every_gradient_match_the_fp64_formula(backend, shape, case, dtype):
    pairs, shift, weights, signed, budget = case
    t, ids = draw(*shape, dtype=dtype)
    names = dict(w_row=weights[0], w_col=weights[1], w_soft=weights[2], w_pos=weights[3])
    prepared = api.prepare(
        t["x"],
        t["y"],
        t["scale"],
        row_bias=t["row_bias"],
        col_bias=t["col_bias"],
        pairs=pairs,
        positive_shift=shift,
        **ids,
    )
    got = api.loss(prepared, **names, soft_signed=signed, memory_budget=budget, backend=backend)
    want = oracle_loss(t, ids, pairs, shift, weights, signed)
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite)
    if not finite.all():
        return
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert relative(got, want) < tolerance
    grads = torch.autograd.grad(got.sum(), list(t.values()), allow_unused=True)
    wants = torch.autograd.grad(want.sum(), list(t.values()), allow_unused=True)
    for name, g, w in zip(t, grads, wants, strict=True):
        # scale and biases are fp32 leaves, so their gradients are rounded to fp32 whatever the dtype
        bound = tolerance if name in "xy" else max(tolerance, 2e-7)
        assert (g.double() - w.double()).norm() <= bound * (w.double().norm() + want.abs().sum()), name


def three(found):
    return found.row_lse, found.col_lse, found.row_softplus


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", PAIRS[:3])
def test_statistics_and_gradients_under_arbitrary_weights(backend, shape, pairs):
    t, ids = draw(*shape)
    got = api.statistics(
        t["x"],
        t["y"],
        t["scale"],
        row_bias=t["row_bias"],
        col_bias=t["col_bias"],
        pairs=pairs,
        stats=("row_lse", "col_lse", "row_softplus"),
        backend=backend,
        **ids,
    )
    _s, masked = oracle_scores(t, ids, pairs, -1)
    soft = torch.nn.functional.softplus(masked).masked_fill(masked == -torch.inf, 0).sum(2)
    weighted, want = 0.0, 0.0
    for index, (a, b) in enumerate(zip(three(got), (masked.logsumexp(2), masked.logsumexp(1), soft), strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        w = torch.randn(b.shape, generator=torch.Generator().manual_seed(index)).double()
        keep = torch.isfinite(b)
        weighted = weighted + (w * a)[keep].sum()
        want = want + (w * b)[keep].sum()
    if want.requires_grad and isinstance(want, torch.Tensor) and torch.isfinite(masked).any():
        grads = torch.autograd.grad(weighted, [t["x"], t["y"]], allow_unused=True)
        wants = torch.autograd.grad(want, [t["x"], t["y"]], allow_unused=True)
        for g, w in zip(grads, wants, strict=True):
            if torch.isfinite(w).all():
                torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
            assert torch.isfinite(g).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", PAIRS[:3])
def test_clipped_log_sums_are_those_of_clamped_scores_and_carry_no_gradient(backend, shape, pairs):
    t, ids = draw(*shape)
    biases = dict(row_bias=t["row_bias"], col_bias=t["col_bias"], **ids)
    stats = ("row_lse", "col_lse", "row_softplus")
    got = api.statistics(t["x"], t["y"], t["scale"], **biases, pairs=pairs, stats=stats, clip=0.9, backend=backend)
    s, masked = oracle_scores(t, ids, pairs, -1)
    assert shape[1] < 7 or (s.abs() > 0.9).any()
    clamped = s.clamp(-0.9, 0.9).masked_fill(masked == -torch.inf, -torch.inf)
    soft = torch.nn.functional.softplus(masked).masked_fill(masked == -torch.inf, 0).sum(2)
    for a, b in zip(three(got), (clamped.logsumexp(2), clamped.logsumexp(1), soft), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert not a.requires_grad
    beyond = api.statistics(t["x"], t["y"], t["scale"], **biases, pairs=pairs, clip=1e6, backend=backend)
    plain = api.statistics(t["x"], t["y"], t["scale"], **biases, pairs=pairs, backend=backend)
    assert torch.equal(beyond.row_lse, plain.row_lse)


def test_clipping_leaves_out_what_a_bias_of_minus_infinity_leaves_out_and_keeps_nan(backend):
    t, _ = draw(1, 9, 9, 3, torch.float32)
    hole = torch.zeros(1, 9).index_fill(1, torch.tensor([4]), -torch.inf)
    got = api.statistics(t["x"], t["y"], 50.0, col_bias=hole, clip=2.0, backend=backend).row_lse
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    want = (50 * t["x"] @ t["y"].mT).clamp(-2, 2)[..., keep].logsumexp(2)
    torch.testing.assert_close(got, want.detach())
    x = t["x"].detach().index_fill(1, torch.tensor([2]), torch.nan)
    found = api.statistics(x, t["y"], 50.0, clip=2.0, backend=backend).row_lse
    assert found.isnan().squeeze(0).tolist() == [i == 2 for i in range(9)]


def test_turning_the_positive_pairs_changes_softplus_sums_alone(backend):
    t, ids = draw(2, 33, 65, 17)
    problem = [t["x"], t["y"], t["scale"].double(), t["row_bias"].double(), t["col_bias"].double()]
    problem = [v.detach() for v in problem] + [ids["row_ids"], ids["col_ids"], 0, 3]
    run = torch.ops.mi_kernels.dot_critic_stats
    plain, signed = (run(*problem, bits, math.inf, backend) for bits in (7, 7 | SIGNED))
    for a, b in zip(plain[:2], signed[:2], strict=True):
        torch.testing.assert_close(a, b)
    positive = oracle_scores(t, ids, "all", 3)[0][:, torch.arange(33), (torch.arange(33) + 3) % 65]
    torch.testing.assert_close(plain[2] - signed[2], positive.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_torch(backend, dtype):
    t, _ = draw(1, 150, 150, 72, dtype)
    x, y = t["x"], t["y"]

    def plain(a, b):
        return torch.nn.functional.cross_entropy((a[0] @ b[0].T) * 0.2, torch.arange(150))

    def ours(a, b):
        return api.loss(api.prepare(a, b, 0.2, positive_shift=0), w_row=1 / 150, w_pos=1 / 150, backend=backend)[0]

    a, b = (v.detach().double().requires_grad_() for v in (x, y))
    scores = (a[0] @ b[0].T) * 0.2
    exact = (scores.logsumexp(1) - scores.diagonal()).mean()
    exact_wide = torch.autograd.grad(exact, [a, b])
    mine, eager = ours(x, y), plain(x, y)
    assert abs(mine.double() - exact) <= 2 * abs(eager.double() - exact) + 1e-6 * exact
    for g, e, w in zip(torch.autograd.grad(mine, [x, y]), torch.autograd.grad(eager, [x, y]), exact_wide, strict=True):
        assert (g.double() - w).norm() <= 2 * (e.double() - w).norm() + 1e-6 * w.norm()


def test_medium_precision_keeps_bf16_accuracy():
    available("cpu")
    t, _ = draw(1, 150, 150, 72, torch.float32)
    prepared = api.prepare(t["x"], t["y"], 0.2, positive_shift=0)
    exact = api.loss(prepared, w_row=1.0, w_pos=1.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        low = api.loss(prepared, w_row=1.0, w_pos=1.0)
        g = torch.autograd.grad(low.sum(), t["x"])[0]
    finally:
        torch.set_float32_matmul_precision(before)
    want = torch.autograd.grad(exact.sum(), t["x"])[0]
    assert relative(low, exact.double()) < 1e-2
    assert relative(g, want.double()) < 2e-2


def test_gradcheck_and_gradgradcheck(backend):
    t, ids = draw(2, 5, 6, 3)
    leaves = [t[k].detach().double().requires_grad_() for k in t]

    def loss(x, y, scale, a, b):
        prepared = api.prepare(
            x, y, scale, row_bias=a, col_bias=b, pairs="unequal_ids_or_positive", positive_shift=1, **ids
        )
        return api.loss(prepared, w_row=0.5, w_col=0.3, w_pos=0.6, backend=backend)

    def stats(x, y, scale, a, b):
        found = api.statistics(
            x, y, scale, row_bias=a, col_bias=b, stats=("row_lse", "col_lse", "row_softplus"), backend=backend
        )
        return three(found)

    for function in (loss, stats):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_opcheck_accepts_the_operators(backend):
    t, ids = draw(2, 5, 6, 3)
    problem = [
        v.detach() for v in (t["x"], t["y"], t["scale"].double(), t["row_bias"].double(), t["col_bias"].double())
    ]
    problem += [ids["row_ids"], ids["col_ids"], 3, 1]
    ops = torch.ops.mi_kernels
    row, col, _soft = ops.dot_critic_stats(*problem, 7, math.inf, backend)
    for clip in (math.inf, 0.7):
        torch.library.opcheck(ops.dot_critic_stats.default, (*problem, 7, clip, backend))
    torch.library.opcheck(ops.dot_critic_loss.default, (*problem, 0.5, 0.25, 0.0, 0.5, False, True, 31, 0, backend))
    weights = (row, col, torch.ones_like(row), torch.ones_like(col), None, torch.ones_like(row))
    torch.library.opcheck(ops.dot_critic_grad.default, (*problem, *weights, False, 31, backend))


def test_outputs_have_the_types_that_a_compiled_graph_expects(backend):
    """Real and fake operators return the same dtypes and shapes; for fp32 inputs all log-sum-exps, also those not
    requested, are fp64."""
    t, _ = draw(2, 5, 6, 3, torch.float32)
    problem = (t["x"].detach(), t["y"].detach(), torch.ones(2), None, None, None, None, 0, 0)
    operator = torch.ops.mi_kernels.dot_critic_stats
    for stats in range(1, 8):
        found = operator(*problem, stats, math.inf, backend)
        with FakeTensorMode() as mode:
            given = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in problem]
            wanted = operator(*given, stats, math.inf, backend)
        assert [(v.dtype, v.shape) for v in found] == [(v.dtype, v.shape) for v in wanted], stats


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("symmetric", [False, True])
def test_results_are_the_same_bits_twice_and_survive_a_permutation(backend, symmetric):
    t, _ = draw(1, 190, 190, 40, torch.float32)
    x, y = t["x"].detach(), t["y"].detach()
    order = torch.randperm(190, generator=torch.Generator().manual_seed(3))

    def run(a, b):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = api.loss(
            api.prepare(a, b, 0.3, positive_shift=0), w_row=0.5, w_col=0.5 * symmetric, w_pos=0.5, backend=backend
        )
        return value, *torch.autograd.grad(value.sum(), [a, b])

    first, second, permuted = run(x, y), run(x, y), run(x[:, order], y[:, order])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(first[0], permuted[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first[1][:, order], permuted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stats", [("row_lse",), ("row_lse", "col_lse")])
def test_scores_of_very_different_sizes_stay_exact(backend, stats):
    """Some columns' scores lie hundreds of nats below the others: exponentials with a shared maximum would
    underflow."""
    t, _ = draw(1, 80, 80, 8, torch.float32)
    bias = torch.linspace(-500, 500, 80)[None]
    got = api.statistics(t["x"], t["y"], 1.0, row_bias=bias.flip(1), col_bias=bias, stats=stats, backend=backend)
    s = (t["x"].double() @ t["y"].double().mT) + bias.flip(1)[..., None] + bias[:, None]
    torch.testing.assert_close(got.row_lse.double(), s.logsumexp(2), rtol=1e-6, atol=1e-4)
    if got.col_lse is not None:
        torch.testing.assert_close(got.col_lse.double(), s.logsumexp(1), rtol=1e-6, atol=1e-4)
        total = got.row_lse.sum() + got.col_lse.sum()
        g = torch.autograd.grad(total, t["x"])[0]
        want = torch.autograd.grad(s.logsumexp(2).sum() + s.logsumexp(1).sum(), t["x"])[0]
        assert relative(g, want.double()) < 1e-4


def test_inputs_may_be_strided_expanded_or_shorter_in_precision(backend):
    t, _ = draw(1, 12, 12, 6, torch.float32)
    x = t["x"].detach()[0]
    strided = torch.stack([x, -x], -1)[..., 0]
    want = api.statistics(x, x, 0.5, backend=backend).row_lse
    torch.testing.assert_close(api.statistics(strided, strided, 0.5, backend=backend).row_lse, want)
    torch.testing.assert_close(api.statistics(x.T.contiguous().T, x, 0.5, backend=backend).row_lse, want)
    expanded = api.statistics(x[:1].expand(12, 6), x, 0.5, backend=backend).row_lse
    torch.testing.assert_close(expanded, want[:1].expand(12), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_going_back_twice_gives_the_same_gradients_whatever_happened_to_the_first(backend, groups):
    t, _ = draw(groups, 9, 9, 5, torch.float32)
    x, y, scale = t["x"], t["y"], torch.tensor(0.4, requires_grad=True)
    loss = api.loss(api.prepare(x, y, scale, positive_shift=0), w_row=1.0, w_pos=1.0, backend=backend).sum()
    first = torch.autograd.grad(loss, (x, y, scale), retain_graph=True)
    want = [g.clone() for g in first]
    with torch.no_grad():
        for g in first:
            g.zero_()
    loss.backward(retain_graph=True)
    loss.backward()
    for leaf, g in zip((x, y, scale), want, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * g)
    assert all(g.count_nonzero() for g in want)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("groups", "rows"), [(1, 40), (3, 37), (1, 2100)])
def test_losses_of_rows_whether_or_not_their_scores_are_kept(backend, symmetric, groups, rows):
    t, ids = draw(groups, rows, rows, 6, torch.float32)
    names = ("x", "y", "scale", "row_bias", "col_bias")
    leaves = [t[name] for name in names]
    slopes = torch.linspace(-1, 2, groups * rows).reshape(groups, rows)
    prepared = api.prepare(*leaves[:3], row_bias=t["row_bias"], col_bias=t["col_bias"], positive_shift=0)
    found = api.row_losses(prepared, symmetric=symmetric, normalize=True, backend=backend)
    with torch.no_grad():
        value = api.row_losses(prepared, symmetric=symmetric, normalize=True, backend=backend)
    unit = {k: v.double() for k, v in t.items()}
    unit["x"], unit["y"] = (torch.nn.functional.normalize(unit[k], dim=-1) for k in "xy")
    scores, _ = oracle_scores(unit, ids, "all", 0)
    lse = scores.logsumexp(2)
    if symmetric:
        lse = (lse + scores.logsumexp(1)) / 2
    wanted = lse - scores.diagonal(0, 1, 2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, found.detach())
    threads = torch.get_num_threads()
    want = torch.autograd.grad(wanted, leaves, slopes.double())
    try:
        for count in (threads, 1):  # with another number of threads, the kept scores are tiled differently
            torch.set_num_threads(count)
            for g, w in zip(torch.autograd.grad(found, leaves, slopes, retain_graph=True), want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


def test_losses_and_gradients_may_be_changed_in_place(backend):
    t, _ = draw(1, 8, 8, 4, torch.float32)
    x, y = t["x"][0].detach().requires_grad_(), t["y"][0].detach().requires_grad_()
    loss = api.loss(api.prepare(x, y, 0.3, positive_shift=0), w_row=1.0, w_pos=1.0, backend=backend)
    wanted = 2 * float(loss.detach()) + 1
    loss *= 2
    loss += 1
    loss.backward()
    assert float(loss.detach()) == pytest.approx(wanted)
    want = x.grad.clone()
    x.grad += 1
    torch.testing.assert_close(x.grad, want + 1)
    rows = api.row_losses(api.prepare(x, y, 0.3, positive_shift=0), normalize=True, backend=backend)
    wanted = 2 * rows.detach() + 1
    rows *= 2
    rows += 1
    torch.testing.assert_close(rows.detach(), wanted)
    rows.sum().backward()


def test_no_gradient_is_computed_where_autograd_does_not_record(backend, monkeypatch):
    t, _ = draw(1, 9, 9, 5, torch.float32)
    prepared, asked, run = api.prepare(t["x"], t["y"], t["scale"], positive_shift=0), [], dispatch.run_loss

    def spy(*arguments):
        asked.append(arguments[3])
        return run(*arguments)

    monkeypatch.setattr(dispatch, "run_loss", spy)
    recorded = api.loss(prepared, w_row=1.0, w_pos=1.0, backend=backend)
    with torch.no_grad():
        value = api.loss(prepared, w_row=1.0, w_pos=1.0, backend=backend)
    assert recorded.requires_grad and not value.requires_grad
    torch.testing.assert_close(value, recorded.detach())
    assert asked[0] and asked[1] == 0


def test_memory_kept_for_backward_is_linear_in_the_batch(backend):
    def saved(batch):
        t, _ = draw(1, batch, batch, 16, torch.float32)
        kept = set()
        total = 0

        def pack(tensor):
            nonlocal total
            if tensor.data_ptr() not in kept:
                kept.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            loss = api.loss(api.prepare(t["x"], t["y"], 0.3, positive_shift=0), w_row=1.0, w_pos=1.0, backend=backend)
        for gradient in loss.grad_fn.gradients:
            if gradient is not None:
                pack(gradient)  # an attribute of the node, not a saved tensor
        return total

    small, large = saved(128), saved(512)
    assert large <= 4.2 * small
    assert large < 512 * 512 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "x must have shape.*not be empty"),
        ({"x": torch.zeros(3)}, "x must have shape"),
        ({"x": torch.zeros(4, 5)}, "must agree"),
        ({"x": torch.zeros(2, 4, 3)}, "must agree"),
        ({"x": torch.zeros(4, 3, dtype=torch.long)}, "x must be float"),
        ({"x": torch.zeros(4, 3, dtype=torch.float64)}, "one dtype"),
        ({"x": torch.zeros(4, 3, device="meta")}, "y is on cpu"),
        ({"scale": torch.ones(3)}, "scale must be"),
        ({"row_bias": torch.ones(7)}, "row_bias must have shape"),
        ({"pairs": "some"}, "pairs must be one of"),
        ({"pairs": "unequal_ids"}, "needs row_ids"),
        ({"row_ids": torch.zeros(4)}, "row_ids must hold integers"),
        ({"stats": ("median",)}, "stats must name"),
        ({"backend": "fast"}, "backend must be one of"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": math.nan}, "clip must be positive"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"x": torch.zeros(4, 3), "y": torch.zeros(5, 3), **change}
    with pytest.raises(ValueError, match=message):
        api.statistics(**arguments)


@pytest.mark.parametrize("name", large_scores.CALLS)
def test_a_large_common_score_does_not_round_the_gradient(backend, name):
    assert large_scores.error(name, backend) <= 2e-6

"""mi_kernels.compat.lightly against fp64 formulas and, where installed, lightly."""

import io
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat import lightly
from tests.compat.originals import draw, largest_saved, original, parameters, same


def theirs(module):
    parents = ["lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils"]
    return original(module, *parents, "lightly.models.utils")


def nt_xent(one, two, temperature):
    views = F.normalize(torch.cat([one, two]), dim=1)
    scores = (views @ views.T / temperature).masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views)).roll(len(one)))


def moco(one, two, bank, temperature):
    one, two = F.normalize(one, dim=1), F.normalize(two, dim=1)
    logits = torch.cat([(one * two).sum(1, keepdim=True), one @ bank.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(one), dtype=torch.long))


def dcl(one, two, temperature, weight_fn=None):
    one, two = F.normalize(one, dim=1), F.normalize(two, dim=1)
    other = ~torch.eye(len(one), dtype=torch.bool)
    total = 0
    for a, b in ((one, two), (two, one)):
        rest = torch.cat([(a @ a.T)[other].view(len(a), -1), (a @ b.T)[other].view(len(a), -1)], 1) / temperature
        weight = 1 if weight_fn is None else weight_fn(a, b)
        total = total + (rest.logsumexp(1) - weight * (a * b).sum(1) / temperature).mean() / 2
    return total


def test_signatures():
    assert parameters(lightly.NTXentLoss) == ["temperature=0.5", "memory_bank_size=0", "gather_distributed=False"]
    assert parameters(lightly.NTXentLoss.forward) == ["out0", "out1"]
    assert parameters(lightly.MemoryBankModule) == [
        "size=65536",
        "gather_distributed=False",
        "feature_dim_first=True",
        "start='random'",
        "wrap=False",
    ]
    assert parameters(lightly.MemoryBankModule.forward) == ["output", "labels=None", "update=False"]
    assert parameters(lightly.DCLLoss) == ["temperature=0.1", "weight_fn=None", "gather_distributed=False"]
    assert parameters(lightly.DCLWLoss) == ["temperature=0.1", "sigma=0.5", "gather_distributed=False"]
    assert lightly.NTXentLoss().state_dict() == {} and lightly.DCLLoss().state_dict() == {}


@pytest.mark.parametrize("temperature", [0.5, 0.07, -0.3])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_nt_xent(temperature, oracle):
    one, two = draw(7, 4), draw(7, 4, seed=1)
    if oracle == "formula":
        want = nt_xent(one, two, temperature)
    else:
        want = theirs("lightly.loss.ntx_ent_loss").NTXentLoss(temperature)(one, two)
    same(lightly.NTXentLoss(temperature)(one, two), want, [one, two])


@pytest.mark.parametrize("kind", ["plain", "weight_fn", "mises_fisher"])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_dcl(kind, oracle):
    one, two = draw(7, 4), draw(7, 4, seed=1)

    def mises_fisher(a, b):
        return 2 - len(a) * ((a.detach() * b.detach()).sum(1) / 0.5).softmax(0)

    weight_fn = {"plain": None, "weight_fn": lambda a, b: (a - b).pow(2).sum(1), "mises_fisher": mises_fisher}[kind]
    got = lightly.DCLWLoss(0.2)(one, two) if kind == "mises_fisher" else lightly.DCLLoss(0.2, weight_fn)(one, two)
    if oracle == "formula":
        want = dcl(one, two, 0.2, weight_fn)
    else:
        module = theirs("lightly.loss.dcl_loss")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            want = (module.DCLWLoss(0.2) if kind == "mises_fisher" else module.DCLLoss(0.2, weight_fn))(one, two)
    same(got, want, [one, two])


def own_bank(temperature, size, **options):
    loss = lightly.NTXentLoss(temperature, size)
    loss.memory_bank = lightly.MemoryBankModule(size, **options)
    return loss.double()


@pytest.mark.parametrize("temperature", [0.2, -0.3])
def test_memory_bank_starts_with_random_unit_rows_and_drops_what_does_not_fit(temperature):
    loss = lightly.NTXentLoss(temperature, (12, 3)).double()
    slots = loss.memory_bank.bank.clone()
    torch.testing.assert_close(slots.norm(dim=1), torch.ones(12, dtype=torch.float64))
    pointer = 0
    for step in range(6):
        one, two = draw(5, 3, seed=2 * step), draw(5, 3, seed=2 * step + 1)
        same(loss(one, two), moco(one, two, slots.clone(), temperature), [one, two])
        kept = F.normalize(two.detach(), dim=1)[: 12 - pointer]
        slots[pointer : pointer + len(kept)] = kept
        pointer = (pointer + len(kept)) % 12
        torch.testing.assert_close(loss.memory_bank.bank, slots)


def test_memory_bank_equals_the_originals_from_the_first_step():
    module = theirs("lightly.loss.ntx_ent_loss")
    torch.manual_seed(0)
    mine = lightly.NTXentLoss(0.2, (8, 3)).double()
    torch.manual_seed(0)
    other = module.NTXentLoss(0.2, (8, 3)).double()
    for step in range(5):
        one, two = draw(3, 3, seed=2 * step), draw(3, 3, seed=2 * step + 1)
        same(mine(one, two), other(one, two), [one, two])


@pytest.mark.parametrize("temperature", [0.2, -0.3])
def test_bank_that_starts_empty_and_wraps_holds_what_was_seen(temperature):
    loss = own_bank(temperature, (12, 3), start="empty", wrap=True)
    kept = torch.zeros(0, 3, dtype=torch.float64)
    slots = torch.zeros(12, 3, dtype=torch.float64)
    for step in range(6):
        one, two = draw(5, 3, seed=2 * step), draw(5, 3, seed=2 * step + 1)
        want = moco(one, two, kept, temperature)
        same(loss(one, two), want, [one, two])
        slots[(step * 5 + torch.arange(5)) % 12] = F.normalize(two.detach(), dim=1)
        kept = slots[: min(12, 5 * step + 5)].clone()
        torch.testing.assert_close(loss.memory_bank.bank, slots)


def test_bank_that_starts_empty_gives_no_loss_at_first():
    loss = own_bank(0.2, (8, 3), start="empty")
    one, two = draw(4, 3), draw(4, 3, seed=1)
    value = loss(one, two)
    value.backward()
    assert value == 0 and (one.grad == 0).all()


def test_bank_of_a_new_module_is_not_empty_for_subclasses():
    class Nearest(lightly.MemoryBankModule):
        def forward(self, output, update=False):
            output, bank = super().forward(output, update=update)
            bank = bank.T
            return bank[(output @ bank.T).argmax(1)]

    nearest = Nearest((16, 3), feature_dim_first=True)
    rows = nearest(torch.randn(5, 3), update=True)
    assert rows.shape == (5, 3) and rows.isfinite().all()


@pytest.mark.parametrize("size", [(6, 2, 3), 6])
def test_bank_takes_features_of_more_dimensions(size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank = lightly.MemoryBankModule(size)
    batch = torch.randn(4, 2, 3)
    _, before = bank(batch, update=True)
    _, after = bank(batch)
    assert before.shape == after.shape == (3, 2, 6)
    assert torch.equal(after.transpose(0, -1)[:4], batch) and not torch.equal(before, after)


def test_weighted_loss_can_be_pickled():
    loss = lightly.DCLWLoss(0.2, sigma=0.7)
    again = pickle.loads(pickle.dumps(loss))
    one, two = draw(4, 3), draw(4, 3, seed=1)
    assert again(one, two) == loss(one, two) != lightly.DCLWLoss(0.2, sigma=0.1)(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_zeros_are_finite_in_16_bits_and_do_not_spoil_the_bank(dtype):
    one, two = draw(4, 3, dtype=dtype).detach(), draw(4, 3, seed=1, dtype=dtype).detach()
    one[1], two[2] = 0, 0
    for loss in (lightly.NTXentLoss(0.2, (8, 3)), lightly.DCLLoss(0.2), lightly.DCLWLoss(0.2)):
        x, y = one.clone().requires_grad_(), two.clone().requires_grad_()
        value = loss(x, y)
        value.backward()
        assert value.dtype == torch.float32 and value.isfinite()
        assert x.grad[0].isfinite().all() and y.grad[0].isfinite().all()
        if isinstance(loss, lightly.NTXentLoss):
            assert loss.memory_bank.bank.isfinite().all()


def test_bank_does_not_change_without_a_gradient_or_before_backward():
    loss = lightly.NTXentLoss(0.2, (8, 3)).double()
    one, two = draw(4, 3), draw(4, 3, seed=1)
    loss(one.detach(), two.detach())
    assert int(loss.memory_bank.bank_fill) == 0
    first = loss(one, two)
    second = loss(one, two)
    loss(one, two)
    (first + second).backward()
    assert one.grad.isfinite().all()


def test_bank_survives_a_checkpoint_and_loads_the_originals():
    loss = lightly.NTXentLoss(0.2, (12, 3)).double()
    names = ["memory_bank.bank", "memory_bank.bank_fill", "memory_bank.bank_ptr"]
    assert sorted(loss.state_dict()) == names
    steps = [(draw(5, 3, seed=2 * s), draw(5, 3, seed=2 * s + 1)) for s in range(5)]
    for one, two in steps[:3]:
        loss(one, two)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    resumed = lightly.NTXentLoss(0.2, (12, 3)).double()
    resumed.load_state_dict({})
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for one, two in steps[3:]:
        assert torch.equal(resumed(one, two), loss(one, two))


def test_size_without_a_dimension_warns_and_takes_the_outputs():
    with pytest.warns(UserWarning, match=re.escape("Memory bank size 'size=6' does not specify feature dimension")):
        bank = lightly.MemoryBankModule(6, start="empty")
    bank(torch.ones(2, 4), update=True)
    output, negatives = bank(torch.zeros(2, 4))
    assert output.shape == (2, 4) and negatives.shape == (4, 2)
    rows = lightly.MemoryBankModule((6, 4), feature_dim_first=False)
    rows(torch.ones(9, 4), update=True)
    assert rows(torch.ones(1, 4))[1].shape == (6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = lightly.MemoryBankModule(6)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.bank, bank.bank)
    assert lightly.MemoryBankModule(0)(torch.ones(2, 4))[1] is None


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
def test_no_scores_are_stored(name):
    one, two = draw(256, 4), draw(256, 4, seed=1)
    assert largest_saved(lambda: getattr(lightly, name)()(one, two)) < 256 * 32


def test_bad_input_is_named():
    one = draw(4, 3)
    for name in ("NTXentLoss", "DCLLoss"):
        with pytest.raises(ValueError, match="temperature"):
            getattr(lightly, name)(0.0)
        with pytest.raises(ValueError, match="out1"):
            getattr(lightly, name)()(one, one[:2])
    with pytest.raises(ValueError, match="negative"):
        lightly.DCLLoss()(one[:1], one[:1])
    for size in (-1, (4, -2), ()):
        with pytest.raises(ValueError, match="size"):
            lightly.MemoryBankModule(size)
    with pytest.raises(ValueError, match=re.escape("Illegal memory bank size (4, -2), all entries must be non-neg")):
        lightly.MemoryBankModule((4, -2))
    with pytest.raises(ValueError, match="start"):
        lightly.MemoryBankModule((4, 2), start="zeros")
    with pytest.raises(ValueError, match="out0"):
        lightly.DCLLoss()(torch.ones(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long))
    with pytest.raises(TypeError, match="out0"):
        lightly.NTXentLoss()(None, one)
    with pytest.raises(ValueError, match="output"):
        lightly.MemoryBankModule((4, 2))(one)

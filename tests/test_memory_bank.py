"""mk.MemoryBank: first in, first out; wrap-around; checkpoints; bad input."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import mi_kernels as mk


def rows(first, number, dim=2):
    """Rows that can be identified by their values: row k is k, k + 0.5, ..."""
    return torch.arange(first, first + number)[:, None] + 0.5 * torch.arange(dim)


def kept(bank):
    return sorted(int(k) for k in bank.negatives()[:, 0])


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 5, 5], [7, 1, 2], [8, 1], [20, 3, 19], [0, 4, 0], [1] * 17])
def test_keeps_the_last_rows_in_order_of_arrival(sizes):
    bank = mk.MemoryBank(7, 2, labels=True)
    seen = 0
    for size in sizes:
        bank.enqueue(rows(seen, size), torch.arange(seen, seen + size))
        seen += size
        fill = min(7, seen)
        assert len(bank) == int(bank.fill) == fill and int(bank.pointer) == seen % 7
        assert kept(bank) == list(range(seen - fill, seen))
        assert bank.negatives().shape == (fill, 2)
        assert torch.equal(bank.labels(), bank.negatives()[:, 0].long())


def test_starts_empty_and_info_nce_takes_it():
    bank = mk.MemoryBank(8, 3)
    query, key = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    assert bank.negatives().shape == (0, 3)
    loss = mk.info_nce(query, key, negative_keys=bank.negatives())
    loss.backward()
    assert loss == 0 and (query.grad == 0).all()
    bank.enqueue(torch.randn(5, 3))
    logits = [(F.normalize(query) * F.normalize(key)).sum(1, keepdim=True)]
    logits.append(F.normalize(query) @ F.normalize(bank.negatives()).T)
    want = F.cross_entropy(torch.cat(logits, 1) / 0.1, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(mk.info_nce(query, key, negative_keys=bank.negatives()), want)


def test_rows_are_detached_and_a_later_batch_does_not_touch_them():
    bank = mk.MemoryBank(4, 3)
    query = torch.randn(4, 3, requires_grad=True)
    bank.enqueue(query)
    negatives = bank.negatives()
    before = negatives.clone()
    loss = mk.info_nce(query, torch.randn(4, 3), negative_keys=negatives)
    bank.enqueue(torch.randn(4, 3))
    loss.backward()
    assert torch.equal(negatives, before) and not negatives.requires_grad


def test_normalises_if_asked_and_keeps_its_dtype():
    keys = 5 * torch.randn(3, 4)
    bank = mk.MemoryBank(8, 4, normalize=True, dtype=torch.float64)
    bank.enqueue(keys)
    torch.testing.assert_close(bank.negatives(), F.normalize(keys).double())
    bank = mk.MemoryBank(8, 4)
    bank.enqueue(keys.bfloat16())
    assert bank.negatives().dtype == torch.float32
    assert torch.equal(bank.negatives(), keys.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_row_of_zeros_stays_zeros(dtype):
    keys = torch.randn(4, 8).to(dtype)
    keys[1] = 0
    keys[2] = keys[2] * 2.0**-12  # its square is 0 in fp16
    bank = mk.MemoryBank(6, 8, normalize=True)
    bank.enqueue(keys)
    assert not bank.negatives()[1].any()
    torch.testing.assert_close(bank.negatives(), F.normalize(keys.float()))


@pytest.mark.parametrize("how", ["state", "pickle", "copy"])
def test_a_resumed_bank_continues_as_the_original(how):
    bank = mk.MemoryBank(7, 2, labels=True)
    bank.enqueue(rows(0, 5), torch.arange(5))
    bank.enqueue(rows(5, 5), torch.arange(5, 10))
    if how == "state":
        file = io.BytesIO()
        torch.save(bank.state_dict(), file)
        file.seek(0)
        other = mk.MemoryBank(7, 2, labels=True)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        other = copy.deepcopy(bank) if how == "copy" else pickle.loads(pickle.dumps(bank))
    for b in (bank, other):
        b.enqueue(rows(10, 3), torch.arange(10, 13))
    assert torch.equal(bank.negatives(), other.negatives()) and torch.equal(bank.labels(), other.labels())
    assert set(bank.state_dict()) == {"keys", "ids", "pointer", "fill"}
    assert set(mk.MemoryBank(7, 2).state_dict()) == {"keys", "pointer", "fill"}


def test_reset_forgets():
    bank = mk.MemoryBank(4, 2)
    bank.enqueue(rows(0, 3))
    bank.reset()
    assert len(bank) == 0 and bank.negatives().shape == (0, 2) and not bank.keys.any()
    bank.enqueue(rows(7, 1))
    assert kept(bank) == [7]


def test_moves_with_its_module():
    bank = torch.nn.Sequential(mk.MemoryBank(4, 2)).double()[0]
    bank.enqueue(rows(0, 3).double())
    assert bank.negatives().dtype == torch.float64 and bank.pointer.dtype == torch.long


def test_bad_input_is_named():
    for arguments, error, name in (
        ((0, 2), ValueError, "size"),
        ((2, -1), ValueError, "dim"),
        ((2.0, 2), TypeError, "size"),
        ((True, 2), TypeError, "size"),
    ):
        with pytest.raises(error, match=name):
            mk.MemoryBank(*arguments)
    with pytest.raises(ValueError, match="dtype"):
        mk.MemoryBank(2, 2, dtype=torch.long)
    with pytest.raises(TypeError, match="dtype"):
        mk.MemoryBank(2, 2, dtype="float32")
    bank, labelled = mk.MemoryBank(4, 2), mk.MemoryBank(4, 2, labels=True)
    for b, arguments, error, name in (
        (bank, ([1.0],), TypeError, "keys"),
        (bank, (torch.ones(3, 3),), ValueError, "keys"),
        (bank, (torch.ones(2),), ValueError, "keys"),
        (bank, (torch.ones(3, 2).long(),), ValueError, "keys"),
        (bank, (torch.ones(3, 2, device="meta"),), ValueError, "keys"),
        (bank, (torch.ones(3, 2), torch.arange(3)), ValueError, "labels"),
        (labelled, (torch.ones(3, 2),), ValueError, "labels"),
        (labelled, (torch.ones(3, 2), torch.arange(2)), ValueError, "labels"),
        (labelled, (torch.ones(3, 2), torch.ones(3)), ValueError, "labels"),
        (labelled, (torch.ones(3, 2), [1, 2, 3]), TypeError, "labels"),
    ):
        with pytest.raises(error, match=name):
            b.enqueue(*arguments)
    with pytest.raises(ValueError, match="labels"):
        bank.labels()
    state = bank.state_dict() | {"pointer": torch.tensor(9)}
    with pytest.raises(ValueError, match="pointer"):
        bank.load_state_dict(state)

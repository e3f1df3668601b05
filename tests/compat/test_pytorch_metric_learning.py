"""mi_kernels.compat.pytorch_metric_learning against fp64 formulas and, where installed, the original."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat.pytorch_metric_learning import base, large, losses, standalone
from mi_kernels.compat.pytorch_metric_learning import original as parts
from mi_kernels.compat.pytorch_metric_learning.pairs import pair_scores
from mi_kernels.compat.pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from tests.compat.originals import draw, largest_saved, original, parameters, same

LABELS = torch.tensor([3, 1, 3, 2, 1, 3, 7, 2, 2, 1, 5])
NAMES = ["NTXentLoss", "SupConLoss"]


@pytest.fixture(params=["stored", "fused"])
def path(request, monkeypatch):
    """Both code paths: small batches store their scores; "fused" makes all batches take the path of large ones, which
    does not store them and processes lists of pairs in blocks."""
    if request.param == "fused":
        monkeypatch.setattr(losses, "_SMALL", dict.fromkeys(NAMES, 0))
        monkeypatch.setattr(base, "_BLOCK_BYTES", 8 * 40)


def theirs(name="losses"):
    return original(f"pytorch_metric_learning.{name}")


def formula(name, embeddings, labels, temperature, ref=None, ref_labels=None, own=None):
    """The loss pair by pair and anchor by anchor, averaged as the default reducers do."""
    if ref is None:
        ref, ref_labels, own = embeddings, labels, torch.arange(len(labels))
    scores = F.normalize(embeddings, dim=1) @ F.normalize(ref, dim=1).T / temperature
    terms = []
    for a in range(len(labels)):
        positive = [j for j in range(len(ref)) if ref_labels[j] == labels[a] and (own is None or j != own[a])]
        negative = [j for j in range(len(ref)) if ref_labels[j] != labels[a]]
        if name == "NTXentLoss":
            terms += [scores[a, [p, *negative]].logsumexp(0) - scores[a, p] for p in positive]
        elif positive and len(positive) + len(negative) > 1:
            terms.append(scores[a, positive + negative].logsumexp(0) - scores[a, positive].mean())
    return torch.stack(terms).mean() if terms else (scores * 0).sum()


def test_signatures():
    assert parameters(losses.NTXentLoss) == ["temperature=0.07", "**kwargs"]
    assert parameters(losses.SupConLoss) == ["temperature=0.1", "**kwargs"]
    for name in NAMES:
        assert parameters(getattr(losses, name).forward) == [
            "embeddings",
            "labels=None",
            "indices_tuple=None",
            "ref_emb=None",
            "ref_labels=None",
        ]
        assert getattr(losses, name)().state_dict() == {}
    assert parameters(DistributedLossWrapper) == ["loss", "efficient=False"]
    assert parameters(DistributedLossWrapper.forward) == [
        "embeddings",
        "labels=None",
        "indices_tuple=None",
        "ref_emb=None",
        "ref_labels=None",
        "enqueue_mask=None",
    ]
    assert parameters(losses.SelfSupervisedLoss) == ["loss", "symmetric=True", "**kwargs"]
    assert parameters(losses.SelfSupervisedLoss.forward) == ["embeddings", "ref_emb"]
    assert parameters(losses.CrossBatchMemory) == [
        "loss",
        "embedding_size",
        "memory_size=1024",
        "miner=None",
        "**kwargs",
    ]
    assert parameters(losses.CrossBatchMemory.forward) == [
        "embeddings",
        "labels",
        "indices_tuple=None",
        "enqueue_mask=None",
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("oracle", ["formula", "original"])
@pytest.mark.parametrize("ref", [False, True])
def test_labels(name, oracle, ref, path):
    embeddings = draw(11, 4)
    others = (draw(6, 4, seed=1), torch.tensor([1, 3, 9, 2, 2, 1])) if ref else (None, None)
    if oracle == "formula":
        want = formula(name, embeddings, LABELS, 0.2, *others)
    else:
        want = getattr(theirs(), name)(0.2)(embeddings, LABELS, ref_emb=others[0], ref_labels=others[1])
    got = getattr(losses, name)(0.2)(embeddings, LABELS, ref_emb=others[0], ref_labels=others[1])
    same(got, want, [embeddings] if not ref else [embeddings, others[0]])


def test_many_positives_are_summed_in_blocks(monkeypatch):
    monkeypatch.setattr(losses, "_SMALL", dict.fromkeys(NAMES, 0))
    monkeypatch.setattr(base, "_BLOCK_BYTES", 8 * 40 * 7)
    embeddings, labels = draw(40, 4), torch.arange(40) % 2
    want = formula("NTXentLoss", embeddings, labels, 0.2)
    same(losses.NTXentLoss(0.2)(embeddings, labels), want, [embeddings])
    ref, ref_labels = draw(40, 4, seed=1), torch.arange(40) % 3
    want = formula("NTXentLoss", embeddings, labels, 0.2, ref, ref_labels)
    same(losses.NTXentLoss(0.2)(embeddings, labels, ref_emb=ref, ref_labels=ref_labels), want, [embeddings, ref])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["triplets", "pairs"])
def test_indices(name, kind, path):
    embeddings = draw(11, 4)
    if kind == "triplets":
        indices = tuple(torch.tensor(t) for t in ([0, 0, 2, 1, 3], [2, 5, 0, 4, 7], [1, 3, 6, 0, 2]))
    else:
        indices = tuple(torch.tensor(t) for t in ([0, 2, 4, 9], [2, 5, 1, 1], [0, 0, 4, 6], [1, 6, 0, 2]))
    got = getattr(losses, name)(0.2)(embeddings, indices_tuple=indices)
    same(got, getattr(theirs(), name)(0.2)(embeddings, indices_tuple=indices), [embeddings])


@pytest.mark.parametrize("name", NAMES)
def test_indices_of_all_pairs_are_the_labels(name, path):
    embeddings = draw(11, 4)
    match = (LABELS[:, None] == LABELS) & ~torch.eye(11, dtype=torch.bool)
    indices = (*torch.where(match), *torch.where(LABELS[:, None] != LABELS))
    loss = getattr(losses, name)()
    same(loss(embeddings, indices_tuple=indices), loss(embeddings, LABELS), [embeddings])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("distance", ["DotProductSimilarity", "LpDistance", "CosineSimilarity"])
@pytest.mark.parametrize("reducer", [None, "SumReducer", "PerAnchorReducer", "ThresholdReducer"])
def test_the_originals_distances_reducers_and_regularizers(name, distance, reducer, path):
    embeddings = draw(11, 4)
    made = getattr(theirs("distances"), distance)(
        **({} if distance == "CosineSimilarity" else {"normalize_embeddings": False})
    )
    kwargs = {"distance": made, "embedding_regularizer": theirs("regularizers").LpRegularizer()}
    kwargs["embedding_reg_weight"] = 0.3
    if reducer:
        kwargs["reducer"] = getattr(theirs("reducers"), reducer)(**({"low": 0.5} if "Threshold" in reducer else {}))
    want = getattr(theirs(), name)(0.7, **kwargs)(embeddings, LABELS)
    same(getattr(losses, name)(0.7, **kwargs)(embeddings, LABELS), want, [embeddings])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [torch.arange(5), torch.zeros(5, dtype=torch.long)])
def test_no_pair_gives_zero_with_a_gradient(name, labels, path):
    embeddings = draw(5, 3)
    loss = getattr(losses, name)()(embeddings, labels)
    loss.backward()
    assert loss == 0 and (embeddings.grad == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_one_positive_and_one_negative_count(name, path):
    embeddings, ref = draw(1, 3), draw(2, 3, seed=1)
    labels, ref_labels = torch.tensor([0]), torch.tensor([0, 1])
    want = formula(name, embeddings, labels, 0.1, ref, ref_labels)
    same(getattr(losses, name)(0.1)(embeddings, labels, ref_emb=ref, ref_labels=ref_labels), want, [embeddings, ref])
    assert want > 0


@pytest.mark.parametrize("name", NAMES)
def test_ref_labels_that_are_labels_keep_the_diagonal(name, path):
    embeddings, ref, labels = draw(6, 3), draw(6, 3, seed=1), torch.arange(6)
    want = formula(name, embeddings, labels, 0.1, ref, labels)
    same(getattr(losses, name)(0.1)(embeddings, labels, ref_emb=ref, ref_labels=labels), want, [embeddings, ref])


def test_half_precision_is_not_floored():
    embeddings = draw(16, 8, seed=0, dtype=torch.float16)
    labels = torch.arange(8).repeat(2)
    want = formula("NTXentLoss", embeddings.double(), labels, 0.03)
    loss = losses.NTXentLoss(0.03)(embeddings, labels)
    assert want > 10 and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert gradient.dtype == torch.float16 and gradient.ne(0).any(1).all()


PATTERNS = {
    "twins": torch.arange(6).repeat(2),
    "twins in any order": torch.tensor([4, 0, 2, 2, 5, 1, 0, 3, 1, 4, 3, 5]),
    "one without a twin": torch.tensor([4, 0, 2, 2, 5, 1, 0, 3, 1, 4, 3, 9]),
    "twins and triples": torch.tensor([4, 0, 2, 2, 0, 1, 0, 3, 1, 4, 3, 4]),
    "triples": torch.arange(4).repeat(3),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_every_pattern_of_labels(name, pattern, path):
    embeddings, labels = draw(12, 4), PATTERNS[pattern]
    same(getattr(losses, name)(0.2)(embeddings, labels), formula(name, embeddings, labels, 0.2), [embeddings])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [0, 3])
def test_one_positive_of_each_row_among_the_references(name, extra, path):
    embeddings, labels = draw(8, 4), torch.tensor([5, 3, 0, 7, 1, 2, 6, 4])
    ref, ref_labels = draw(8 + extra, 4, seed=1), torch.arange(8 + extra).flip(0)
    want = formula(name, embeddings, labels, 0.2, ref, ref_labels)
    got = getattr(losses, name)(0.2)(embeddings, labels, ref_emb=ref, ref_labels=ref_labels)
    same(got, want, [embeddings, ref])


@pytest.mark.parametrize("name", NAMES)
def test_twins_cost_no_pairs(name, monkeypatch):
    """Labels that form two views of every item use nt_xent's kernel, in any order, instead of lists of pairs."""
    monkeypatch.setattr(losses, "_SMALL", dict.fromkeys(NAMES, 0))
    monkeypatch.setattr(large, "negatives_log_sum", None)
    for pattern in ("twins", "twins in any order"):
        embeddings, labels = draw(12, 4), PATTERNS[pattern]
        same(getattr(losses, name)(0.2)(embeddings, labels), formula(name, embeddings, labels, 0.2), [embeddings])


@pytest.mark.parametrize("temperature", [0.05, 0.04, 0.02])
def test_supcon_counts_every_anchor_however_small_its_loss(temperature, path):
    """In fp32 the losses of most anchors are smaller than the rounding errors of their log-sum-exps."""
    one = draw(32, 64, unit=True)
    two = F.normalize(one + 0.02 * draw(32, 64, seed=1), dim=1)
    two = torch.cat([F.normalize(one[:1] + 0.9 * one[1:2], dim=1), two[1:]])
    embeddings = torch.cat([one, two]).detach().float()
    for labels in (torch.arange(32).repeat(2), torch.arange(32).repeat(2).scatter(0, torch.tensor([63]), 0)):
        want = formula("SupConLoss", embeddings.double(), labels, temperature)
        torch.testing.assert_close(losses.SupConLoss(temperature)(embeddings, labels).double(), want, rtol=1e-4, atol=0)
        rows = losses.SupConLoss(temperature, reducer=standalone.DoNothingReducer())(embeddings, labels)["loss"]
        alone = (labels[:, None] == labels).sum(1) == 1
        assert ((rows["losses"] > 0) == ~alone).all()


def test_the_positive_and_the_negatives_are_weighed_in_full_precision(path):
    """log(1 + exp t) is exact beyond t = 20, where torch's softplus returns t."""
    labels = torch.tensor([0, 0, 1])
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3]], dtype=torch.float64, requires_grad=True)
    want = formula("NTXentLoss", embeddings, labels, 0.09)
    same(losses.NTXentLoss(0.09)(embeddings, labels), want, [embeddings], rtol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_scored_against_itself_has_no_own_pairs(name, path):
    embeddings = draw(11, 4)
    loss = getattr(losses, name)(0.2)
    want = formula(name, embeddings, LABELS, 0.2)
    for ref_labels in (LABELS, LABELS.clone(), None):
        same(loss(embeddings, LABELS, ref_emb=embeddings, ref_labels=ref_labels), want, [embeddings])
    # The columns have other labels than the rows: a row's pair with itself still does not count as positive.
    other = LABELS.roll(1)
    pairs = LABELS[:, None] == other
    want = loss(embeddings, None, (*torch.where(pairs & ~torch.eye(11, dtype=torch.bool)), *torch.where(~pairs)))
    same(loss(embeddings, LABELS, ref_emb=embeddings, ref_labels=other), want, [embeddings])


class Shifted(parts.DotProductSimilarity):
    """A subclass of a known distance that overrides how scores are computed."""

    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) ** 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["subclass", "instance", "hook", "power", "p"])
def test_a_distance_that_differs_is_asked(name, how, path):
    embeddings = draw(11, 4)
    distance = Shifted() if how == "subclass" else parts.CosineSimilarity()
    if how == "instance":
        distance.compute_mat = lambda query, ref: (query @ ref.T) ** 3
    if how == "hook":
        distance.register_forward_hook(lambda module, arguments, found: found**3)
    if how == "power":
        distance.power = 3
    unit = F.normalize(embeddings, dim=1)
    if how == "p":
        distance.p = 1
        unit = F.normalize(embeddings, p=1, dim=1)
    scores = (unit @ unit.T) ** (1 if how == "p" else 3) / 0.7
    match, own = LABELS[:, None] == LABELS, torch.eye(11, dtype=torch.bool)
    negatives = scores.masked_fill(match, -torch.inf).logsumexp(1)
    if name == "NTXentLoss":
        want = (torch.logaddexp(scores, negatives[:, None]) - scores)[match & ~own].mean()
    else:
        some = (match & ~own).any(1)
        everyone = scores.masked_fill(own, -torch.inf).logsumexp(1)
        means = (scores * (match & ~own)).sum(1) / (match & ~own).sum(1).clamp(min=1)
        want = (everyone - means)[some].mean()
    same(getattr(losses, name)(0.7, distance=distance)(embeddings, LABELS), want, [embeddings])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regularized", [False, True])
def test_losses_as_they_are(name, regularized, path):
    embeddings = draw(11, 4)
    kwargs = (
        {"embedding_regularizer": lambda e: e.norm(dim=1).mean(), "embedding_reg_weight": 0.5} if regularized else {}
    )
    loss = getattr(losses, name)(0.2, reducer=parts.DoNothingReducer(), **kwargs)
    found = loss(embeddings, LABELS)
    assert list(found) == ["loss", "embedding_reg_loss"][: 1 + regularized]
    assert found["loss"]["reduction_type"] == ("pos_pair" if name == "NTXentLoss" else "element")
    rows = found["loss"]["losses"]
    plain = rows.mean() if name == "NTXentLoss" else rows[rows > 0].mean()
    same(plain, formula(name, embeddings, LABELS, 0.2), [embeddings])
    if name == "NTXentLoss":
        anchor, positive = found["loss"]["indices"]
        assert (LABELS[anchor] == LABELS[positive]).all() and (anchor != positive).all() and anchor.shape == rows.shape
    assert loss(embeddings, torch.arange(11))["loss"]["losses"] == 0
    if regularized:
        penalty = 0.5 * embeddings.norm(dim=1).mean()
        torch.testing.assert_close(found["embedding_reg_loss"]["losses"], penalty)
        total = getattr(losses, name)(0.2, **kwargs)
        same(total(embeddings, LABELS), formula(name, embeddings, LABELS, 0.2) + penalty, [embeddings])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_is_made_of(name):
    loss = getattr(losses, name)()
    assert type(loss.distance) is type(loss.get_default_distance()) is parts.CosineSimilarity
    kind = parts.MeanReducer if name == "NTXentLoss" else parts.AvgNonZeroReducer
    assert type(loss.reducer) is type(loss.get_default_reducer()) is kind
    assert isinstance(loss, parts.BaseMetricLossFunction)
    for wrapper in (losses.SelfSupervisedLoss, losses.CrossBatchMemory):
        assert name in wrapper.supported_losses()
        wrapper.check_loss_support(name)
        with pytest.raises(ValueError, match="ArcFaceLoss"):
            wrapper.check_loss_support("ArcFaceLoss")


@pytest.mark.parametrize("name", NAMES)
def test_the_originals_wrappers_take_ours_and_ours_refuse_what_the_original_does(name):
    loss = getattr(losses, name)(0.2)
    embeddings, other = draw(6, 3), draw(6, 3, seed=1)
    module = theirs("utils.distributed")
    module.DistributedLossWrapper(loss)
    module.DistributedLossWrapper(losses.CrossBatchMemory(loss, 3, 12))
    want = losses.SelfSupervisedLoss(loss)(embeddings, other)
    same(theirs().SelfSupervisedLoss(loss)(embeddings, other), want, [embeddings, other])
    labels = torch.arange(6) % 2
    both = theirs().MultipleLosses([loss, theirs().TripletMarginLoss()])(embeddings, labels)
    same(both, loss(embeddings, labels) + theirs().TripletMarginLoss()(embeddings, labels), [embeddings])
    theirs().CrossBatchMemory(loss, 3, 12)(embeddings.float(), labels)
    for wrapper in (losses.SelfSupervisedLoss, lambda inner: losses.CrossBatchMemory(inner, 3)):
        with pytest.raises(ValueError, match="ProxyAnchorLoss"):
            wrapper(theirs().ProxyAnchorLoss(2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_zero(name):
    embeddings, labels = draw(4, 3), torch.tensor([0, 0, 1, 1])
    empty, none = embeddings[:0], labels[:0]
    loss = getattr(losses, name)()
    for found in (loss(empty, none), loss(embeddings, labels, ref_emb=empty, ref_labels=none)):
        found.backward()
        assert found == 0
    nothing = torch.zeros(0, dtype=torch.long)
    assert loss(embeddings, None, (nothing,) * 3) == 0
    memory = losses.CrossBatchMemory(loss, 3, 8)
    assert memory(empty, none) == 0 and memory.queue_idx == 0


@pytest.mark.parametrize("name", NAMES)
def test_lists_in_any_order_count_as_often_as_listed(name, path):
    embeddings = draw(11, 4)
    positive = [(5, 2), (0, 2), (0, 5), (2, 0), (0, 2)]
    negative = [(9, 1), (0, 1), (5, 3), (5, 1), (0, 1), (2, 3)]
    indices = tuple(torch.tensor(t) for pairs in (positive, negative) for t in zip(*pairs, strict=True))
    unit = F.normalize(embeddings, dim=1)
    scores = unit @ unit.T / 0.2
    if name == "NTXentLoss":
        terms = []
        for a, p in positive:
            others = [scores[a, n] for b, n in negative if b == a]
            terms.append(torch.stack([scores[a, p], *others]).logsumexp(0) - scores[a, p])
    else:
        terms = []
        for a in sorted({a for a, _ in positive}):
            mine = {p for b, p in positive if b == a}
            others = mine | {n for b, n in negative if b == a}
            if len(others) > 1:
                terms.append(scores[a, sorted(others)].logsumexp(0) - scores[a, sorted(mine)].mean())
    want = torch.stack(terms)
    same(getattr(losses, name)(0.2)(embeddings, indices_tuple=indices), want.mean(), [embeddings])
    if name == "NTXentLoss":
        found = losses.NTXentLoss(0.2, reducer=parts.DoNothingReducer())(embeddings, indices_tuple=indices)
        torch.testing.assert_close(found["loss"]["losses"], want)


def test_scores_of_listed_pairs_in_chunks(monkeypatch):
    from mi_kernels.compat.pytorch_metric_learning import pairs

    monkeypatch.setattr(pairs, "_CHUNK_BYTES", 8 * 4 * 2)
    x, y = draw(5, 4), draw(6, 4, seed=1)
    i, j = torch.tensor([0, 4, 4, 1, 0]), torch.tensor([5, 0, 0, 2, 3])
    assert torch.autograd.gradcheck(lambda x, y: pair_scores(x, y, i, j), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: pair_scores(x, y, i, j), (x, y))
    torch.testing.assert_close(pair_scores(x, y, i, j), (x[i] * y[j]).sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_listed_loss_keeps_no_scores(name, monkeypatch):
    monkeypatch.setattr(base, "_BLOCK_BYTES", 8 * 256 * 8)
    embeddings, labels = draw(256, 4), torch.arange(256) // 2
    match = labels[:, None] == labels
    indices = (*torch.where(match.clone().fill_diagonal_(False)), *torch.where(~match))
    some = torch.arange(indices[2].shape[0]) % 16 == 0
    indices = (*indices[:2], indices[2][some], indices[3][some])
    assert largest_saved(lambda: getattr(losses, name)()(embeddings, None, indices)) < 256 * 32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 256])
def test_no_scores_are_stored(name, classes, monkeypatch):
    monkeypatch.setattr(base, "_BLOCK_BYTES", 8 * 512 * 8)
    embeddings, labels = draw(512, 4), torch.arange(512) % classes
    # A block holds the pairs of 8 rows; all 512 x 512 scores would be 262144 elements.
    assert largest_saved(lambda: getattr(losses, name)()(embeddings, labels)) < 512 * 32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_self_supervised(name, symmetric, oracle, path):
    one, two, labels = draw(6, 3), draw(6, 3, seed=1), torch.arange(6)
    if oracle == "original":
        want = theirs().SelfSupervisedLoss(getattr(theirs(), name)(0.2), symmetric)(one, two)
    elif symmetric:
        want = formula(name, torch.cat([one, two]), labels.repeat(2), 0.2)
    else:
        want = formula(name, one, labels, 0.2, two, labels)
    same(losses.SelfSupervisedLoss(getattr(losses, name)(0.2), symmetric)(one, two), want, [one, two])


def batches(number, items=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield (
            torch.randn(items, 3, generator=g, dtype=torch.float64).requires_grad_(),
            torch.randint(0, 3, (items,), generator=g),
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_cross_batch_memory(name, oracle, path):
    # 12 rows and batches of 5: the third batch wraps around.
    memory = losses.CrossBatchMemory(getattr(losses, name)(0.2), 3, 12)
    reference = theirs().CrossBatchMemory(getattr(theirs(), name)(0.2), 3, 12) if oracle == "original" else None
    kept, kept_labels = torch.zeros(12, 3, dtype=torch.float64), torch.zeros(12, dtype=torch.long)
    for step, (embeddings, labels) in enumerate(batches(6)):
        own = (step * 5 + torch.arange(5)) % 12
        kept[own], kept_labels[own] = embeddings.detach(), labels
        fill = min(12, step * 5 + 5)
        if reference is not None:
            want = reference(embeddings, labels)
        else:
            want = formula(name, embeddings, labels, 0.2, kept[:fill].clone(), kept_labels[:fill], own)
        same(memory(embeddings, labels), want, [embeddings])
        torch.testing.assert_close(memory.embedding_memory, kept)
    assert memory.queue_idx == 30 % 12 and memory.has_been_filled is True


@pytest.mark.parametrize("foreign", [False, True])
def test_cross_batch_memory_with_an_enqueue_mask(foreign):
    name = "NTXentLoss"
    inner = getattr(theirs() if foreign else losses, name)(0.2)
    memory = losses.CrossBatchMemory(inner, 3, 12)
    mask = torch.tensor([True, False, True, False, True])
    kept, kept_labels = [], []
    for embeddings, labels in batches(5):
        kept.append(embeddings[mask].detach())
        kept_labels.append(labels[mask])
        loss = memory(embeddings, labels, enqueue_mask=mask)
        ref, ref_labels = torch.cat(kept)[-12:], torch.cat(kept_labels)[-12:]
        same(loss, formula(name, embeddings[~mask], labels[~mask], 0.2, ref, ref_labels), [embeddings])


def test_cross_batch_memory_with_every_row_stored_or_none():
    memory = losses.CrossBatchMemory(losses.NTXentLoss(0.2), 3, 12)
    (first, labels), (second, more) = batches(2)
    none = torch.zeros(5, dtype=torch.bool)
    for mask in (none, ~none):
        loss = memory(first, labels, enqueue_mask=mask)
        loss.backward()
        assert loss == 0
    assert memory.queue_idx == 5 and type(memory.queue_idx) is int
    want = formula("NTXentLoss", second, more, 0.2, first.detach(), labels)
    same(memory(second, more, enqueue_mask=none), want, [second])


def test_cross_batch_memory_joins_triplets_and_pairs():
    triplets = tuple(torch.tensor(t) for t in ([0, 1], [1, 0], [2, 3]))
    pairs = tuple(torch.tensor(t) for t in ([0, 1], [1, 0], [0, 1], [2, 3]))
    for miner, given in ((lambda *_: triplets, pairs), (lambda *_: pairs, triplets)):
        memory = losses.CrossBatchMemory(losses.NTXentLoss(0.2), 3, 12, miner=miner)
        embeddings, labels = next(batches(1))
        memory.add_to_memory(embeddings, labels, 5)
        found = memory.create_indices_tuple(embeddings, labels, embeddings, labels, given, True)
        want = triplets if len(miner()) == 3 else pairs
        assert len(found) == len(want)
        assert all(torch.equal(f, torch.cat([w, w])) for f, w in zip(found, want, strict=True))


def test_cross_batch_memory_with_a_miner_and_a_foreign_loss():
    miner = theirs("miners").MultiSimilarityMiner()
    for loss in ("NTXentLoss", "TripletMarginLoss"):
        memory = losses.CrossBatchMemory(getattr(theirs(), loss)(), 3, 12, miner=miner)
        reference = theirs().CrossBatchMemory(getattr(theirs(), loss)(), 3, 12, miner=copy.deepcopy(miner))
        for embeddings, labels in batches(4):
            same(memory(embeddings, labels), reference(embeddings, labels), [embeddings])


def test_cross_batch_memory_reads_indices_as_positions_in_the_batch():
    memory = losses.CrossBatchMemory(losses.NTXentLoss(0.2), 3, 12)
    listed = []
    memory.loss.register_forward_pre_hook(lambda _, arguments: listed.append(arguments[2]))
    (first, first_labels), (second, second_labels) = batches(2)
    memory(first, first_labels)
    memory(second, second_labels, tuple(torch.tensor([i]) for i in (0, 1, 0, 2)))
    anchor, positive, other, negative = listed[-1]
    assert (anchor[-1], positive[-1], other[-1], negative[-1]) == (0, 5 + 1, 0, 5 + 2)


@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory_resumes_where_it_was(name, path):
    memory = losses.CrossBatchMemory(getattr(losses, name)(0.2), 3, 12)
    assert sorted(memory.state_dict()) == ["embedding_memory", "has_been_filled", "label_memory", "queue_idx"]
    steps = list(batches(6))
    for step, (embeddings, labels) in enumerate(steps):
        if step == 4:
            file = io.BytesIO()
            torch.save(memory.state_dict(), file)
            file.seek(0)
            resumed = losses.CrossBatchMemory(getattr(losses, name)(0.2), 3, 12).double()
            resumed.load_state_dict(torch.load(file, weights_only=True))
        loss = memory(embeddings, labels)
        if step >= 4:
            assert torch.equal(resumed(embeddings, labels), loss)
    assert torch.equal(resumed.embedding_memory, memory.embedding_memory)


def test_cross_batch_memory_loads_a_state_of_the_original():
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), 3, 12)
    for embeddings, labels in batches(2):
        memory(embeddings, labels)
    state = {k: v for k, v in memory.state_dict().items() if k.endswith("memory")}
    other = losses.CrossBatchMemory(losses.NTXentLoss(), 3, 12)
    other.load_state_dict(state)
    assert other.queue_idx == 10 and not other.has_been_filled
    with pytest.raises(RuntimeError, match="queue_idx"):
        other.load_state_dict(memory.state_dict() | {"queue_idx": torch.tensor(99)})


def test_bad_input_is_named():
    embeddings = draw(11, 4)
    loss = losses.NTXentLoss()
    for arguments, name in (
        ((embeddings[0], LABELS), "embeddings"),
        ((embeddings, LABELS[:3]), "labels"),
        ((embeddings, LABELS, None, embeddings, LABELS[:2]), "ref_labels"),
        ((embeddings, LABELS, None, embeddings.clone()), "ref_labels"),
        ((embeddings, LABELS, None, embeddings[:, :3], LABELS), "ref_emb"),
        ((embeddings.long(), LABELS), "embeddings"),
        ((embeddings, LABELS + 0j), "labels"),
        ((embeddings, LABELS * torch.nan), "labels"),
        ((embeddings,), "labels"),
        ((embeddings, None, (LABELS, LABELS)), "indices_tuple"),
    ):
        with pytest.raises(ValueError, match=name):
            loss(*arguments)
    with pytest.raises(ValueError, match="temperature"):
        losses.NTXentLoss(0)(embeddings, LABELS)
    memory = losses.CrossBatchMemory(loss, 4, 8)
    with pytest.raises(ValueError, match="memory_size"):
        memory(embeddings, LABELS)
    with pytest.raises(ValueError, match="enqueue_mask"):
        memory(embeddings[:3], LABELS[:3], enqueue_mask=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="indices_tuple"):
        memory(embeddings[:3], LABELS[:3], (LABELS,) * 3, torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="embedding"):
        memory(embeddings[:3, :2], LABELS[:3])
    with pytest.raises(ValueError, match="positive and as negative"):
        one = torch.tensor([0])
        losses.SupConLoss()(embeddings, None, (one, one + 1, one, one + 1))

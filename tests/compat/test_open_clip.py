"""mi_kernels.compat.open_clip in one process, against fp64 formulas and, where installed, open_clip.

tests/test_distributed.py tests it in two processes.
"""

import pytest
import torch
import torch.nn.functional as F

from mi_kernels.compat import _distillation, open_clip
from tests.compat.originals import draw, largest_saved, original, parameters, same

FLAGS = ["local_loss=False", "gather_with_grad=False", "cache_labels=False", "rank=0", "world_size=1"]


def theirs():
    return original("open_clip.loss", "open_clip")


def pair(items=7, width=5):
    return draw(items, width, unit=True), draw(items, width, seed=1, unit=True)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def clip(image, text, scale):
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def test_signatures():
    assert parameters(open_clip.ClipLoss) == [*FLAGS, "use_horovod=False"]
    assert parameters(open_clip.ClipLoss.forward) == [
        "image_features",
        "text_features",
        "logit_scale",
        "logit_bias=None",
        "output_dict=False",
    ]
    assert parameters(open_clip.ClipLoss.get_logits) == [
        "image_features",
        "text_features",
        "logit_scale",
        "logit_bias=None",
    ]
    assert parameters(open_clip.ClipLoss.get_ground_truth) == ["device", "num_logits"]
    assert parameters(open_clip.SigLipLoss) == [
        "cache_labels=False",
        "rank=0",
        "world_size=1",
        "dist_impl=None",
        "chunk_size=0",
    ]
    assert parameters(open_clip.SigLipLoss.forward) == [
        "image_features",
        "text_features",
        "logit_scale",
        "logit_bias",
        "output_dict=False",
    ]
    weights = ["caption_loss_weight", "clip_loss_weight", "pad_id=0"]
    assert parameters(open_clip.CoCaLoss) == [*weights, *FLAGS, "use_horovod=False"]
    assert parameters(open_clip.CoCaLoss.forward) == [
        "image_features",
        "text_features",
        "logits",
        "labels",
        "logit_scale",
        "output_dict=False",
    ]
    assert parameters(open_clip.DistillClipLoss.forward) == [
        "image_features",
        "text_features",
        "logit_scale",
        "dist_image_features",
        "dist_text_features",
        "dist_logit_scale",
        "output_dict=False",
    ]
    gather = ["local_loss=False", "gather_with_grad=False", "rank=0", "world_size=1", "use_horovod=False"]
    assert parameters(open_clip.gather_features) == ["image_features", "text_features", *gather]


@pytest.mark.parametrize("items", [7, 40])
@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_clip_loss(oracle, items):
    image, text = pair(items)
    scale = scalar(14.3)
    want = clip(image, text, scale) if oracle == "formula" else theirs().ClipLoss()(image, text, scale)
    loss = open_clip.ClipLoss(cache_labels=True)
    same(loss(image, text, scale), want, [image, text, scale])
    same(loss(image, text, scale, output_dict=True)["contrastive_loss"], want, [image, text, scale])
    assert loss.state_dict() == {}


@pytest.mark.parametrize("items", [7, 40])
def test_logit_bias_takes_part_and_cancels(items):
    image, text = pair(items)
    bias = scalar(-10.0)
    loss = open_clip.ClipLoss()(image, text, 14.3, bias)
    torch.testing.assert_close(loss, clip(image, text, 14.3))
    (gradient,) = torch.autograd.grad(loss, bias)
    assert abs(float(gradient)) < 1e-12


@pytest.mark.parametrize("oracle", ["formula", "original"])
@pytest.mark.parametrize("bias", [-10.0, None])
def test_siglip_loss(oracle, bias):
    image, text = pair()
    scale = scalar(10.0)
    bias = None if bias is None else scalar(bias)
    if oracle == "formula":
        logits = scale * image @ text.T + (0 if bias is None else bias)
        want = -F.logsigmoid((2 * torch.eye(7) - 1) * logits).sum() / 7
    else:
        want = theirs().SigLipLoss()(image, text, scale, bias)
    inputs = [image, text, scale, *([] if bias is None else [bias])]
    same(open_clip.SigLipLoss(chunk_size=3)(image, text, scale, bias), want, inputs)
    same(open_clip.SigLipLoss()(image, text, scale, bias, output_dict=True)["contrastive_loss"], want, inputs)


def test_captions_of_other_shapes_are_named():
    image, text = pair()
    for logits, labels in ((draw(7, 4, 6, 1), (7, 4)), (draw(7, 6), (7,)), (draw(7, 4, 6), (7, 5))):
        with pytest.raises(ValueError, match="logits"):
            open_clip.CoCaLoss(1.0, 1.0)(image, text, logits, torch.zeros(labels, dtype=torch.long), 14.3)


@pytest.mark.parametrize("oracle", ["formula", "original"])
@pytest.mark.parametrize("weight", [1.5, 0])
def test_coca_loss(oracle, weight):
    image, text = pair()
    logits = draw(7, 4, 6, seed=2)
    labels = torch.randint(0, 6, (7, 4))
    labels[0, 2:] = 0
    inputs = [image, text, logits]
    got = open_clip.CoCaLoss(2.0, weight)(image, text, logits, labels, 14.3)
    if oracle == "original":
        want = theirs().CoCaLoss(2.0, weight)(image, text, logits, labels, 14.3)
    else:
        rows = logits.reshape(-1, 6).log_softmax(1).gather(1, labels.reshape(-1, 1))[labels.reshape(-1) != 0]
        want = weight * clip(image, text, 14.3), -2.0 * rows.mean()
    if weight:
        same(got[0], want[0], inputs)
    else:
        assert got[0] == 0
    same(got[1], want[1], inputs)
    named = open_clip.CoCaLoss(2.0, weight)(image, text, logits, labels, 14.3, output_dict=True)
    assert named["contrastive_loss"] == got[0] and named["caption_loss"] == got[1]


@pytest.mark.parametrize("oracle", ["formula", "original"])
def test_distill_loss(oracle):
    image, text = pair()
    teacher = draw(7, 3, seed=2, unit=True), draw(7, 3, seed=3, unit=True)
    scale, teacher_scale = scalar(14.3), scalar(9.0)
    arguments = (image, text, scale, *teacher, teacher_scale)
    got = open_clip.DistillClipLoss()(*arguments)
    if oracle == "original":
        want = theirs().DistillClipLoss()(*arguments)
    else:
        student, soft = scale * image @ text.T, teacher_scale * teacher[0] @ teacher[1].T
        parts = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in ((student, soft), (student.T, soft.T))]
        want = clip(image, text, scale), sum(parts) / 2
    for g, w in zip(got, want, strict=True):
        same(g, w, arguments)
    named = open_clip.DistillClipLoss()(*arguments, output_dict=True)
    assert named["contrastive_loss"] == got[0] and named["distill_loss"] == got[1]


@pytest.mark.parametrize("panel", [1 << 22, 7 * 300])
def test_distill_loss_of_a_batch_in_panels(panel, monkeypatch):
    monkeypatch.setattr(_distillation, "_PANEL", panel)
    image, text = pair(300)
    teacher = draw(300, 3, seed=2, unit=True).detach(), draw(300, 3, seed=3, unit=True).detach()
    scale = scalar(14.3)
    student, soft = scale * image @ text.T, 9.0 * teacher[0] @ teacher[1].T
    parts = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in ((student, soft), (student.T, soft.T))]
    contrastive, distill = open_clip.DistillClipLoss()(image, text, scale, *teacher, 9.0)
    same(contrastive, clip(image, text, scale), [image, text, scale])
    same(distill, sum(parts) / 2, [image, text, scale])


@pytest.mark.parametrize("items", [7, 300])
def test_distill_loss_has_second_gradients(items):
    image, text = pair(items, 2)
    teacher = draw(items, 3, seed=2, unit=True).detach(), draw(items, 3, seed=3, unit=True).detach()

    def penalty(distill):
        (gradient,) = torch.autograd.grad(distill, image, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (image, text))

    student, soft = 3.0 * image @ text.T, 9.0 * teacher[0] @ teacher[1].T
    parts = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for s, t in ((student, soft), (student.T, soft.T))]
    want = penalty(sum(parts) / 2)
    got = penalty(open_clip.DistillClipLoss()(image, text, 3.0, *teacher, 9.0)[1])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("items", [7, 300])
def test_siglip_loss_of_one_process(items, negative_only):
    image, text = pair(items)
    scale, bias = scalar(10.0), scalar(-10.0)
    sign = -torch.ones(items, items, dtype=torch.float64)
    if not negative_only:
        sign.fill_diagonal_(1)
    want = -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / items
    got = open_clip.SigLipLoss()._loss(image, text, scale, bias, negative_only=negative_only)
    same(got, want, [image, text, scale, bias])


@pytest.mark.parametrize("negative_only", [False, True])
@pytest.mark.parametrize("texts", [3, 9])
def test_chunked_siglip_loss_takes_other_numbers_of_texts(texts, negative_only):
    image, text = draw(7, 5, unit=True), draw(texts, 5, seed=1, unit=True)
    scale, bias = scalar(10.0), scalar(-10.0)
    logits = scale * image @ text.T + bias
    sign = -torch.ones(7, texts, dtype=torch.float64)
    if not negative_only:
        sign.fill_diagonal_(1)
    want = -F.logsigmoid(sign * logits).sum() / 7
    got = open_clip.SigLipLoss(chunk_size=2)._loss(image, text, scale, bias, negative_only=negative_only)
    same(got, want, [image, text, scale, bias])
    with pytest.raises(ValueError, match="chunk_size"):
        open_clip.SigLipLoss()._loss(image, text, scale, bias)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fused_linear_cross_entropy(reduction, has_bias):
    hidden, weight = draw(11, 4), draw(9, 4, seed=1)
    bias = draw(9, seed=2) if has_bias else None
    target = torch.arange(11) % 9
    target[[2, 5]] = -100
    logits = F.linear(hidden, weight, bias)
    want = F.cross_entropy(logits, target, reduction=reduction)
    got = open_clip.fused_linear_cross_entropy(hidden, weight, target, bias, chunk_size=4, reduction=reduction)
    inputs = [hidden, weight] + ([bias] if has_bias else [])
    same(got, want, inputs)
    penalties = []
    for loss in (got, want):
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    for g, w in zip(*penalties, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-7, atol=1e-12)


def test_fused_linear_cross_entropy_without_a_target_is_zero_and_names_bad_input():
    hidden, weight, none = draw(3, 4), draw(9, 4, seed=1), torch.full((3,), -100)
    loss = open_clip.fused_linear_cross_entropy(hidden, weight, none)
    assert loss == 0 and (torch.autograd.grad(loss, hidden)[0] == 0).all()
    assert largest_saved(lambda: open_clip.fused_linear_cross_entropy(
        draw(64, 4), draw(300, 4), torch.arange(64), chunk_size=8)) <= 300 * 4  # fmt: skip
    for change, name in (
        ({"target": none[:2]}, "target"),
        ({"target": none.double()}, "target"),
        ({"weight": draw(9, 5)}, "weight"),
        ({"hidden": [1.0]}, "hidden"),
        ({"bias": draw(3)}, "bias"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"reduction": "none"}, "reduction"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            open_clip.fused_linear_cross_entropy(**({"hidden": hidden, "weight": weight, "target": none} | change))


def test_caption_loss_of_logits():
    logits = draw(2, 5, 9)
    labels = torch.arange(10).reshape(2, 5) % 9
    labels[0, 1] = -1
    want = F.cross_entropy(logits.reshape(-1, 9), labels.reshape(-1), ignore_index=-1)
    same(open_clip.GenLipLoss(ignore_index=-1)(logits, labels), want, [logits])
    assert open_clip.GenLipLoss(-1)(logits, labels, output_dict=True)["caption_loss"] == want


def test_logits_and_labels_are_the_originals():
    image, text = pair()
    per_image, per_text = open_clip.ClipLoss().get_logits(image, text, 2.0, torch.tensor(0.5))
    torch.testing.assert_close(per_image, 2 * image @ text.T + 0.5)
    torch.testing.assert_close(per_text, per_image.T)
    assert open_clip.ClipLoss().get_ground_truth("cpu", 3).tolist() == [0, 1, 2]
    labels = open_clip.SigLipLoss().get_ground_truth("cpu", torch.float32, 2)
    assert labels.tolist() == [[1, -1], [-1, 1]]
    negative = open_clip.SigLipLoss().get_ground_truth("cpu", torch.float32, 2, negative_only=True)
    assert negative.tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_no_scores_are_stored(name):
    image, text = pair(512, 4)
    loss = getattr(open_clip, name)()
    assert largest_saved(lambda: loss(image, text, 10.0, None)) < 512 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distilled_gradients_in_16_bits_near_the_teacher(dtype):
    """The gradient is a small difference of large terms, so nothing but the result may be rounded to 16 bits."""
    image, text = (t.detach().to(dtype) for t in pair(300, 16))
    teacher = (image + 0.02 * draw(300, 16, seed=2).detach()).to(dtype), text

    def gradient(kind):
        inputs = image.clone().to(kind).requires_grad_(), text.clone().to(kind).requires_grad_()
        _, loss = open_clip.DistillClipLoss()(*inputs, 10.0, teacher[0].to(kind), teacher[1].to(kind), 10.0)
        return torch.autograd.grad(1e4 * loss, inputs)  # a loss scale: the gradient is too small for fp16

    for got, want in zip(gradient(dtype), gradient(torch.float64), strict=True):
        assert (got.double() - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()


def test_distill_loss_stores_no_scores():
    image, text = pair(512, 4)
    teacher = draw(512, 3, seed=2, unit=True).detach(), draw(512, 3, seed=3, unit=True).detach()
    assert largest_saved(lambda: sum(open_clip.DistillClipLoss()(image, text, 10.0, *teacher, 5.0))) < 512 * 16


def test_clip_loss_compiles_to_one_graph():
    image, text = (t.detach().float().requires_grad_() for t in pair())
    loss = open_clip.ClipLoss()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(image, text, torch.tensor(14.3))
    same(got, loss(image, text, torch.tensor(14.3)), [image, text], rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    image, text = pair()
    with pytest.raises(ValueError, match="text_features"):
        open_clip.ClipLoss()(image, text[:5], 1.0)
    with pytest.raises(ValueError, match="text_features"):
        open_clip.SigLipLoss()(image, text[:5], 1.0, None)
    with pytest.raises(ValueError, match="use_horovod"):
        open_clip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl"):
        open_clip.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="world_size"):
        open_clip.ClipLoss(world_size=2)(image, text, 1.0)
    with pytest.raises(ValueError, match="world_size"):
        open_clip.SigLipLoss(world_size=2)(image, text, 1.0, None)
    with pytest.raises(ValueError, match="dist_image_features"):
        open_clip.DistillClipLoss()(image, text, 1.0, image[:3], text[:3], 1.0)

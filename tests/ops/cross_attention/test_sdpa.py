"""The route to torch's flash attention: which calls take it, and that outputs, statistics and gradients are the
same."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mi_kernels.ops.cross_attention import dispatch, reference, sdpa
from mi_kernels.ops.cross_attention.problem import Pair, Pairs, Rule
from mi_kernels.ops.cross_attention.schema import NO_OFFSET

NO_LENGTHS = torch.empty(0, dtype=torch.int64)


def arguments(
    Tq: int = 512,
    Tk: int = 512,
    E: int = 64,
    EV: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    offset: int = NO_OFFSET,
    p: float = 0.0,
    lengths: bool = False,
    device: str = "cuda",
) -> tuple:
    torch.manual_seed(0)
    new = torch.empty if device == "cuda" else torch.randn  # fake tensors have no values
    q, k, v = (new(2, 3, T, D, device=device, dtype=dtype) for T, D in ((Tq, E), (Tk, E), (Tk, EV)))
    n = torch.empty(2, dtype=torch.int64, device=device) if lengths else NO_LENGTHS
    return [q], [k], [v], [NO_LENGTHS], [n], [offset], [0.3], [p]


@pytest.fixture
def flash_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *args: args)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: True)
    monkeypatch.setattr(dispatch, "usable", lambda name: False)  # hides the extension's CUDA kernels for narrow heads


@pytest.mark.parametrize(
    ("changed", "suits"),
    [
        ({}, True),
        ({"offset": 511, "Tq": 600}, True),
        ({"offset": 0}, True),
        ({"offset": 0, "Tk": 600}, False),
        ({"offset": 5}, False),
        ({"p": 0.1}, False),
        ({"lengths": True}, False),
        ({"dtype": torch.float32}, False),
        ({"EV": 32}, False),
        ({"E": 16, "EV": 16}, False),
        ({"Tk": 500}, False),
    ],
    ids=str,
)
def test_only_what_flash_attention_computes_is_routed(flash_everywhere, changed: dict, suits: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        pairs = arguments(**changed)
        assert sdpa.suits(*pairs, sparse=False) == suits
        assert not sdpa.suits(*pairs, sparse=True), "sparsemax is ours alone"
        given = Pairs(*pairs[:5], torch.zeros(len(pairs[0])).long()), Rule(*pairs[5:], False)
        assert dispatch._routed(dispatch.AUTOMATIC, *given) == ("sdpa" if suits else "triton")
        assert dispatch._routed("triton", *given) == "triton", "a named backend is the one that runs"


@pytest.mark.parametrize(
    ("changed", "narrow"),
    [({"E": 16, "EV": 16}, True), ({"E": 4, "EV": 9, "dtype": torch.float32, "p": 0.1, "lengths": True}, True),
     ({"E": 16, "EV": 17}, False), ({"E": 4, "EV": 4, "dtype": torch.float64}, False)],
    ids=str,
)  # fmt: skip
def test_narrow_heads_take_the_cuda_kernels_where_they_are_built(monkeypatch, changed: dict, narrow: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        pairs = arguments(**changed)
        for built in (True, False):
            monkeypatch.setattr(dispatch, "usable", lambda name, built=built: built and name == "cuda")
            for sparse in (True, False):
                given = Pairs(*pairs[:5], torch.zeros(1).long()), Rule(*pairs[5:], sparse)
                expected = "cuda" if built and narrow else "triton"
                assert dispatch._routed(dispatch.AUTOMATIC, *given) == expected
                assert dispatch._routed("triton", *given) == "triton", "a named backend is the one that runs"


def test_a_device_without_flash_attention_is_not_routed() -> None:
    assert not sdpa.suits(*arguments(device="cpu"), sparse=False)


def test_the_operators_of_torch_take_these_arguments() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        pairs = arguments(offset=0)
        out, stat = sdpa.forward(*pairs, None, False)
        assert out.shape == pairs[2][0].shape and stat.shape == out.shape[:3] and stat.dtype == torch.float32
        found = sdpa.backward([out], *pairs[:3], [out], [stat], *pairs[3:], None, False)
        assert [t.shape for t in found] == [side[0].shape for side in pairs[:3]]
        assert all(t.is_contiguous() for t in (out, stat, *found))
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("offset", [NO_OFFSET, 0])
def test_outputs_statistics_and_gradients_are_the_definitions(monkeypatch: pytest.MonkeyPatch, offset: int) -> None:
    """Torch's flash attention for CPUs, which returns the same values, stands in for the one on GPUs."""
    aten = torch.ops.aten

    def forward(q, k, v, causal, scale):
        assert torch.are_deterministic_algorithms_enabled() is False
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    def backward(g, q, k, v, out, lse, causal, scale):
        assert torch.are_deterministic_algorithms_enabled()
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, lse, 0.0, causal, scale=scale
        )

    monkeypatch.setattr(sdpa, "_forward", forward)
    monkeypatch.setattr(sdpa, "_backward", backward)
    pairs = arguments(Tq=40, Tk=40, E=32, EV=32, dtype=torch.float32, offset=offset, device="cpu")
    q, k, v = leaves = [side[0].double().requires_grad_() for side in pairs[:3]]
    want, want_stat = reference.attention(
        Pair(q, k, v, NO_LENGTHS, NO_LENGTHS, offset, 0.3, 0.0, torch.zeros(1).long(), False)
    )
    out, stat = sdpa.forward(*pairs, None, False)
    torch.testing.assert_close(out.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stat.double(), want_stat.detach(), rtol=1e-5, atol=1e-5)
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    found = sdpa.backward([g], *pairs[:3], [out], [stat], *pairs[3:], None, False)
    for got, exact in zip(found, torch.autograd.grad(want, leaves, g.double()), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5)

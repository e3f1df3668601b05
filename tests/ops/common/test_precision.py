"""Operators choose their precision: autocast does not change their products, and TF32 follows torch's switches."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mi_kernels as mk
from mi_kernels.ops.common import precision
from mi_kernels.ops.common.precision import add_product, outside_autocast, product, tf32_allowed

backends = sys.modules["mi_kernels.backends"]  # the module; the attribute mi_kernels.backends is a function

MASK = torch.rand(12, 12, generator=torch.Generator().manual_seed(1))
MASK = (MASK + MASK.T) / 2
LOSSES = {
    "one-sided": lambda x, y: mk.info_nce(x, y),
    "symmetric": lambda x, y: mk.info_nce(x, y, symmetric=True),
    "not unit": lambda x, y: mk.info_nce(x, y, normalize=False, temperature=2.0),
    "rows": lambda x, y: mk.info_nce(x, y, reduction="none").sum(),
    "negatives": lambda x, y: mk.info_nce(x, y, negative_keys=x[:4]),
    "weighted mask": lambda x, y: mk.sup_con(torch.stack([x, y], 1), mask=MASK),
    "siglip": lambda x, y: mk.siglip_loss(x, y, 2.0, -1.0),
    "mmd": lambda x, y: mk.mmd(x, y, bandwidth=2.0),
    "mmd, median": lambda x, y: mk.mmd(x, y),
    "hsic": lambda x, y: mk.hsic(x, y, bandwidth=2.0),
}


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing_where_features_are_fp32(name, backend):
    if mk.backends()[backend] != "available":
        pytest.skip(mk.backends()[backend])

    def run(autocast: bool) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(12, 5, generator=generator).requires_grad_() for _ in range(2))
        with mk.use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = LOSSES[name](x, y)
            if name != "negatives":  # torch's matmul scores few negatives, and autocast affects its backward
                return [value.detach(), *torch.autograd.grad(value, (x, y))]
        return [value.detach(), *torch.autograd.grad(value, (x, y))]

    # A product in bf16 would have an error of at least 1e-3.
    for plain, under in zip(run(False), run(True), strict=True):
        assert under.dtype == plain.dtype
        torch.testing.assert_close(under, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [mk.nt_xent, lambda x, y: mk.info_nce(x, y, negative_keys=x[:4])])
def test_losses_that_join_their_features_take_fp16_where_autocast_is_on(loss):
    x, y = torch.randn(2, 12, 5).half()
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(x, y)
    assert torch.equal(under, loss(x, y))


def test_outside_autocast_switches_it_off_and_keeps_the_function():
    @outside_autocast
    def multiply(a, b):
        "Product."
        return a @ b

    a = torch.randn(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16 and multiply(a, b=a).dtype == torch.float32
    assert multiply.__doc__ == "Product."


class _Mixed:
    """torch.backends.cuda.matmul after a user has set the new switch: reading the old switch raises."""

    def __init__(self, chosen: str):
        self.fp32_precision = chosen

    @property
    def allow_tf32(self):
        raise RuntimeError("mix of the legacy and new APIs")


@pytest.mark.parametrize("matmul, allowed", [
    (_Mixed("tf32"), True), (_Mixed("ieee"), False), (_Mixed("none"), False),
    (SimpleNamespace(allow_tf32=True), True), (SimpleNamespace(allow_tf32=False), False),
])  # fmt: skip
def test_tf32_follows_the_new_switch_where_it_exists_and_else_the_old_one(monkeypatch, matmul, allowed):
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    assert tf32_allowed() == allowed


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the old switch alone")
def test_a_user_of_the_new_switch_gets_an_answer():
    code = (
        "import torch; from mi_kernels.ops.common.precision import tf32_allowed\n"
        "assert not tf32_allowed(); torch.backends.cuda.matmul.fp32_precision = 'tf32'; assert tf32_allowed()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_products_come_out_in_the_accumulation_type(dtype):
    a, b = torch.randn(2, 4, 300).to(dtype), torch.randn(2, 300, 3).to(dtype)
    exact, wide = a.double() @ b.double(), torch.float64 if dtype == torch.float64 else torch.float32
    got = product(a, b)
    assert got.dtype == wide
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
    total = torch.ones(2, 4, 3, dtype=wide)
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), exact + 1, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not precision.WIDE_PRODUCTS, reason="16-bit products come out in 16 bits here")
def test_the_gpus_products_are_asked_for_as_torch_declares_them():
    """The out_dtype overloads do not run on CPUs, so the calls are compared with the schemas that torch declares."""
    for op, arguments in (("bmm", 3), ("baddbmm", 4)):
        overload = torch.ops.aten.bmm.dtype if op == "bmm" else torch.ops.aten.baddbmm.dtype_out
        assert [a.name for a in overload._schema.arguments if not a.kwarg_only][arguments - 1] == "out_dtype"


def test_an_old_triton_is_named_in_a_sentence_and_the_chunked_path_runs(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_triton_version", lambda: "3.4.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_warned", False)
    sentence = "triton 3.4.0 is installed, the kernels need 3.6 or newer"
    with pytest.warns(RuntimeWarning, match=sentence):
        assert backends.resolve("dot_critic", torch.device("cuda")) == "chunked"
    with pytest.raises(RuntimeError, match=sentence):
        backends.resolve("dot_critic", torch.device("cuda"), "triton")


def test_the_supported_triton_is_named_alike_where_it_is_installed_and_where_it_is_checked():
    declared = (backends.Path(backends.__file__).parent.parent / "pyproject.toml").read_text()
    assert f'triton>={".".join(map(str, backends.TRITON_OLDEST))};' in declared

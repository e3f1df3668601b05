"""Every public operator agrees with the fp64 reference, whatever the shapes, dtypes, strides and values.

By default a few dozen calls per family are drawn, the same in every run. MI_KERNELS_HYPOTHESIS=long draws thousands,
different ones in every run.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import mi_kernels as mk
from mi_kernels.backends import requested_backend
from tests.hardening import families, operators, oracle

LONG = os.environ.get("MI_KERNELS_HYPOTHESIS") == "long"
CALLS = {"losses": 60, "bounds over inner products": 40, "drop-ins": 60}
PROFILE = settings(
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink] if LONG else [Phase.explicit, Phase.generate],
)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_operators_agree_with_the_fp64_reference(family: str) -> None:
    @settings(PROFILE, max_examples=2000 if LONG else CALLS.get(family, 25))
    @given(families.FAMILIES[family])
    def agrees(call: operators.Call) -> None:
        torch.manual_seed(0)
        oracle.check(call.function, call.tensors, call.floor, call.terms_of_gradients)

    agrees()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_comparison_notices_small_errors(dtype: torch.dtype) -> None:
    """An error of 1e-4 in the value, or in the gradient alone, on the backend under test exceeds the allowance."""
    x, y = torch.randn(2, 17, 9, dtype=dtype)

    def wrong(part: str) -> oracle.Function:
        def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            value = mk.info_nce(a, b)
            if requested_backend() is None:
                error = 1e-4 * value
                return value + (error.detach() if part == "value" else error - error.detach())
            return value

        return function

    for part in ("value", "gradient"):
        assert max(d.excess for d in oracle.differences(wrong(part), [x, y])) > 1
    assert max(d.excess for d in oracle.differences(mk.info_nce, [x, y])) <= 1




@given(st.sampled_from(oracle.STRIDES), st.sampled_from([(3,), (4, 5), (2, 3, 4), (2, 3, 4, 5)]))
@settings(PROFILE, max_examples=20)
def test_strides_keep_values(kind: str, shape: tuple[int, ...]) -> None:
    t = torch.randn(shape)
    assert torch.equal(oracle.strided(t, kind), t)


def test_a_decoder_reads_nothing_between_the_rows_of_its_code() -> None:
    """NaNs between the rows do not change the result; torch's bf16 product reads beyond rows of odd length."""
    code, w_ih, w_hh = (torch.randn(shape).bfloat16() for shape in ((65, 9), (36, 9), (36, 9)))
    want = mk.lstm_decode(code, w_ih, w_hh, None, None, 2)
    for kind in ("gapped", "sliced"):
        assert torch.equal(mk.lstm_decode(oracle.strided(code, kind), w_ih, w_hh, None, None, 2), want)

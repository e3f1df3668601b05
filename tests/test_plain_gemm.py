"""Every operator of the extension with the plain matrix-product loops, as on a CPU for which oneDNN has no kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mi_kernels.backends import extension_status

TESTS = Path(__file__).parent
# One or two tests per operator that compare the compiled code with the definition in fp64.
CHOSEN = {
    "ops/dot_critic/test_dot_critic.py": "(match_the_fp64 or arbitrary_weights or twice_that) and cpu",
    "ops/mlp_critic/test_mlp_critic.py": "compiled_kernels_equal or twice_that",
    "ops/cross_attention/test_cross_attention.py": "(kernels_equal_the_definition or twice_that) and cpu",
    "ops/lstm_scan/test_lstm_scan.py": "(equals_lstm_cells or accurate_as_cells) and cpu",
    "losses/test_divergences.py": "(over_all_pairs or materialised_definition) and cpu",
}


def run(code: list[str], plain: bool) -> str:
    environment = {**os.environ, "MI_KERNELS_PLAIN_GEMM": str(int(plain)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *code], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(extension_status() != "available", reason="needs the compiled extension")
def test_the_switch_is_heard() -> None:
    load = "import torch\nfrom mi_kernels.backends import extension_status\nextension_status()\n"
    code = f"{load}print(torch.ops.mi_kernels_cpu.brgemm())"
    assert run(["-c", code], plain=True).strip() == "(False, False)"
    assert run(["-c", code], plain=False).strip() == str(torch.ops.mi_kernels_cpu.brgemm())


@pytest.mark.skipif(extension_status() != "available", reason="needs the compiled extension")
@pytest.mark.parametrize("file", list(CHOSEN))
def test_operators_equal_their_definition(file: str) -> None:
    chosen = [str(TESTS / file), "-k", CHOSEN[file]]
    said = run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen], plain=True)
    passed = int(said.strip().splitlines()[-1].split(" passed")[0].split()[-1])
    assert passed >= 4

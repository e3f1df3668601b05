"""Builds the one compiled library of the package, `mi_kernels/_C*.so`; pyproject.toml says everything else.

The library registers operators with TORCH_LIBRARY and has no Python module in it: `torch.ops.load_library`
loads it by its path, so it depends on neither libtorch_python nor the Python version. torch has to be in the
environment that builds (`pip install --no-build-isolation .`). A build that cannot be done, or fails, leaves
a pure-Python install.

Environment: MI_KERNELS_BUILD=python|cpu|cuda|built (cuda: C++ and CUDA, the default where a CUDA toolkit and a CUDA
build of torch are found; built: packs the library that stands in mi_kernels/), MI_KERNELS_SANITIZE=1
(AddressSanitizer and UndefinedBehaviorSanitizer in the C++ code, for `make sanitize`), CXX, MAX_JOBS,
TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import setuptools
from setuptools import setup

if int(setuptools.__version__.partition(".")[0]) < 77:  # --no-build-isolation does not install what pyproject.toml asks
    raise SystemExit(
        f"mi-kernels: setuptools 77 or newer is needed to build, found {setuptools.__version__}. "
        "Run: pip install --upgrade 'setuptools>=77'"
    )

ROOT = Path(__file__).resolve().parent
# at::parallel_for is inlined from headers: these two make it run on the OpenMP threads that torch runs on.
OPENMP = ["-DAT_PARALLEL_OPENMP=1", "-fopenmp"]
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", *OPENMP]
# vptr needs the type information of torch's classes, which torch hides. The first fault ends the process.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
SANITIZED_CXX_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", *SANITIZERS]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo"]


def say(message: str) -> None:
    print(f"mi-kernels: {message}", file=sys.stderr, flush=True)


def pure_python(reason: str) -> dict[str, Any]:
    """No extension in this build; one left from an earlier build in this tree is out of date, so it goes."""
    say(f"no compiled extension: {reason}. The pure-Python path will be used.")
    for stale in (ROOT / "mi_kernels").glob("_C*.so"):
        stale.unlink()
    return {}


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(f"*{suffix}"))


def extension_arguments() -> dict[str, Any]:
    wanted = os.environ.get("MI_KERNELS_BUILD", "")
    if wanted not in ("", "python", "cpu", "cuda", "built"):
        raise SystemExit(f"MI_KERNELS_BUILD must be python, cpu, cuda or built, got {wanted!r}")
    if wanted == "python":
        return pure_python("MI_KERNELS_BUILD=python")
    if wanted == "built":
        return already_built()
    if not sources(".cpp"):
        return pure_python("there is no C++ source in csrc/")
    if importlib.util.find_spec("torch") is None:
        return pure_python("torch is not in the build environment (install it; use --no-build-isolation)")
    compiler = os.environ.get("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return pure_python(f"there is no C++ compiler ({compiler} is not found)")
    try:
        return compiled(wanted)
    except Exception as error:
        return pure_python(f"torch's build tools do not work here: {first_line(error)}")


def already_built() -> dict[str, Any]:
    """The library that an earlier build left in mi_kernels/, as it is."""
    found = list((ROOT / "mi_kernels").glob("_C*.so"))
    if len(found) != 1:
        raise SystemExit(f"MI_KERNELS_BUILD=built needs one library mi_kernels/_C*.so, found {len(found)}")
    from setuptools import Extension
    from setuptools.command.build_ext import build_ext

    class Copy(build_ext):
        def get_ext_filename(self, fullname: str) -> str:
            return os.path.join(*fullname.split(".")[:-1], found[0].name)

        def build_extension(self, ext: Extension) -> None:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.resolve() != found[0]:
                shutil.copy(found[0], target)

    return {
        "ext_modules": [Extension("mi_kernels._C", [], py_limited_api=True)],
        "cmdclass": {"build_ext": Copy},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def compiled(wanted: str) -> dict[str, Any]:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    # torch.cuda.is_available() would be false while a container image is built.
    can_cuda = CUDA_HOME is not None and torch.version.cuda is not None
    # The kernels need 8.0; what torch would choose by itself may be older, and then nothing would build.
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    if wanted == "cuda" and not can_cuda:
        say("MI_KERNELS_BUILD=cuda needs CUDA_HOME and a CUDA build of torch; building C++ only.")
    cuda_sources = sources(".cu") if can_cuda and wanted != "cpu" else []
    defines = ["-DMI_KERNELS_WITH_CUDA=1"] if cuda_sources else []
    sanitized = os.environ.get("MI_KERNELS_SANITIZE", "0") not in ("", "0")
    cxx_flags = CXX_FLAGS + defines + (SANITIZED_CXX_FLAGS if sanitized else [])
    extension = (CUDAExtension if cuda_sources else CppExtension)(
        "mi_kernels._C",
        sources(".cpp") + cuda_sources,
        depends=[*sources(".h"), *sources(".hpp"), *sources(".inl"), *sources(".cuh"), "setup.py"],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": cxx_flags, "nvcc": NVCC_FLAGS + defines},
        # torch's own libgomp has the soname that this asks for and is loaded first: no second one comes in.
        extra_link_args=["-fopenmp", *(SANITIZERS if sanitized else [])],
        py_limited_api=True,
    )

    class BuildOrExplain(BuildExtension.with_options(no_python_abi_suffix=True)):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                pure_python(f"the build failed ({first_line(error)}; the compiler's output is above)")
                self.extensions.clear()
            else:
                say(f"compiled extension built ({'C++ and CUDA' if cuda_sources else 'C++'}).")

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrExplain},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


setup(**extension_arguments())

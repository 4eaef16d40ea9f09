"""Importing FAISS: exactly one of its two distributions, with a matrix kernel that suits the processor."""

import functools
import os
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from curation.errors import ConfigError

DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu")


def require_faiss(threads: int | None = None) -> ModuleType:
    """FAISS, imported; `threads` sets how many threads it uses in this process from now on.

    The first call sets OPENBLAS_CORETYPE (on some processors) and OMP_WAIT_POLICY unless the environment has them.

    Raises ConfigError when neither or both of faiss-cpu and faiss-gpu are installed (both own the same files, so
    together one overwrites the other), or when the one there is does not load.
    """
    faiss = _import_faiss()
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    return faiss


@functools.cache
def _import_faiss() -> ModuleType:
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if not installed:
        raise ConfigError("FAISS is not installed: run `pip install lvd-builder[cpu]` ([gpu] for CUDA 12)")
    if len(installed) > 1:
        raise ConfigError(
            "faiss-cpu and faiss-gpu are both installed and overwrite each other: "
            "run `pip uninstall faiss-cpu faiss-gpu`, then `pip install lvd-builder[cpu]` ([gpu] for CUDA 12)"
        )
    if "OPENBLAS_CORETYPE" not in os.environ and _is_misread(_cpuinfo()):
        os.environ["OPENBLAS_CORETYPE"] = "SKYLAKEX"
    # Waiting threads that spin cost up to three times the wall time where other processes want the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        faiss: ModuleType = import_module("faiss")
    except ImportError as error:  # such as after uninstalling the other of the two
        raise ConfigError(
            f"{installed[0]} is installed but does not load ({error}): "
            f"run `pip install --force-reinstall --no-deps {installed[0]}`"
        ) from error
    return faiss


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text().partition("\n\n")[0] if path.exists() else ""


def _is_misread(cpuinfo: str) -> bool:
    """Whether FAISS's own OpenBLAS (0.3.15) takes this processor for one of 2007 and runs several times too slow.

    It knows AMD's families up to 25 (Zen 3 and 4); Zen 5 (26) multiplies fastest with the kernels for Skylake-X.
    """
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    flags = set(fields.get("flags", "").split())
    skylake_x = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
    return fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", "0")) >= 26 and skylake_x <= flags

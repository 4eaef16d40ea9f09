import os
import subprocess
import sys

import pytest

from curation import faiss_setup
from curation.errors import ConfigError
from curation.faiss_setup import require_faiss

ZEN5 = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
flags\t\t: fpu avx512f avx512cd avx512bw avx512dq avx512vl"""


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if FAISS had not been asked for yet."""
    faiss_setup._import_faiss.cache_clear()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def test_gives_faiss_and_sets_its_threads() -> None:
    before = require_faiss().omp_get_max_threads()
    try:
        assert require_faiss(threads=1).omp_get_max_threads() == 1
        assert require_faiss().omp_get_max_threads() == 1
        assert require_faiss(threads=2).omp_get_max_threads() == 2
    finally:
        require_faiss(threads=before)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("installed", "message"), [((), "FAISS is not installed"), (("faiss-cpu", "faiss-gpu"), "both installed")]
)
def test_none_or_both_are_refused(installed: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_setup, "_is_installed", lambda name: name in installed)
    with pytest.raises(ConfigError, match=message) as error:
        require_faiss()
    assert "pip install lvd-builder[cpu]" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", faiss_setup.DISTRIBUTIONS)
def test_either_one_is_enough(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_setup, "_is_installed", lambda other: other == name)
    assert require_faiss().IndexFlatIP(3).d == 3


@pytest.mark.usefixtures("fresh")
def test_one_whose_files_are_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_setup, "_is_installed", lambda name: name == "faiss-cpu")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="faiss-cpu is installed but does not load"):
        require_faiss()


def test_an_unknown_distribution_is_not_installed() -> None:
    assert not faiss_setup._is_installed("lvd-no-such-distribution")
    assert faiss_setup._is_installed("numpy")


@pytest.mark.parametrize(
    ("cpuinfo", "misread"),
    [
        (ZEN5, True),
        (ZEN5.replace(": 26", ": 25"), False),
        (ZEN5.replace("AuthenticAMD", "GenuineIntel"), False),
        (ZEN5.replace("avx512vl", ""), False),
        ("", False),
        ("CPU implementer : 0x41\nFeatures : fp asimd", False),
    ],
)
def test_which_processors_are_misread(cpuinfo: str, misread: bool) -> None:
    assert faiss_setup._is_misread(cpuinfo) == misread


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("chosen", "expected"), [(None, "SKYLAKEX"), ("Haswell", "Haswell")])
def test_the_kernel_is_chosen_only_if_nobody_did(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_setup, "_cpuinfo", lambda: ZEN5)
    if chosen is None:
        monkeypatch.delenv("OPENBLAS_CORETYPE")
    require_faiss()
    assert os.environ["OPENBLAS_CORETYPE"] == expected


def test_nothing_is_imported_early_and_the_environment_wins() -> None:
    program = (
        "import sys; from curation import neighbors, clustering, components, scoring, faiss_setup;"
        "assert not {'faiss', 'numba'} & set(sys.modules);"
        "import os; print(faiss_setup.require_faiss().__name__, os.environ['OMP_WAIT_POLICY'])"
    )
    for chosen, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | chosen
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert (done.stdout, done.returncode) == (f"faiss {expected}\n", 0), done.stderr

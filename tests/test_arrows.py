"""Which folder may import which: cli -> pipelines, trainer -> curation, embedders; Ray in two files alone."""

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"curation", "embedders", "pipelines", "cli", "trainer"}
ALLOWED = {
    "curation": set(),
    "embedders": set(),
    "pipelines": {"curation", "embedders"},
    "trainer": {"curation", "embedders"},
    "cli": {"pipelines", "trainer", "curation"},
}
RAY_FILES = {"pipelines/executor.py", "trainer/launch.py"}
HEAVY = {"torch", "ray", "faiss", "transformers", "img2dataset"}
NETWORKS = {f"embedders/{name}.py" for name in ("checkpoints", "layouts", "network", "torch_model", "vit")}
"""Files about torch networks; the others import them, as they would torch, inside the functions that need them."""


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    gc.disable()  # what is collected meanwhile may parse code, too, which this Python takes for an error of its own
    try:
        tree = ast.parse(path.read_text())
    finally:
        gc.enable()
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        crossing = imports(path) & FOLDERS - {folder} - ALLOWED[folder]
        assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_ray_is_imported_in_two_files_and_heavy_libraries_never_at_the_top(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        assert "ray" not in imports(path) or name in RAY_FILES, f"{name} imports ray"
        heavy = HEAVY - {"torch"} if name in NETWORKS or folder == "trainer" else HEAVY
        assert not imports(path, top_level_only=True) & heavy, f"{name} imports {heavy} at its top"


def test_what_every_command_imports_leads_to_no_network() -> None:
    code = "import sys, pipelines.embed, embedders.load, embedders.specs, cli.main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]

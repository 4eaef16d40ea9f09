"""The command line answers at once: nothing heavy is imported before it is needed."""

import subprocess
import sys

HEAVY = ("torch", "ray", "faiss", "transformers", "numba", "pyarrow", "duckdb", "numpy", "pydantic", "PIL")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, cli.main\n"
        "sys.argv = ['lvd', '--help']\n"
        "try:\n    cli.main.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("LOADED []"), done.stdout[-300:]

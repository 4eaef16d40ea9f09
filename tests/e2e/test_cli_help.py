"""Every command's help has examples, and every example works as it stands, in the order of the commands."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer.main
import yaml
from world import RECIPE, call, draw, lvd, web_images, write_folder, write_images

from cli.main import app
from pipelines import executor


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Commands by name, those of groups as `GROUP COMMAND`."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{name} ") if hasattr(command, "commands") else {f"{prefix}{name}": command}
    return found


COMMANDS = commands(typer.main.get_command(app))
ANY_ID = "0123456789abcdef0123456789abcdef"
TESTED_ELSEWHERE = ("demo",)


def examples(name: str) -> list[list[str]]:
    """The examples in a command's help, as arguments."""
    text = COMMANDS[name].help.partition("Examples:")[2].replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("lvd ")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the examples mention."""
    place = tmp_path_factory.mktemp("examples")
    images = web_images(80)
    write_images(place / "photos.parquet", images)
    write_folder(place / "flowers", [(draw(5, 500 + n), 5) for n in range(12)])
    (place / "urls.csv").write_text("url\n" + "".join(f"http://127.0.0.1:9/{n}.jpg\n" for n in range(5)))
    sources = {
        "web": {"role": "pool", "images": "photos.parquet", "label_column": "label"},
        "flowers": {"role": "query", "folder": "flowers"},
    }
    parts = [{"retrieved": "flowers", "mode": "sample", "k": 2}, {"balanced": "pool", "target": 30}]
    (place / "recipe.yaml").write_text(
        yaml.safe_dump({"seed": 0, "sources": sources, "cluster": RECIPE["cluster"], "parts": parts})
    )
    return place


@pytest.fixture
def in_process(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Commands run in the examples' directory, without Ray, which other tests start."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(executor, "open_executor", lambda *_: executor.LocalExecutor())
    return monkeypatch


def test_every_command_has_examples() -> None:
    assert {name: len(examples(name)) for name in COMMANDS if len(examples(name)) < 1} == {}
    assert all(example[: len(name.split())] == name.split() for name in COMMANDS for example in examples(name))


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in TESTED_ELSEWHERE])
def test_the_examples_work(
    name: str, workplace: Path, in_process: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for example in examples(name):
        if ANY_ID in example:
            first = pq.read_table(workplace / "run" / "images" / "web" / "part-00000.parquet")["image_id"][0].as_py()
            example = [first if argument == ANY_ID else argument for argument in example]
        assert call(in_process, *example) == 0, f"lvd {shlex.join(example)}\n{capfd.readouterr().err}"


def test_the_help_names_every_command(workplace: Path) -> None:
    told = lvd("--help", cwd=workplace).stdout
    assert all(name.split()[0] in told for name in COMMANDS)
    assert "130 interrupted" in " ".join(told.replace("│", " ").split())
    assert "Examples:" in lvd("dedup", "--help", cwd=workplace).stdout


def complete(monkeypatch: pytest.MonkeyPatch, instruction: str) -> None:
    """Run the installed command as a shell does for completion."""
    monkeypatch.setenv("_LVD_COMPLETE", instruction)
    monkeypatch.setattr(sys, "argv", ["lvd"])
    with pytest.raises(SystemExit) as ended:
        app(prog_name="lvd")
    assert ended.value.code == 0


def test_completion_prints_a_script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    complete(monkeypatch, "source_bash")
    assert "_LVD_COMPLETE=complete_bash" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("lvd ver", ["verify"]),
        ("lvd run lvd1", ["lvd142m"]),
        ("lvd plan de", ["demo"]),
        ("lvd run demo --from re", ["retrieve", "rebalance"]),
        ("lvd train vitl", ["vitl14", "vitl16_short"]),
        ("lvd eval l", ["linear", "logistic"]),
    ],
)
def test_completion_knows_commands_recipes_and_stages(
    words: str, told: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    complete(monkeypatch, "complete_bash")
    assert capfd.readouterr().out.split() == told

"""The documents are true where that can be checked: links, commands, recipe keys, columns, reasons; container files."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import typer
import yaml

from cli.main import app
from curation import schemas
from curation.config import Settings
from curation.filters import FILTER_REASONS
from pipelines import recipe
from pipelines.fetch_errors import RETRYABLE, Reason
from pipelines.join import EDGES
from pipelines.recall import RECALL
from pipelines.retrieve_recall import RETRIEVAL_RECALL
from trainer import config
from trainer.build import make_schedules

ROOT = Path(__file__).parent.parent
DOCS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
LOCAL_PATH = re.compile(r"(?<![\w.:/-])/(work|tmp|home|root)\b")
REGISTRY = re.compile(r"(?i)py[p]i|python[h]osted|download\.py[t]orch|conda\.a[n]aconda|docker\.[i]o|g[h]cr|qu[a]y\.io")
"""Hosts of package registries; in brackets, so that they do not stand here either."""
RECIPES: dict[str, type[Settings]] = {
    "Top level": recipe.Recipe,
    "sources.NAME": recipe.SourceSettings,
    "download": recipe.DownloadSettings,
    "filter": recipe.FilterSettings,
    "embedders.NAME": recipe.EmbedderSettings,
    "dedup": recipe.DedupSettings,
    "dedup.join": recipe.JoinSettings,
    "cluster": recipe.ClusterSettings,
    "retrieve": recipe.RetrieveSettings,
    "parts": recipe.PartSettings,
    "shard": recipe.ShardSettings,
}
TRAINER: dict[str, type[Settings]] = {
    "Settings": config.TrainSettings,
    "data": config.DataSettings,
    "data.sources.NAME": config.SourceSettings,
    "crops": config.CropSettings,
    "masks": config.MaskSettings,
    "model": config.ModelSettings,
    "heads": config.HeadSettings,
    "loss": config.LossSettings,
    "optimizer": config.OptimizerSettings,
    "schedule": config.ScheduleSettings,
    "teacher": config.TeacherSettings,
    "evaluation": config.EvaluationSettings,
}
SECTIONS = {
    **{("docs/recipes.md", title): model for title, model in RECIPES.items()},
    **{("docs/trainer.md", title): model for title, model in TRAINER.items()},
}
COLUMNS = {
    "urls": schemas.URLS,
    "images": schemas.IMAGES,
    "filtered": schemas.FILTERED,
    "index": schemas.INDEX,
    "embeddings": schemas.embeddings(8),
    "duplicates": schemas.DUPLICATES,
    "forest": EDGES,
    "recall": RECALL,
    "centroids": schemas.centroids(8),
    "clusters": schemas.CLUSTERS,
    "retrieved": schemas.RETRIEVED,
    "retrieval_recall": RETRIEVAL_RECALL,
    "selection": schemas.SELECTION,
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading {title}"
    return found.group(1)


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows but headers and rules; `|` may not stand in a cell."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0].startswith("`")]


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `lvd` in fenced code, also as `python -m cli.main`, behind `--` or torchrun."""
    for language, block in FENCE.findall(text):
        if language not in ("", "sh", "bash", "console", "text"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").replace("python -m cli.main", "lvd")
            line = re.sub(r"^(.* --|torchrun .* -m)\s+(lvd|cli\.main) ", "lvd ", line)
            if line.startswith("lvd "):
                yield shlex.split(line, comments=True)[1:]


def parse(arguments: list[str]) -> None:
    """Parse a command line as `lvd` would, without running it. Raises click's errors."""
    command: Any = typer.main.get_command(app)
    name = "lvd"
    while hasattr(command, "commands") and not arguments[0].startswith("-"):
        name, arguments = arguments[0], arguments[1:]
        command = command.commands.get(name)
        assert command is not None, f"no command {name}"
    try:
        command.make_context(name, list(arguments))
    except typer.Exit:
        assert "--help" in arguments or "-h" in arguments


def test_the_command_check_can_fail() -> None:
    parse(["run", "recipe.yaml", "--out", "run"])
    parse(["eval", "knn", "net", "--train", "a", "--test", "b"])
    wrong_options = (["run", "recipe.yaml", "--out", "run", "--wrokers", "2"], ["eval", "knn", "net", "--train", "a"])
    for wrong in (["run", "recipe.yaml"], *wrong_options, ["rum"], ["eval", "kmn", "net"]):
        with pytest.raises(Exception, match=r"(?i)missing|no such option|no command"):
            parse(wrong)


def test_commands_are_found_in_all_their_forms() -> None:
    shell = "```sh\nray job submit -- \\\n  python -m cli.main run a --out b\nlvd stats run # why\n"
    shell += "torchrun --nproc-per-node 2 -m cli.main train laptop --out c\n```\n"
    text = shell + "```python\nlvd x\n```\n"
    assert list(commands(text)) == [["run", "a", "--out", "b"], ["stats", "run"], ["train", "laptop", "--out", "c"]]


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_command_in_the_documents_parses(path: Path) -> None:
    for arguments in commands(path.read_text()):
        try:
            parse(arguments)
        except Exception as error:
            pytest.fail(f"{path.name}: lvd {shlex.join(arguments)}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_relative_link_resolves(path: Path) -> None:
    text = FENCE.sub("", path.read_text())
    for target in INLINE_LINK.findall(text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_no_place_of_one_machine_and_no_registry(path: Path) -> None:
    text = path.read_text()
    assert not LOCAL_PATH.search(text), LOCAL_PATH.search(text)
    assert not REGISTRY.search(text), REGISTRY.search(text)


@pytest.mark.parametrize(
    "path", ["docker/Dockerfile", "docker/compose.yaml", "pyproject.toml", "Makefile", "constraints.txt"]
)
def test_no_registry_in_what_installs(path: str) -> None:
    assert not REGISTRY.search(read(path))


def test_local_paths_are_recognised() -> None:
    assert LOCAL_PATH.search("see /tmp/x")
    assert LOCAL_PATH.search("`/home/me`")
    assert not LOCAL_PATH.search("s3://bucket/tmp/x, runs/tmp, https://host/home/x")


def shown(model: type[Settings], key: str) -> str | None:
    """A key's default as the tables write it; None where prose stands for it."""
    field = model.model_fields[key]
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Settings | dict):
        return None
    if key == "name" and model is recipe.Recipe:
        return "unnamed"
    if isinstance(default, tuple):
        return f"[{', '.join('null' if value is None else str(value) for value in default)}]"
    return "" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)


@pytest.mark.parametrize(("file", "title"), SECTIONS)
def test_tables_of_settings_name_every_key_with_its_default(file: str, title: str) -> None:
    model = SECTIONS[file, title]
    table = {key.strip("` "): row[1] for row in rows(section(read(file), title)) for key in row[0].split(",")}
    assert table.keys() == model.model_fields.keys()
    for key, told in table.items():
        default = shown(model, key)
        assert default is None or told == default, f"{title}: {key} is {default!r} by default, the table says {told!r}"


def test_the_example_recipe_is_valid() -> None:
    (example,) = (block for language, block in FENCE.findall(read("docs/recipes.md")) if language == "yaml")
    assert recipe.Recipe.model_validate(yaml.safe_load(example)).name == "birds"


def test_the_example_of_a_training_recipe_is_valid() -> None:
    (example,) = (block for language, block in FENCE.findall(read("docs/trainer.md")) if language == "yaml")
    settings = config.TrainSettings.model_validate(yaml.safe_load(example))
    assert settings.data.sources["photos"].homogeneous and settings.schedule.in_steps(settings.schedule.warmup) == 5000


def test_the_table_of_presets_has_their_numbers() -> None:
    told = {row[0].strip("`"): row for row in rows(section(read("docs/trainer.md"), "Recipes and presets"))}
    assert told.keys() == set(config.shipped())
    for name, (_, _, images, rates, lengths, _) in told.items():
        settings = config.load_settings(name)
        base, *at_batch = (float(rate) for rate in rates.split(", "))
        assert base == settings.optimizer.base_lr, name
        ranks, batch = re.fullmatch(r"(?:(\d+) ranks of )?(\d+)", images).groups() if images != "any" else (None, None)
        if batch is not None:
            assert int(batch) == settings.batch_size, name
            peak = make_schedules(settings, int(ranks or 1) * int(batch)).peak_lr
            assert at_batch == [pytest.approx(peak, rel=2e-3)], name
        steps, warmup = (int(length.replace(",", "")) for length in lengths.split("; "))
        assert (steps, warmup) == (settings.schedule.steps, settings.schedule.in_steps(settings.schedule.warmup)), name


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_column_is_described(kind: str) -> None:
    described = section(read("docs/file-format.md"), kind)
    names = [name for row in rows(described) for name in re.findall(r"`([a-z_0-9]+)`", row[0])]
    assert names == COLUMNS[kind].names


def test_columns_that_may_be_null_are_marked() -> None:
    for kind, schema in COLUMNS.items():
        for row in rows(section(read("docs/file-format.md"), kind)):
            for name, told in zip(re.findall(r"`([a-z_0-9]+)`", row[0]), expand(row), strict=True):
                field: pa.Field = schema.field(name)
                lists = pa.types.is_fixed_size_list(field.type)
                assert told.endswith("?") == (field.nullable and not lists), f"{kind}.{name}"


def expand(row: list[str]) -> list[str]:
    """The type of each column that a row describes: one for all, or one each."""
    names, kinds = row[0].split(","), row[1].split(", ")
    return kinds * len(names) if len(kinds) == 1 else kinds


def test_every_reject_reason_is_described() -> None:
    table = {
        row[0].strip("`"): row[1] for row in rows(section(read("docs/file-format.md"), "Rejects")) if len(row) == 3
    }
    assert {reason: told == "yes" for reason, told in table.items() if reason in set(Reason)} == {
        str(reason): reason in RETRYABLE for reason in Reason
    }


def test_every_filter_reason_is_described() -> None:
    told = section(read("docs/file-format.md"), "filtered")
    assert all(f"`{reason}`" in told for reason in FILTER_REASONS)


def test_the_modules_and_functions_that_fidelity_names_exist() -> None:
    for path, names in re.findall(r"`([a-z_0-9]+/[a-z_0-9]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", read("docs/fidelity.md")):
        source = read(path)
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), f"{path} has no {name}"


def test_the_compose_file_is_yaml_and_names_a_target_that_exists() -> None:
    compose = yaml.safe_load(read("docker/compose.yaml"))
    assert set(compose["services"]) == {"head", "worker", "demo"}
    for service in compose["services"].values():
        assert f"AS {service['build']['target']}\n" in read("docker/Dockerfile")
        assert (ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    submitted = compose["services"]["demo"]["entrypoint"]
    parse(submitted[submitted.index("lvd") + 1 :])


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    allowed = {line[1:] for line in read(".dockerignore").splitlines() if line.startswith("!")}
    copied = [
        word
        for line in re.findall(r"^COPY (.*) \S+$", read("docker/Dockerfile"), re.MULTILINE)
        for word in line.split()
    ]
    assert copied
    assert set(copied) <= allowed
    wheel = tomllib.loads(read("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= set(copied)

"""Training by the command: stopped by a real Ctrl-C and resumed, over several ranks, evaluated, exported, embedded."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from world import ROOT, TRAINING, call, draw, environment, lvd, start, web_images, write_folder, write_images

PATIENCE_SECONDS = 400
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TRAIN = ("train", "tiny.yaml", "--device", "cpu", "--images")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, a folder of photographs, and labelled Parquet files."""
    place = tmp_path_factory.mktemp("training")
    (place / "tiny.yaml").write_text(yaml.safe_dump(TRAINING))
    images = [(draw(n % 3, n), n % 3) for n in range(36)]
    write_folder(place / "photos", images)
    write_images(place / "labelled.parquet", images)
    write_images(place / "test.parquet", [(draw(n % 3, 100 + n), n % 3) for n in range(12)])
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nothing interrupted."""
    told = lvd(*TRAIN, "photos", "--out", "whole", cwd=place, timeout=PATIENCE_SECONDS, **ONE_THREAD)
    assert "30 steps, 120 images" in told.stdout and "(as an embedder: vit:whole/model.safetensors)" in told.stdout
    assert "36 images, 4 a step, on cpu in float32" in told.stderr and "step 30/30  loss " in told.stderr
    return place / "whole"


@pytest.fixture(scope="module")
def curated(place: Path) -> Path:
    """A run of the pipeline, by `recipe.yaml`, of the labelled images."""
    images = {"role": "pool", "images": "labelled.parquet", "label_column": "label"}
    recipe = {"sources": {"web": images}, "parts": [{"balanced": "pool", "target": 9}], "cluster": {"num_clusters": 3}}
    recipe |= {"filter": {"min_side": 32}, "dedup": {"embedder": "copies"}}
    recipe |= {"embedders": {"default": {"model": "dct", "compile": False}, "copies": {"model": "dct"}}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lvd("run", "recipe.yaml", "--out", "run", "--local", cwd=place, timeout=PATIENCE_SECONDS, **ONE_THREAD)
    return place / "run"


def wait_for_steps(run: Path, process: "subprocess.Popen[str]", count: int) -> None:
    """Until a run has logged so many steps; the command must not end before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_text().count("\n") < count:
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()[1]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def model(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_weights(place: Path, whole: Path) -> None:
    stopped = start(*TRAIN, "photos", "--out", "stopped", cwd=place, **ONE_THREAD)
    wait_for_steps(place / "stopped", stopped, 3)
    stopped.send_signal(signal.SIGINT)
    _, told = stopped.communicate(timeout=PATIENCE_SECONDS)
    assert stopped.returncode == 130, told
    assert told.splitlines()[-1].startswith("error: stopped after ") and "Traceback" not in told
    assert "resume to go on" in told and not (place / "stopped/model.safetensors").exists()
    told = lvd(*TRAIN, "photos", "--out", "stopped", cwd=place, code=2).stderr
    assert "stopped is not empty: resume the run in it" in told
    lvd("train", "--out", "stopped", "--resume", "--device", "cpu", cwd=place, **ONE_THREAD)
    assert model(place / "stopped") == model(whole)
    assert json.loads((place / "stopped/settings.json").read_text())["schedule"]["steps"] == 30


def test_what_a_run_leaves_to_look_at(whole: Path) -> None:
    crops, patches = (
        Image.open(whole / "pictures" / name).convert("RGB") for name in ("crops.png", "patches-00000030.png")
    )
    assert crops.width > 4 * 112 and crops.height > 4 * 112 > 112 < patches.width
    pinks = sum(count for count, (r, g, b) in crops.getcolors(1 << 24) or [] if r > g + 60 and b > g + 60)
    assert pinks > 112 * 112 / 10
    assert len(patches.getcolors(1 << 24) or []) > 30


@pytest.mark.timeout(900)
def test_torchrun_and_ray_train_the_same(place: Path) -> None:
    lines = []
    arguments = (*TRAIN, "photos", "--set", "schedule.steps=4", "--set", "data.workers=0")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*ranks, "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "cli.main", *arguments]
    done = subprocess.run(
        [*command, "--out", "by-torchrun"],
        cwd=place,
        env=environment(**ONE_THREAD),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "36 images, 8 a step on 2 ranks" in done.stderr and done.stdout.count("4 steps, 32 images") == 1
    told = lvd(*arguments, "--out", "by-ray", "--workers", "2", cwd=place, timeout=PATIENCE_SECONDS, **ONE_THREAD)
    assert "step 4/4  loss" in told.stderr and "4 steps, 32 images" in told.stdout
    assert {path.name for path in (place / "by-ray").iterdir()} == {p.name for p in (place / "by-torchrun").iterdir()}
    for run in ("by-torchrun", "by-ray"):
        text = (place / run / "metrics.jsonl").read_text().splitlines()
        lines.append([{k: v for k, v in json.loads(t).items() if k != "images_per_second"} for t in text])
    assert lines[0] == lines[1] and len(lines[0]) == 4
    assert model(place / "by-torchrun") == model(place / "by-ray")


@pytest.mark.timeout(900)
def test_ctrl_c_on_ray_saves_and_one_process_reads_it(place: Path) -> None:
    more = ("--set", "schedule.steps=100000", "--set", "data.workers=0")
    process = start(*TRAIN, "photos", "--out", "on-ray", "--workers", "2", *more, cwd=place, **ONE_THREAD)
    wait_for_steps(place / "on-ray", process, 2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, told
    assert "stopped after" in told.splitlines()[-1] and "Traceback" not in told
    assert not (place / "on-ray/.ray").exists()
    other = ("train", "--out", "on-ray", "--resume", "--workers", "1", "--set", "seed=3")
    wrong = lvd(*other, cwd=place, code=2, timeout=PATIENCE_SECONDS).stderr
    assert "has 8 images a step, now it would be 4: set batch_size" in wrong
    told = lvd("eval", "knn", "on-ray", "--train", "labelled.parquet", "--test", "test.parquet", cwd=place).stdout
    assert "top-1" in told


def test_the_export_is_the_next_embedder(place: Path, whole: Path, curated: Path) -> None:
    assert "vit:own.safetensors" in lvd("export", "whole", "own.safetensors", "--to", "lvd", cwd=place).stdout
    lvd("export", "whole", "own", "--to", "transformers", cwd=place)
    vectors = []
    for run, model in (("next", "vit:own.safetensors"), ("next-hf", "vit:own")):
        ours = ("--set", f"embedders.default.model={model}", "--set", "embedders.default.precision=float32")
        lvd("run", "recipe.yaml", "--out", run, "--local", *ours, cwd=place, timeout=PATIENCE_SECONDS, **ONE_THREAD)
        vectors.append(pq.read_table(place / run / "embeddings/default/web/part-00000.parquet").to_pylist())
    assert [row["image_id"] for row in vectors[0]] == [row["image_id"] for row in vectors[1]]
    assert len(vectors[0]) == 36 and len(vectors[0][0]["embedding"]) == 32
    assert all(
        sum(a * b for a, b in zip(x["embedding"], y["embedding"], strict=True)) > 0.999
        for x, y in zip(*vectors, strict=True)
    )


def first_commands(file: str, heading: str) -> list[list[str]]:
    """The training commands in the first block of shell behind a text, with fewer steps."""
    block = (ROOT / file).read_text().partition(heading)[2].partition("```sh\n")[2].partition("```")[0]
    return [shlex.split(line.replace("=20", "=2"), comments=True)[1:] for line in block.splitlines()]


@pytest.mark.parametrize(
    ("file", "heading", "count"),
    [("README.md", "Train a vision transformer on them", 3), ("docs/trainer.md", "## A first look", 5)],
)
def test_the_first_commands_of_the_documents_work_as_they_stand(
    file: str,
    heading: str,
    count: int,
    place: Path,
    curated: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    shutil.rmtree(place / "net", ignore_errors=True)
    found = first_commands(file, heading)
    assert len(found) == count
    for arguments in found:
        assert call(monkeypatch, *arguments) == 0, f"lvd {shlex.join(arguments)}\n{capfd.readouterr().err}"


@pytest.fixture
def failing(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process and the directory; it must fail with a code. Returns its one line."""
    monkeypatch.chdir(place)

    def run(*arguments: str, code: int = 2) -> str:
        capfd.readouterr()
        assert call(monkeypatch, *arguments) == code
        told = capfd.readouterr().err
        assert "Traceback" not in told
        return told.strip().splitlines()[-1]

    return run


def test_wrong_data_and_wrong_weights_are_one_clear_line(place: Path, whole: Path, failing: Any) -> None:
    pq.write_table(pa.table({"jpeg": [b"x"], "image": ["a path"]}), place / "paths.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), place / "none.parquet")
    (place / "torn.parquet").write_bytes((place / "labelled.parquet").read_bytes()[:-50])
    (place / "nothing").mkdir(exist_ok=True)
    out = ("--out", "fails")
    column = ("--set", "data.sources.images.image_column=jpg")
    for arguments, says in [
        ((*TRAIN, "paths.parquet"), "column 'image' holds string, not the bytes of images; set image_column to"),
        ((*TRAIN, "labelled.parquet", *column), "no column 'jpg'; set image_column to one of image, label"),
        ((*TRAIN, "none.parquet"), "none.parquet"),
        ((*TRAIN, "torn.parquet"), "torn.parquet"),
        ((*TRAIN, "nothing"), "holds neither Parquet files nor images"),
        ((*TRAIN, "nowhere"), "nowhere does not exist"),
        (TRAIN[:-1], "no sources to train on: give --images, or data.sources"),
        ((*TRAIN, "photos", "--eval-train", "labelled.parquet"), "evaluation: give both train and test"),
        ((*TRAIN, "photos", "--set", "schedule.step=3"), "unknown key schedule.step (did you mean steps?)"),
        ((*TRAIN, "photos", "--init", "whole", "--set", "model.depth=3"), "another network: depth is 2 there, 3 here"),
        ((*TRAIN, "photos", "--init", "labelled.parquet"), "labelled.parquet"),
        (("distill", *TRAIN[1:], "photos"), "nothing to learn from: give --teacher"),
        (
            ("distill", *TRAIN[1:], "photos", "--teacher", "whole", "--set", "heads.prototypes=8"),
            "heads.prototypes is 8, the teacher has 24",
        ),
    ]:
        assert says in failing(*arguments, *out), arguments
    shutil.rmtree(place / "fails", ignore_errors=True)
    places = ("--train", "labelled.parquet", "--test", "test.parquet")
    for arguments, says in [
        (("eval", "knn", "nowhere", *places), "nowhere"),
        (("eval", "knn", "whole", *places, "--size", "30"), "do not divide into patches of 14; set crop to 28"),
        (("eval", "knn", "whole", *places, "--label-column", "class"), "no column 'class'"),
        (("eval", "knn", "whole", *places, "--train-rows", "some"), "rows 'some': give START:STOP"),
        (("eval", "linear", "whole", *places, "--chosen-on", "train"), "--chosen-on train"),
        (("export", "whole", "x.safetensors", "--to", "onnx"), "--to onnx: give lvd or transformers"),
        (("export", "whole", "x.bin", "--to", "lvd"), "x.bin"),
    ]:
        assert says in failing(*arguments), arguments


def test_images_that_cannot_be_decoded_are_replaced_counted_and_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    images = web_images(20)
    images[7] = (images[7][0][:200], 0)
    images[11] = (b"<html>", 0)
    write_images(place / "corrupt.parquet", images)
    more = ("--set", "schedule.steps=5", "--set", "data.workers=0")
    assert call(monkeypatch, *TRAIN, "corrupt.parquet", "--out", "corrupt", *more) == 0
    told = capfd.readouterr().out
    rejects = [json.loads(line) for line in (place / "corrupt/rejects.jsonl").read_text().splitlines()]
    assert {Path(reject["file"]).name for reject in rejects} == {"corrupt.parquet"}
    assert {reject["row"] for reject in rejects} == {7, 11}
    assert f"{len(rejects)} times an image could not be decoded" in told and "rejects.jsonl" in told


def test_a_source_of_nothing_but_rubbish_is_an_error(failing: Any, place: Path) -> None:
    write_images(place / "rubbish.parquet", [(b"rubbish", 0)] * 5)
    line = failing(*TRAIN, "rubbish.parquet", "--out", "rubbish", "--set", "data.workers=0", code=1)
    assert "source images: 17 images in a row cannot be decoded" in line and "rubbish.parquet" in line


def test_a_step_that_is_not_finite_stops_the_run_and_names_it(failing: Any, place: Path) -> None:
    wild = ("--set", "optimizer.base_lr=1e30", "--set", "schedule.warmup=0", "--set", "checkpoint_every=1")
    line = failing(*TRAIN, "photos", "--out", "wild", *wild, "--set", "data.workers=0", code=1)
    assert (
        "not finite, nothing was updated by it" in line and "the last good checkpoint is wild/checkpoints/step-" in line
    )
    failure = json.loads((place / "wild/failure-rank0.json").read_text())
    assert len(failure["image_ids"]) == 4 and all(len(name) == 32 for name in failure["image_ids"])
    assert f"step {failure['step']}: " in line


def test_k_nn_and_gauges_are_logged_and_rows_left_out_are_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    labels = [(draw(n % 3, n), n % 3) for n in range(9)] + [(b"no image", 0)]
    write_images(place / "partly.parquet", labels)
    evaluated = ("--eval-train", "labelled.parquet", "--eval-test", "partly.parquet")
    more = ("--set", "schedule.steps=4", "--set", "eval_every=2", "--set", "data.workers=0")
    assert call(monkeypatch, *TRAIN, "photos", "--out", "evaluated", *evaluated, *more) == 0
    told = capfd.readouterr().err
    assert "evaluation: 36 labelled images as bank and 9 as queries" in told
    assert "1 rows cannot be used; the first" in told and "partly.parquet row 9" in told
    lines = [json.loads(line) for line in (place / "evaluated/metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "knn_10" in line]
    assert [line["step"] for line in found] == [2, 4]
    assert found[0].keys() >= {"knn_200", "cls_std", "koleo_distance", "prototype_entropy_of_mean"}
    assert {path.name for path in (place / "evaluated/pictures").iterdir()} == {
        *("crops.png", "patches-00000002.png", "patches-00000004.png")
    }


@pytest.mark.timeout(900)
def test_a_lost_rank_begins_again_from_the_newest_checkpoint(place: Path) -> None:
    import psutil

    more = ("--set", "schedule.steps=60", "--set", "checkpoint_every=5", "--set", "data.workers=0")
    process = start(*TRAIN, "photos", "--out", "lost", "--workers", "1", *more, cwd=place, **ONE_THREAD)
    try:
        wait_for_steps(place / "lost", process, 12)
        children = psutil.Process(process.pid).children(recursive=True)
        (rank,) = (child for child in children if "RayTrainWorker" in " ".join(child.cmdline()))
        rank.kill()
        out, told = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, told
    steps = [json.loads(line)["step"] for line in (place / "lost/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61)) and "60 steps, 240 images" in out

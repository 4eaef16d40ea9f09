"""Does a small network learn on a processor, and from a larger one better than alone? CIFAR-10, by its neighbors.

    python -m benchmarks.learning learn --data DIR --out RUNS [--seeds 0] [--steps N]
    python -m benchmarks.learning control --data DIR --out RUNS [--seeds 0] [--steps N]
    python -m benchmarks.learning distill --data DIR --out RUNS --teacher RUN [--seeds 0 1 2] [--steps N]
    python -m benchmarks.learning finish --data DIR --out RUNS --teacher RUN [--seeds 0] [--steps N]

DIR holds `cifar10_train.parquet` (columns image, label). Its first 45,000 rows are trained on, without labels, and are
the bank of k-NN (k=20, T=0.07); the other 5,000 ask. `learn` trains a ViT of depth 6, width 192, patches of 4 pixels.
`control` does the same, but the teacher sees other images than the student, so that nothing can be learnt of them.
`distill` trains a smaller network three times a seed: alone, from the teacher, and alone for as much CPU time as that
took. `finish` goes on with RUN at the images' own 32 pixels. A run goes on where it was interrupted; one that is done
is read again.

Printed: k-NN of raw pixels, of untrained networks and of trained ones; retrieval, the share of the 5,000 images that
are the nearest to a random crop of theirs (a global one of the training, colours changed); the curve over steps, and
gauges of collapse. CPU time is that of the process, its evaluations left out.
"""

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

import trainer.build
from benchmarks.measure import machine
from curation.config import override, validate
from embedders.vit import VisionTransformer
from pipelines.stats import Table, markdown
from trainer import gauges
from trainer.batch import Masks
from trainer.build import crop_settings, make_pair
from trainer.config import TrainSettings
from trainer.crops import GLOBAL_CROPS, CropMaker, collate
from trainer.features import Pixels, evaluation_preprocessing, extract, features_of, pixels_of
from trainer.knn import centred_pixels, evaluate_knn
from trainer.labelled import Labelled, read
from trainer.metrics import FILE
from trainer.objective import Inputs, SelfDistillation
from trainer.pair import Pair
from trainer.start import open_weights
from trainer.step import augmented
from trainer.train import train

IMAGES = "cifar10_train.parquet"
BANK_ROWS = 45_000
CURVE_BANK = 10_000
"""Of the bank, for the curve."""
K = 20
SIDE, FINISHED_SIDE = 24, 32
"""Pixels a side at which networks are examined; those of `finish` at both."""
PRECISION = "bfloat16"
"""Of the products in networks that are examined."""
POINTS = 12
"""Evaluations on a curve."""
STEPS = {"learn": 7000, "control": 1750, "distill": 750, "finish": 300}
SMALL = ["model.dim=96", "model.depth=4"]
FINISH = ["crops.global_size=32", "crops.local_size=16", "optimizer.base_lr=0.001", "schedule.momentum=[0.99, 1.0]"]

SETTINGS = [
    *("model.dim=192", "model.depth=6", "model.heads=3", "model.patch_size=4", "model.layer_scale=1.0"),
    *("crops.global_size=20", "crops.global_scale=[0.4, 1.0]", "crops.local_size=12", "crops.local_scale=[0.15, 0.5]"),
    *("crops.local_crops=4", "crops.colors=sharp"),
    *("heads.prototypes=512", "heads.hidden=512", "heads.bottleneck=128"),
    *("loss.ibot=0.0", "loss.koleo=0.03", "loss.centering=softmax"),
    *("loss.teacher_temperature=[0.04, 0.04]", "loss.teacher_temperature_warmup=0"),
    *("optimizer.base_lr=0.004", "optimizer.betas=[0.9, 0.99]", "optimizer.weight_decay=[0.04, 0.1]"),
    *("optimizer.layerwise_decay=1.0", "optimizer.patch_embed_factor=1.0"),
    *("schedule.freeze_last_layer=0", "schedule.momentum=[0.99, 1.0]"),
    *("batch_size=32", "compile=true", "data.workers=0", "log_every=50"),
]


class Mismatched(SelfDistillation):
    """The objective with targets of other images: those of the image before, in the batch."""

    def _targets(self, pair: Pair, inputs: Inputs, masks: Masks | None, temperature: float) -> list[Tensor]:
        views = torch.stack(inputs.global_crops.chunk(GLOBAL_CROPS)).roll(1, dims=1)
        return super()._targets(pair, inputs._replace(global_crops=views.flatten(0, 1)), masks, temperature)


class Exam:
    """What networks are asked, the same for all.

    Args:
        data: the file of images.
        settings: that crops are made by.
        side: of the images that networks see.
    """

    def __init__(self, data: Path, settings: TrainSettings, side: int = SIDE) -> None:
        self.preprocessing = evaluation_preprocessing(side, side)
        self.bank, self.queries = Labelled(str(data), stop=BANK_ROWS), Labelled(str(data), start=BANK_ROWS)
        some = Labelled(str(data), stop=BANK_ROWS, sample=CURVE_BANK)
        self.subset = gauges.load_subset(some, self.queries, self.preprocessing)
        self.crops = held_out_crops(self.queries, settings)

    def brief(self, backbone: VisionTransformer, head: nn.Module | None) -> dict[str, float]:
        """Numbers for the curve: `gauges.evaluate` with a part of the bank, and `retrieval`."""
        return gauges.evaluate(backbone, self.subset, head, PRECISION) | {"retrieval": self.retrieval(backbone)}

    def full(self, backbone: VisionTransformer) -> dict[str, float]:
        """`knn` with the whole bank, `retrieval`, `cls_std` and `distance`, those of `gauges`."""
        bank, queries = (
            features_of(backbone, rows, self.preprocessing, precision=PRECISION) for rows in (self.bank, self.queries)
        )
        cls = queries.cls[:, -1]
        return {
            "knn": evaluate_knn(bank, queries, [K])[K].top1,
            "retrieval": self.retrieval(backbone),
            "cls_std": gauges.class_token_std(cls),
            "distance": gauges.nearest_distance(cls),
        }

    def raw_pixels(self) -> float:
        """k-NN of the images' own 32 x 32 pixels, less their mean, with the whole bank."""
        own = evaluation_preprocessing(32, 32)
        bank, queries = (pixels_of(rows, own)[0] for rows in (self.bank, self.queries))
        return evaluate_knn(*centred_pixels(bank, queries), [K])[K].top1

    def retrieval(self, backbone: VisionTransformer) -> float:
        """Share of the images that are the nearest to their crops."""
        pixels = [Pixels(part, [0] * len(part)) for part in torch.split(self.subset.queries.images, 256)]
        images = F.normalize(extract(backbone, pixels, self.preprocessing, precision=PRECISION).cls[:, -1], dim=1)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            crops = torch.cat([backbone.class_tokens(part) for part in torch.split(self.crops, 256)])
        nearest = (F.normalize(crops.float(), dim=1) @ images.T).argmax(1)
        return float((nearest == torch.arange(len(nearest))).float().mean())


def held_out_crops(rows: Labelled, settings: TrainSettings) -> Tensor:
    """A global crop of each image, the second, as the training would have it; float32 [n, 3, G, G]."""
    maker = CropMaker(crop_settings(settings))
    views = [maker(row.data, (0, row.number)) for row in read(rows, [])]
    return augmented(collate(views, [], None)).global_crops[len(views) :]


class Watch:
    """An evaluation during training, with `cpu_s`, seconds of CPU that training took so far.

    They go on from what the run's last evaluation says, so a run that is killed and goes on counts right.
    """

    def __init__(self, run: Path, exam: Exam) -> None:
        self._run, self._exam, self._since = run, exam, time.process_time()

    def __call__(self, backbone: VisionTransformer, head: nn.Module | None) -> dict[str, float]:
        """The numbers of `Exam.brief` and `cpu_s`."""
        spent = time.process_time() - self._since
        before = [point["cpu_s"] for point in curve(self._run)]
        numbers = self._exam.brief(backbone, head) | {"cpu_s": sum(before[-1:]) + spent}
        self._since = time.process_time()
        return numbers


def curve(run: Path) -> list[dict[str, float]]:
    """The evaluations of a run."""
    lines = map(json.loads, (run / FILE).read_text().splitlines())
    return [line for line in lines if "cpu_s" in line]


def settings_of(given: argparse.Namespace, seed: int, steps: int, *changes: str) -> TrainSettings:
    """Settings of a run; `changes` as `--set` has them."""
    every = max(1, steps // POINTS)
    own = [f"seed={seed}", f"schedule.steps={steps}", f"schedule.warmup={steps // 20}"]
    own += [f"eval_every={every}", f"checkpoint_every={every}", f"data.sources={{cifar: {{images: {given.rows}}}}}"]
    return validate(TrainSettings, override({}, [*SETTINGS, *own, *changes, *given.set]), "settings")


def fit(settings: TrainSettings, run: Path, exam: Exam, mismatched: bool = False, init: str | None = None) -> None:
    """Train a network, or go on with what was done."""
    patch: AbstractContextManager[Any] = nullcontext()
    if mismatched:
        patch = mock.patch.object(trainer.build, "SelfDistillation", Mismatched)
    with patch:
        train(settings, run, resume=run.exists(), init=init, device="cpu", evaluate=Watch(run, exam))


def trained(
    settings: TrainSettings, run: Path, exam: Exam, mismatched: bool = False, init: str | None = None
) -> dict[str, float]:
    """`Exam.full` of a network that `fit` trains, and its `cpu_s`."""
    fit(settings, run, exam, mismatched, init)
    return exam.full(open_weights(str(run)).backbone) | {"cpu_s": curve(run)[-1]["cpu_s"]}


def untrained(settings: TrainSettings, exam: Exam) -> dict[str, float]:
    """`Exam.full` of the network that a run begins with."""
    return exam.full(make_pair(settings)[0].ema.backbone) | {"cpu_s": 0.0}


def learn(given: argparse.Namespace, exam: Exam) -> None:
    """Train once a seed, or the control, and print what came of it."""
    mismatched, steps, out = given.mode == "control", given.steps or STEPS[given.mode], Path(given.out)
    results = {f"untrained, seed {given.seeds[0]}": untrained(settings_of(given, given.seeds[0], steps), exam)}
    runs = {seed: out / f"{given.mode}-{steps}-seed{seed}" for seed in given.seeds}
    for seed, run in runs.items():
        settings = settings_of(given, seed, steps)
        results[f"{given.mode}, {steps:,} steps, seed {seed}"] = trained(settings, run, exam, mismatched)
    show("k-NN and retrieval", ["network", *MEASURED], [[name, *measured(found)] for name, found in results.items()])
    print(f"Raw pixels: k-NN {exam.raw_pixels():.1%}.\n")
    for seed, run in runs.items():
        show(f"Curve, seed {seed}", POINT, [point(mark, given) for mark in curve(run)])


def distill(given: argparse.Namespace, exam: Exam) -> None:
    """Train the smaller network alone, by the teacher, and alone for as long, once a seed."""
    steps, out = given.steps or STEPS["distill"], Path(given.out)
    small = untrained(settings_of(given, 0, steps, *SMALL), exam)
    teacher = exam.full(open_weights(given.teacher).backbone) | {"cpu_s": curve(Path(given.teacher))[-1]["cpu_s"]}
    rows: list[list[Any]] = []
    gains = []
    for seed in given.seeds:
        alone, by_teacher = (
            trained(settings_of(given, seed, steps, *SMALL, *changes), out / f"{name}-{steps}-seed{seed}", exam)
            for name, changes in (("alone", []), ("distilled", [f"teacher={{model: {given.teacher}}}"]))
        )
        longer = round(steps * by_teacher["cpu_s"] / alone["cpu_s"])
        as_long = trained(settings_of(given, seed, longer, *SMALL), out / f"alone-{longer}-seed{seed}", exam)
        rows += [
            [f"alone, {steps:,} steps, seed {seed}", *measured(alone)],
            [f"distilled, {steps:,} steps, seed {seed}", *measured(by_teacher)],
            [f"alone, {longer:,} steps, seed {seed}", *measured(as_long)],
        ]
        gains.append([seed, *(f"{100 * (by_teacher['knn'] - other['knn']):+.1f}" for other in (alone, as_long))])
    ends = [["teacher", *measured(teacher)], ["smaller, untrained", *measured(small)]]
    show("Distillation", ["network", *MEASURED], [*ends, *rows])
    show("Points of k-NN by distillation", ["seed", "at equal steps", "at equal CPU time"], gains)


def finish(given: argparse.Namespace, exam: Exam) -> None:
    """Go on with a trained network on larger crops, and print what it makes of both sizes before and after."""
    steps, seed = given.steps or STEPS["finish"], given.seeds[0]
    run, settings = Path(given.out) / f"finish-{steps}-seed{seed}", settings_of(given, seed, steps, *FINISH)
    larger = Exam(Path(given.data) / IMAGES, settings, FINISHED_SIDE)
    spent = trained(settings, run, larger, init=given.teacher)["cpu_s"]
    rows = [
        [f"{when}, seen at {side} pixels", *measured(at.full(open_weights(place).backbone) | {"cpu_s": cpu})]
        for when, place, cpu in (("before", given.teacher, 0.0), (f"after {steps:,} steps", str(run), spent))
        for side, at in ((SIDE, exam), (FINISHED_SIDE, larger))
    ]
    show("A finish on larger crops", ["network", *MEASURED], rows)


MEASURED = ["k-NN", "retrieval", "std of class tokens", "distance to the nearest", "CPU min"]
POINT = ["step", "images", "CPU min", f"k-NN, {CURVE_BANK:,} in the bank", "retrieval", "std", "nearest", "entropies"]


def measured(found: dict[str, float]) -> list[str]:
    """A row of MEASURED."""
    numbers = [f"{found['knn']:.1%}", f"{found['retrieval']:.1%}", f"{found['cls_std']:.4f}"]
    return [*numbers, f"{found['distance']:.3f}", f"{found['cpu_s'] / 60:.1f}"]


def point(mark: dict[str, float], given: argparse.Namespace) -> list[Any]:
    """A row of POINT."""
    step, batch = int(mark["step"]), settings_of(given, 0, 1).batch_size
    entropies = "prototype_entropy_of_mean", "prototype_mean_entropy"
    return [
        step,
        step * batch,
        f"{mark['cpu_s'] / 60:.1f}",
        f"{mark[f'knn_{K}']:.1%}",
        f"{mark['retrieval']:.1%}",
        f"{mark['cls_std']:.4f}",
        f"{mark['koleo_distance']:.3f}",
        " / ".join(f"{mark[name]:.2f}" for name in entropies),
    ]


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table."""
    print(f"#### {title}\n\n{markdown(Table(title, columns, rows))}\n", flush=True)


def write_rows(data: Path, out: Path) -> Path:
    """The rows to train on as a file of their own, written once."""
    place = out / "rows.parquet"
    if not place.exists():
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(data).slice(0, BANK_ROWS), place, row_group_size=500)
    return place


def main() -> None:
    """Train what is asked for, and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=list(STEPS))
    parser.add_argument("--data", required=True, help="folder with cifar10_train.parquet")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--teacher", help="a run to distil from, or to finish")
    parser.add_argument("--set", nargs="*", default=[], help="settings to change, such as optimizer.base_lr=2e-3")
    given = parser.parse_args()
    if given.mode in ("distill", "finish") and not given.teacher:
        parser.error(f"{given.mode} needs --teacher, a run of learn")
    torch.set_num_threads(1)
    data = Path(given.data) / IMAGES
    given.rows = write_rows(data, Path(given.out))
    exam = Exam(data, settings_of(given, 0, 1))
    print(f"{machine()}, torch {torch.__version__}, 1 thread\n", flush=True)
    {"distill": distill, "finish": finish}.get(given.mode, learn)(given, exam)


if __name__ == "__main__":
    main()

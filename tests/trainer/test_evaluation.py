"""Networks at a place, evaluated: what `lvd eval` does, against the parts that it is made of."""

from pathlib import Path

import pytest

from curation.errors import ConfigError
from embedders.checkpoints import save_vit
from embedders.dinov2 import standard_preprocessing
from embedders.vit import ViTConfig
from tests.builders import photo, truncated
from tests.trainer.labelled_for_tests import network, write_labelled
from trainer.evaluation import Subject, default_size, knn, linear, logistic, open_subject, rows_of
from trainer.features import RandomView, features_of
from trainer.knn import evaluate_knn
from trainer.labelled import Labelled
from trainer.linear import evaluate_linear
from trainer.logistic import evaluate_logistic


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights, and 24 labelled images of which one is broken."""
    place = tmp_path_factory.mktemp("evaluation")
    save_vit(network(), place / "net.safetensors", standard_preprocessing(16))
    images = [photo(number) for number in range(24)]
    images[3] = truncated(3)
    write_labelled(place / "all.parquet", images, [number % 2 for number in range(24)])
    return place


@pytest.fixture
def subject(place: Path) -> Subject:
    return open_subject(str(place / "net.safetensors"), device="cpu", precision="float32")


def parts(place: Path) -> tuple[Labelled, Labelled]:
    rows = Labelled(str(place / "all.parquet"))
    return rows_of(rows, ":16"), rows_of(rows, "16:")


def test_evaluations_are_those_of_the_features(place: Path, subject: Subject) -> None:
    train, test = parts(place)
    assert subject.size == 16 and subject.preprocessing == standard_preprocessing(16)
    plain = [features_of(subject.network, rows, subject.preprocessing) for rows in (train, test)]
    found, skipped = knn(subject, train, test, (1, 5))
    assert found == evaluate_knn(*plain, (1, 5))
    assert [skip.reason for skip in skipped] == ["truncated"] and skipped[0].place.endswith("all.parquet row 3")
    assert logistic(subject, train, test, 1)[0] == evaluate_logistic(*plain, 1)
    whole = [
        features_of(subject.network, rows, subject.preprocessing, blocks=4, patches=True) for rows in (train, test)
    ]
    assert linear(subject, train, test, steps=5, batch_size=4)[0] == evaluate_linear(*whole, steps=5, batch_size=4)


def test_the_linear_probe_may_see_other_views_in_every_pass(place: Path, subject: Subject) -> None:
    train, test = parts(place)
    options = {"blocks": 4, "patches": True}
    whole = [features_of(subject.network, rows, subject.preprocessing, **options) for rows in (train, test)]  # type: ignore[arg-type]

    def views(epoch: int) -> object:
        view = RandomView(16, 3, epoch)
        return features_of(subject.network, train, subject.preprocessing, **options, view=view)  # type: ignore[arg-type]

    found = linear(subject, train, test, steps=7, batch_size=4, random_views=True, seed=3)[0]
    assert found == evaluate_linear(*whole, steps=7, batch_size=4, seed=3, views=views)  # type: ignore[arg-type]
    assert found.all_heads.keys() == linear(subject, train, test, steps=7, batch_size=4, seed=3)[0].all_heads.keys()


@pytest.mark.parametrize(("patch", "own", "size"), [(14, 518, 224), (16, 64, 64), (4, 16, 16), (14, 30, 28)])
def test_a_network_is_evaluated_at_its_own_size_but_not_above_the_published(patch: int, own: int, size: int) -> None:
    assert default_size(network(ViTConfig(dim=8, depth=1, heads=1, patch_size=patch, image_size=own))) == size


@pytest.mark.parametrize(
    ("rows", "start", "stop"), [(":7", 0, 7), ("7:", 7, None), ("2:9", 2, 9), (":", 0, None), (None, 0, None)]
)
def test_rows(rows: str | None, start: int, stop: int | None) -> None:
    found = rows_of(Labelled("x"), rows)
    assert (found.start, found.stop) == (start, stop)


@pytest.mark.parametrize("rows", ["7", "a:b", "-3:", "1:2:3"])
def test_rows_that_are_none(rows: str) -> None:
    with pytest.raises(ConfigError, match="give START:STOP"):
        rows_of(Labelled("x"), rows)


def test_what_cannot_be_evaluated_is_one_line(place: Path) -> None:
    net = str(place / "net.safetensors")
    for arguments, says in [
        ((str(place / "no.safetensors"),), "no.safetensors"),
        ((net, 18), "set crop to 16|set crop to 20"),
        ((net, None, "gpu"), "device gpu: take auto, cpu or cuda"),
        ((net, None, "cpu", "half"), "unknown precision 'half'"),
    ]:
        with pytest.raises(ConfigError, match=says):
            open_subject(*arguments)  # type: ignore[arg-type]

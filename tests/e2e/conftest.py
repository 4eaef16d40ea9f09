"""Fixtures of the end-to-end tests: the world that recipes refer to, and a run of it to compare with."""

import csv
import shutil
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any

import pytest
from world import RAY_FOLDER, ImageHandler, World, digests, draw, lvd, web_images, write_folder, write_images


@pytest.fixture(scope="session", autouse=True)
def _ray_folder() -> Iterator[None]:
    yield
    shutil.rmtree(RAY_FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The inputs of RECIPE."""
    place = tmp_path_factory.mktemp("world")
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), ImageHandler)
    images = web_images(160)
    server.images, server.asked, server.daemon_threads = [data for data, _ in images], [], True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with open(place / "urls.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["url", "label"])
        base = f"http://127.0.0.1:{server.server_port}"
        rows.writerows((f"{base}/{number}.jpg", label) for number, (_, label) in enumerate(images))
    write_folder(place / "extra", [(draw(n % 6, 1000 + n), n % 6) for n in range(40)])
    write_images(place / "birds.parquet", [(draw(5, 2000 + n), 5) for n in range(24)])
    write_images(place / "bench.parquet", [images[n] for n in range(0, 32, 2)])
    made = World(place, server)
    made.write_recipe("recipe.yaml")
    yield made
    server.shutdown()


@pytest.fixture(scope="session")
def reference(world: World) -> dict[str, str]:
    """Digests of an uninterrupted run in one process: what every other way of running must give."""
    lvd("run", "recipe.yaml", "--out", "reference", "--local", cwd=world.place)
    return digests(str(world.place / "reference"))

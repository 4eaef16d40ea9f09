"""Download against img2dataset itself: the same URLs, the same machine, in turn.

    python -m benchmarks.download --data DIR [--urls 3000] [--rounds 3]

DIR holds `photos350.parquet` (column image). Its photographs are served under as many URLs as asked for, from a process
on loopback. Ours is `lvd download` (Ray, 2 workers, original bytes, guard, hashes, header checks, commits); img2dataset
is its `download()` with 2 processes and as many threads, once told to keep the original bytes and once re-encoding to
256 px as it does by default. Whole calls are timed, start-up included, since users wait for it.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import machine
from pipelines.download import DownloadUnit
from pipelines.executor import RayExecutor
from pipelines.loopback import Reply, serve_blobs, write_blobs
from pipelines.progress import quiet
from pipelines.recipe import DownloadSettings, SourceSettings
from pipelines.unit import run_unit

WORKERS, THREADS, ROWS = 2, 32, 500


def ours(urls: str, out: str) -> None:
    """`lvd download` of a list of URLs."""
    source = SourceSettings(role="pool", urls=urls)
    settings = DownloadSettings(allow_private=True, retries=0, threads=THREADS)
    executor = RayExecutor(WORKERS)
    run_unit(DownloadUnit("web", source, settings, ROWS, f"{out}/urls", f"{out}/images"), executor, quiet())
    executor.close()


def theirs(urls: str, out: str, **options: Any) -> None:
    """img2dataset's own call."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset import download

    download(
        url_list=urls,
        input_format="parquet",
        output_folder=out,
        output_format="parquet",
        processes_count=WORKERS,
        thread_count=THREADS,
        number_sample_per_shard=ROWS,
        enable_wandb=False,
        **options,
    )


def theirs_original(urls: str, out: str) -> None:
    theirs(urls, out, disable_all_reencoding=True)


def theirs_default(urls: str, out: str) -> None:
    theirs(urls, out)


CONTENDERS: dict[str, Callable[[str, str], None]] = {
    "lvd download, original bytes": ours,
    "img2dataset, original bytes": theirs_original,
    "img2dataset, re-encoded to 256 px": theirs_default,
}


def seconds_of(work: Callable[[str, str], None], urls: str) -> float:
    """Wall time of one call in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(urls, f"{out}/out"))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{work.__name__} failed")
        return time.monotonic() - began


def main() -> None:
    """Run the rounds and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--urls", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    photos = pq.read_table(Path(options.data) / "photos350.parquet")["image"].to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        write_blobs(f"{folder}/site", ((f"/{i}.jpg", Reply(body=photos[i % len(photos)])) for i in range(options.urls)))
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        with serve_blobs(f"{folder}/site") as base:
            urls = f"{folder}/urls.parquet"
            pq.write_table(pa.table({"url": [f"{base}/{i}.jpg" for i in range(options.urls)]}), urls)
            for _ in range(options.rounds):
                for name, work in CONTENDERS.items():
                    times[name].append(seconds_of(work, urls))
    first = statistics.median(times["lvd download, original bytes"])
    size = sum(map(len, photos)) / len(photos) / 1000
    print(f"{machine()}; {options.urls:,} URLs of {size:.0f} kB, {options.rounds} rounds in turn, medians\n")
    print("| | seconds | images/s | lvd's rate over this |\n|---|---|---|---|")
    for name, found in times.items():
        median = statistics.median(found)
        print(f"| {name} | {median:.1f} | {options.urls / median:.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()

"""Near-duplicate search on synthetic instruction rows: ours against datatrove, text-dedup and semhash.

Every way gets the same rows, word 3-grams and the threshold 0.8, and runs in a process of its own; clocks start after
imports. Ours has its rows in memory; datatrove and text-dedup read them from disk and write on the clock, as one would
run them, and confirm no pair. 15 % of the rows are copies, exact or with a few words changed: a copy counts as true
if its exact similarity to its original reaches the threshold. Recall: true copies of which one of the two rows leaves;
precision: rows that leave which belong to a true copy. Peers need no place in this project's environment:

    python -m benchmarks.data [--rows 100000] [--sizes 10000 1000000] [--peer-python PEERS/bin/python ...]
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THRESHOLD, SHINGLE_WORDS, COPIES, SEED = 0.8, 3, 0.15, 17
VOCABULARY, ROW_WORDS = 50_000, (55, 115)
BANDS, BAND_ROWS = 18, 7  # what ours chooses at 0.8: 2 % missed at the threshold
PART_ROWS = 20_000
LIMIT_SECONDS = 300


class Copy(NamedTuple):
    """Two rows, the second made of the first, and their exact Jaccard similarity."""

    original: int
    copy: int
    similarity: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000], help="further sizes, for ours alone")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--peer-python", nargs="*", default=[], help="interpreters tried in turn for each peer")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        run_way(arguments.way, arguments.folder, arguments.processes)
        return
    print(f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> None:
    """Ours over all sizes, in one process and in several; each peer at --rows, with the first interpreter that runs it."""
    ours = 0.0
    for count in sorted({arguments.rows, *arguments.sizes}):
        copies = write_rows(folder / str(count), count)
        for processes in sorted({1, arguments.processes}):
            result = measure("ours", [sys.executable], folder / str(count), processes)
            report(f"ours, {processes} processes", result, count, copies, ours=None)
            if count == arguments.rows and processes == arguments.processes and "seconds" in result:
                ours = count / result["seconds"]
    copies = write_rows(folder / str(arguments.rows), arguments.rows)
    for way in [name for name in WAYS if name != "ours"] if arguments.peer_python else []:
        result = measure(way, arguments.peer_python, folder / str(arguments.rows), arguments.processes)
        report(way, result, arguments.rows, copies, ours)


def measure(way: str, interpreters: list[str], folder: Path, processes: int) -> dict[str, Any]:
    """Seconds, peak memory and removed rows of a way, or the reason why no interpreter runs it."""
    reasons = []
    for python in interpreters:
        command = [python, __file__, "--way", way, "--folder", str(folder), "--processes", str(processes)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
        (folder / "result.json").unlink(missing_ok=True)
        try:
            done = subprocess.run(
                command, check=False, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
            )
        except subprocess.TimeoutExpired:
            reasons.append(f"no result in {LIMIT_SECONDS} s")
            continue
        if (folder / "result.json").exists():
            found: dict[str, Any] = json.loads((folder / "result.json").read_text())
            return found
        reasons.append((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:150])
    return {"reason": "; ".join(reasons)}


def report(title: str, result: dict[str, Any], count: int, copies: list[Copy], ours: float | None) -> None:
    if "reason" in result:
        print(f"{title}: does not run: {result['reason']}", flush=True)
        return
    rate = count / result["seconds"]
    recall, precision = quality(set(result["removed"]), copies)
    ratio = f", ours is {ours / rate:.1f} times as fast" if ours else ""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.get("parts", {}).items())
    print(
        f"{title}: {count} rows in {result['seconds']:.1f} s{f' ({parts})' if parts else ''}, {rate:.0f} rows/s{ratio}; "
        f"recall {recall:.4f}, precision {precision:.4f}; peak {result['peak_mib']:.0f} MiB",
        flush=True,
    )


def quality(removed: set[int], copies: list[Copy]) -> tuple[float, float]:
    """Recall and precision of the removed rows against the planted copies."""
    true = [pair for pair in copies if pair.similarity >= THRESHOLD]
    found = sum(pair.original in removed or pair.copy in removed for pair in true)
    right = removed & {row for pair in true for row in (pair.original, pair.copy)}
    return found / max(1, len(true)), len(right) / max(1, len(removed))


def write_rows(folder: Path, count: int) -> list[Copy]:
    """Rows as `rows/rows.jsonl`, about 500 bytes each, words drawn by Zipf's law; answers with the planted copies."""
    draw = np.random.default_rng(SEED)
    lengths, letters = draw.integers(2, 10, VOCABULARY), np.array(list("etaoinshrdlucmfwypvbgk"))
    vocabulary = np.array(["".join(draw.choice(letters, length)) for length in lengths])
    weights = 1 / np.arange(1, VOCABULARY + 1)
    bounds = np.cumsum(weights / weights.sum())

    def sample(size: int) -> list[str]:
        found: list[str] = vocabulary[np.searchsorted(bounds, draw.random(size)).clip(max=VOCABULARY - 1)].tolist()
        return found

    originals = count - int(count * COPIES)
    rows = [sample(size) for size in draw.integers(*ROW_WORDS, originals).tolist()]
    places = draw.permutation(count).tolist()
    copies = []
    for copied, original in enumerate(draw.permutation(originals)[: count - originals].tolist(), start=originals):
        copy = rows[original].copy()
        for place in draw.integers(len(copy), size=max(0, draw.integers(-2, 5))).tolist():
            copy[place] = sample(1)[0]
        rows.append(copy)
        copies.append(Copy(places[original], places[copied], similarity(rows[original], copy)))
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    with (folder / "rows" / "rows.jsonl").open("w") as out:
        for place, index in enumerate(np.argsort(places).tolist()):
            out.write(json.dumps({"id": str(place), "text": " ".join(rows[index])}) + "\n")
    return copies


def similarity(a: list[str], b: list[str]) -> float:
    x, y = (set(zip(words, words[1:], words[2:], strict=False)) for words in (a, b))
    return len(x & y) / len(x | y)


def run_way(way: str, folder: Path, processes: int) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "rows" / "rows.jsonl").read_text().splitlines()]
    result = WAYS[way](texts, folder, processes)
    scopes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    result["peak_mib"] = max(resource.getrusage(scope).ru_maxrss for scope in scopes) / 1024
    (folder / "result.json").write_text(json.dumps(result))


def sign(texts: list[str]) -> Any:
    from tasks.data.curation.core.minhash import signatures
    from tasks.data.curation.core.shingles import shingle_hashes

    flat, offsets = shingle_hashes(texts, SHINGLE_WORDS)
    return flat, np.diff(offsets), signatures(flat, offsets, THRESHOLD)


def run_ours(texts: list[str], _: Path, processes: int) -> dict[str, Any]:
    """Shingles and band keys part by part, then pairs and components in this process."""
    from tasks.data.curation.core.minhash import components, near_pairs
    from tasks.data.curation.core.shingles import to_offsets

    sign(texts[:10])
    started = time.perf_counter()
    parts = [texts[i : i + PART_ROWS] for i in range(0, len(texts), PART_ROWS)]
    if processes > 1:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            signed = pool.map(sign, parts, chunksize=1)
    else:
        signed = [sign(part) for part in parts]
    flat, lengths, bands = (np.concatenate(part) for part in zip(*signed, strict=True))
    offsets = to_offsets(lengths)
    signed_at = time.perf_counter()

    def fetch(rows: Any) -> Any:
        edges = to_offsets(lengths[rows])
        return flat[np.arange(edges[-1]) + np.repeat(offsets[rows] - edges[:-1], lengths[rows])], edges

    labels = components(len(texts), near_pairs(bands, fetch, THRESHOLD))
    ended = time.perf_counter()
    removed = np.flatnonzero(labels != np.arange(len(texts))).tolist()
    spent = {"signing": signed_at - started, "pairs": ended - signed_at}
    return {"seconds": ended - started, "parts": spent, "removed": removed}


def run_datatrove(texts: list[str], folder: Path, processes: int) -> dict[str, Any]:
    """Its MinHash pipeline (https://github.com/huggingface/datatrove) with our banding, to the list of removed rows."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig

    shards, work = folder / "shards", Path(tempfile.mkdtemp(dir=folder))
    shards.mkdir(exist_ok=True)
    bounds = np.linspace(0, len(texts), processes + 1).astype(int).tolist()
    for shard, (start, end) in enumerate(pairwise(bounds)):
        lines = (json.dumps({"id": str(i), "text": texts[i]}) + "\n" for i in range(start, end))
        (shards / f"{shard:03d}.jsonl").write_text("".join(lines))
    config = MinhashConfig(
        n_grams=SHINGLE_WORDS, num_buckets=BANDS, hashes_per_bucket=BAND_ROWS, hash_config=HashConfig(hash_fc="xxhash")
    )
    signatures, buckets, removed = str(work / "signatures"), str(work / "buckets"), work / "removed"
    steps: list[tuple[list[Any], int]] = [
        ([JsonlReader(str(shards)), MinhashDedupSignature(signatures, config)], processes),
        ([MinhashDedupBuckets(signatures, buckets, config=config)], BANDS),
        ([MinhashDedupCluster(buckets, str(removed), config=config)], 1),
    ]
    started = time.perf_counter()
    for number, (steps_of, tasks) in enumerate(steps):
        LocalPipelineExecutor(steps_of, tasks=tasks, workers=processes, logging_dir=str(work / f"log{number}")).run()
    seconds = time.perf_counter() - started
    found = []
    for path in sorted(removed.glob("*.remove")):
        found += [bounds[int(path.stem)] + row for (row,) in struct.iter_unpack("<I", path.read_bytes())]
    return {"seconds": seconds, "removed": found}


def run_text_dedup(texts: list[str], folder: Path, processes: int) -> dict[str, Any]:
    """Its MinHash (https://github.com/ChenghaoMou/text-dedup) with our banding, as its command line runs it."""
    import text_dedup.minhash
    from datasets import load_from_disk

    out = tempfile.mkdtemp(dir=folder)
    settings = {"path": "json", "data_dir": folder / "rows", "split": "train", "cache_dir": f"{out}/cache"}
    settings |= {
        "output": f"{out}/kept",
        "column": "text",
        "num_proc": processes,
        "ngram": SHINGLE_WORDS,
        "min_length": 1,
    }
    settings |= {"num_perm": BANDS * BAND_ROWS, "b": BANDS, "r": BAND_ROWS, "threshold": THRESHOLD, "hash_func": "xxh3"}
    command = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    started = time.perf_counter()
    text_dedup.minhash.main(command, standalone_mode=False)
    seconds = time.perf_counter() - started
    kept = {int(name) for name in load_from_disk(f"{out}/kept")["id"]}
    return {"seconds": seconds, "removed": [row for row in range(len(texts)) if row not in kept]}


def run_semhash(texts: list[str], _: Path, __: int) -> dict[str, Any]:
    """Embeddings instead of shingles (https://github.com/MinishLab/semhash): another notion of near, same rows."""
    from semhash import SemHash

    started = time.perf_counter()
    records = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    result = SemHash.from_records(records=records, columns=["text"]).self_deduplicate()
    seconds = time.perf_counter() - started
    kept = {int(record["id"]) for record in result.selected}
    return {"seconds": seconds, "removed": [row for row in range(len(texts)) if row not in kept]}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


Way = Callable[[list[str], Path, int], dict[str, Any]]
WAYS: dict[str, Way] = {
    "ours": run_ours,
    "datatrove": run_datatrove,
    "text-dedup": run_text_dedup,
    "semhash": run_semhash,
}

if __name__ == "__main__":
    main()

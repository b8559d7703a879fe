"""First token and seconds per token of a bundle under memory limits; each run is a new process with a cold start.

    sudo python benchmarks/memory_limit.py --bundle DIR [--limits 2GB,3GB,4GB,5GB]

Linux only. A control group limits the memory, mapped pages of files included; swap has to be off. The bundle's files
are dropped from the page cache before each run, because pages that another process read do not count. `faults`: page
faults that read from the disk, until the image is encoded, until the first token, and for each further token. `read`:
what was read from the disk at the same times, read-ahead included. `used`: the most that the kernel counted for the
group, which the page cache fills up to the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from molmo_edge.system.boards import parse_bytes

CHILD = """
import json, resource, sys, time
began = time.perf_counter()
from molmo_edge import LlamaOptions, Molmo
given = json.loads(sys.argv[1])
def state():
    lines = open("/proc/self/status").read().splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) / 1e6 for line in lines if line.startswith(("Rss", "VmHWM"))}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return kept | {"faults": usage.ru_majflt, "read": usage.ru_inblock * 512 / 1e9}
options = None if given["llama"] is None else LlamaOptions.parse(given["llama"])
molmo = Molmo(given["bundle"], threads=given["threads"], engine_options=options, **given["options"])
scene = molmo.engine.scene(given["photo"])
encoded, after_image = time.perf_counter(), state()
stream = molmo.stream(scene, "Describe this image.", max_new_tokens=given["tokens"])
next(stream)
first, after_first = time.perf_counter(), state()
for _ in stream:
    pass
last, end = time.perf_counter(), state()
count = len(stream.answer.token_ids) - 1
print(json.dumps({
    "image": encoded - began, "first": first - began, "token": (last - first) / max(1, count), "tokens": count,
    **{name: [after_image[name], after_first[name] - after_image[name], (end[name] - after_first[name]) / max(1, count)]
       for name in ("faults", "read")},
    "anonymous": end["RssAnon"], "peak": end["VmHWM"], "ids": stream.answer.token_ids[-8:],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--photo", type=Path, default=Path(__file__).parent.parent / "examples" / "coffee.jpg")
    parser.add_argument("--limits", default="2GB,3GB,4GB,5GB", help="memory limits; none: without a limit")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama", help="options of llama.cpp, as for molmo-edge ask")
    parser.add_argument("--options", type=json.loads, default={}, help="keywords of Molmo() as JSON")
    parser.add_argument("--program", type=Path, help="a program to run before the question, for experiments")
    args = parser.parse_args()
    if len(Path("/proc/swaps").read_text(encoding="ascii").splitlines()) > 1:
        raise SystemExit("switch swap off first: swapoff -a")
    given = {name: getattr(args, name) for name in ("tokens", "threads", "llama", "options")}
    given |= {"bundle": str(args.bundle.resolve()), "photo": str(args.photo.resolve())}
    program = (args.program.read_text(encoding="utf-8") if args.program else "") + CHILD
    for limit in args.limits.split(","):
        with _group(None if limit == "none" else parse_bytes(limit)) as group:
            _drop(args.bundle)
            enter = f"echo $$ > {group}/cgroup.procs && exec " + '"$@"'
            command = ["sh", "-c", enter, "sh", sys.executable, "-c", program, json.dumps(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            _print(limit, done, group)


def _print(limit: str, done: subprocess.CompletedProcess[str], group: Path) -> None:
    if done.returncode:
        reason = "killed: out of memory" if done.returncode < 0 else done.stderr.strip().splitlines()[-1]
        print(f"{limit}: {reason}", flush=True)
        return
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    peaks = (group / name for name in ("memory.max_usage_in_bytes", "memory.peak"))
    used = int(next(file for file in peaks if file.exists()).read_text(encoding="ascii"))
    faults, read = found["faults"], found["read"]
    print(
        f"{limit}: image {found['image']:.1f} s, first token {found['first']:.1f} s, "
        f"token {1e3 * found['token']:.0f} ms; "
        f"peak {found['peak']:.2f} GB ({found['anonymous']:.2f} GB not of files at the end), used {used / 1e9:.2f} GB; "
        f"faults {faults[0]} + {faults[1]}, {faults[2]:.1f} per token; read {read[0]:.1f} + {read[1]:.1f} GB, "
        f"{read[2]:.2f} GB per token",
        flush=True,
    )
    print(json.dumps({"limit": limit} | found), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _group(limit: int | None) -> Iterator[Path]:
    """A control group below that of this process (version 1) or below the root (version 2)."""
    root = Path("/sys/fs/cgroup/memory")
    if root.is_dir():
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
        own = next(line.split(":", 2)[2] for line in lines if "memory" in line.split(":")[1].split(","))
        parent, name = root / own.strip("/"), "memory.limit_in_bytes"
    else:
        parent, name = Path("/sys/fs/cgroup"), "memory.max"
    group = parent / f"molmo-edge-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            (group / name).write_text(str(limit), encoding="ascii")
        yield group
    finally:
        group.rmdir()


def _drop(directory: Path) -> None:
    """Remove the files from the page cache."""
    for file in directory.iterdir():
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


if __name__ == "__main__":
    main()

"""Runs a command inside a memory cgroup (version 1) of its own, and says what it used.

python cgroup.py [--limit-bytes N] [--timeout S] [--drop-caches] [--evict FILE ...] -- command...

Prints the command's own output, then one JSON object as the last line: limit, peak, failcnt, OOM kills, exit status, and
under "result" the command's own last JSON line. Exits with the command's status, or 77 where no cgroup can be made.

The peak counts page cache as well, so a command that maps files larger than the limit always reaches it; look at
peak_anonymous_bytes for what cannot be reclaimed. Page cache is charged to whichever group touched it first: a file that is
cached already costs the command nothing, so evict it (or drop all caches) before a run under a limit. Recent kernels leave
failcnt at 0 (seen on 6.18); refaulted_pages, file pages dropped under the limit and read again, tells of the pressure there.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup/memory")
JOIN = 'echo $$ > "$0" && exec "$@"'
SKIPPED = 77


class CgroupUnavailable(RuntimeError):
    """No memory cgroup (version 1) can be made here; the message says why."""


def unavailable_reason(root: Path = ROOT) -> str | None:
    """Why no memory cgroup can be made here, or None where one can."""
    if not (root / "memory.limit_in_bytes").exists():
        return f"no version 1 memory cgroup at {root}"
    if not os.access(root, os.W_OK):
        return f"{root} is not writable by this user"
    return None


def drop_page_cache() -> str | None:
    """Writes dirty pages back and drops the whole machine's clean page cache; returns why not, or None if done."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1\n")
    except OSError as error:
        return f"page cache not dropped: {error}"
    return None


def evict_files(paths: list[Path]) -> None:
    """Drops the page cache of these files (folders: of every file in them) alone; pages mapped by others stay."""
    for path in paths:
        for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _number(file: Path, key: str | None = None) -> int:
    """The number in a control file, or the one behind key in a file of "key number" lines (0 if it has none)."""
    text = file.read_text()
    return int(text) if key is None else int(dict(line.split() for line in text.splitlines()).get(key, 0))


def _set_limit(group: Path, limit_bytes: int) -> None:
    (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    swap_limit = group / "memory.memsw.limit_in_bytes"
    if swap_limit.exists():
        swap_limit.write_text(str(limit_bytes))


def _failures(group: Path) -> int:
    """How often the limit was met; with both limits equal, the kernel counts it on the memory-plus-swap side."""
    files = [group / "memory.failcnt", group / "memory.memsw.failcnt"]
    return sum(_number(file) for file in files if file.exists())


def _kill_members(group: Path) -> None:
    """Ends every process in the group, however many it started."""
    for _ in range(100):
        members = (group / "cgroup.procs").read_text().split()
        if not members:
            return
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(member), signal.SIGKILL)
        time.sleep(0.05)


def _remove(group: Path) -> None:
    _kill_members(group)
    with contextlib.suppress(OSError):
        (group / "memory.force_empty").write_text("0")
    for attempt in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            if attempt == 99:
                raise
            time.sleep(0.05)


@contextlib.contextmanager
def memory_cgroup(limit_bytes: int | None, root: Path = ROOT) -> Iterator[Path]:
    """A fresh memory cgroup with that limit on memory and on memory plus swap, removed at the end with all that runs in it."""
    if reason := unavailable_reason(root):
        raise CgroupUnavailable(reason)
    group = root / f"tightfit-bench-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        raise CgroupUnavailable(f"cannot make a group in {root}: {error}") from error
    try:
        if limit_bytes is not None:
            _set_limit(group, limit_bytes)
        yield group
    finally:
        _remove(group)


def _watch_anonymous(group: Path, stop: threading.Event, peak: list[int]) -> None:
    while not stop.wait(0.05):
        peak[0] = max(peak[0], _number(group / "memory.stat", "total_rss"))


def last_json(text: str) -> dict | None:
    """The JSON object on the last line that is not blank, or None."""
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _wait(process: subprocess.Popen, group: Path, timeout: float | None) -> bool:
    """Waits for the process, ending the whole group when the time is over; says whether it was."""
    try:
        process.wait(timeout)
        return False
    except subprocess.TimeoutExpired:
        _kill_members(group)
        process.wait()
        return True


def run_limited(command: list[str], limit_bytes: int | None, timeout: float | None = None) -> dict:
    """Runs the command in a memory cgroup; raises CgroupUnavailable where none can be made.

    Of stdout and stderr, which go through files, the last 20,000 characters come back.
    """
    with memory_cgroup(limit_bytes) as group, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stop, peak = threading.Event(), [0]
        watcher = threading.Thread(target=_watch_anonymous, args=(group, stop, peak))
        start = time.monotonic()
        process = subprocess.Popen(["/bin/sh", "-c", JOIN, str(group / "cgroup.procs"), *command], stdout=out, stderr=err)
        watcher.start()
        try:
            timed_out = _wait(process, group, timeout)
        finally:
            stop.set()
            watcher.join()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return {
            "command": command,
            "returncode": process.returncode,
            "timed_out": timed_out,
            "wall_seconds": time.monotonic() - start,
            "limit_bytes": limit_bytes,
            "peak_bytes": _number(group / "memory.max_usage_in_bytes"),
            "peak_anonymous_bytes": peak[0],
            "failcnt": _failures(group),
            "refaulted_pages": _number(group / "memory.stat", "total_workingset_refault_file"),
            "oom_kills": _number(group / "memory.oom_control", "oom_kill"),
            "result": last_json(texts[0]),
            "stdout": texts[0][-20000:],
            "stderr": texts[1][-20000:],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-bytes", type=int)
    parser.add_argument("--timeout", type=float)
    parser.add_argument("--drop-caches", action="store_true", help="drop the whole machine's page cache first")
    parser.add_argument("--evict", type=Path, nargs="+", default=[], help="files or folders to drop from the page cache first")
    if "--" not in sys.argv:
        parser.error("give the command behind --")
    split = sys.argv.index("--")
    args, command = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    evict_files(args.evict)
    if args.drop_caches and (reason := drop_page_cache()):
        print(reason, file=sys.stderr)
    try:
        report = run_limited(command, args.limit_bytes, args.timeout)
    except CgroupUnavailable as error:
        print(json.dumps({"skipped": str(error)}))
        return SKIPPED
    print(report.pop("stdout"), end="")
    print(report.pop("stderr"), end="", file=sys.stderr)
    print(json.dumps(report))
    code = report["returncode"]
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())

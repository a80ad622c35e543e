"""Runs the test modules side by side, one more than there are processors: each of them also waits, for disks and daemons.

    python3 tests/run.py [--python PYTHON] [MODULE.py …] [pytest's options]

Each module is a pytest of its own, the longest first.  What fails is shown whole, the others in a line.  The exit status
is 1 when one of them failed.  Scratch repositories are made where TMPDIR says, or else in memory, where there is room.
"""

import argparse
import atexit
import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# These begin, so that none of them is left at the end.
LONGEST = ("stream_sockets", "init", "daemon", "contract_cli", "removal", "work", "guard", "worktree", "claims", "durability",
           "client", "commands")
MEMORY, ROOM = "/dev/shm", 2 << 30      # some hundred times what a module leaves, in bytes


def scratch():
    """A new directory: to make, sync and remove ten thousand files, a disk with other users takes minutes."""
    try:
        disk = os.statvfs(MEMORY)
        roomy = "TMPDIR" not in os.environ and disk.f_bavail * disk.f_frsize >= ROOM
    except OSError:
        roomy = False
    return tempfile.mkdtemp(prefix="thrum-tests-", dir=MEMORY if roomy else None)


def run(python, module, options, folder):
    """(module, its status, what it said, how long it took in seconds)."""
    begin, own = time.monotonic(), os.path.join(folder, module[:-3])
    done = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={own}", "tests/" + module, *options],
                          cwd=os.path.dirname(HERE), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    shutil.rmtree(own, ignore_errors=True)
    return module, done.returncode, done.stdout, time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to test with")
    known, rest = parser.parse_known_args()
    chosen = [os.path.basename(word) for word in rest if word.endswith(".py")]
    options = [word for word in rest if not word.endswith(".py")]
    modules = sorted((name for name in os.listdir(HERE) if name.startswith("test_") and name.endswith(".py")
                      and (not chosen or name in chosen)),
                     key=lambda name: (LONGEST.index(name[5:-3]) if name[5:-3] in LONGEST else len(LONGEST), name))
    begin, failed, folder = time.monotonic(), [], scratch()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with concurrent.futures.ThreadPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, known.python, name, options, folder) for name in modules]):
            module, status, said, seconds = done.result()
            nothing = status == 5               # all of it was deselected
            print(f"{seconds:6.1f} s  {module}  {'nothing to do' if nothing else said.strip().splitlines()[-1]}", flush=True)
            if status and not nothing:
                failed.append(module)
                print(said, flush=True)
    print(f"{len(modules)} modules in {time.monotonic() - begin:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ", all passed"))
    return bool(failed) or not modules


if __name__ == "__main__":
    sys.exit(main())

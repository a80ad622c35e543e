"""Runs the test modules in as many processes as there are processors: most of the time one test alone waits for a daemon.

    python3 tests/run.py [--python PYTHON] [MODULE.py …] [pytest's options]

Each module is a pytest of its own, the longest first.  What fails is shown whole, the others in a line.  The exit status
is 1 when one of them failed.
"""

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
# These begin, so that none of them is left at the end.
LONGEST = ("init", "daemon", "contract_cli", "removal", "work", "guard", "worktree", "claims", "durability", "client", "commands")


def run(python, module, options):
    """(module, its status, what it said, how long it took in seconds)."""
    begin = time.monotonic()
    done = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", module, *options], cwd=os.path.dirname(HERE),
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
    begin, failed = time.monotonic(), []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, known.python, "tests/" + name, options) for name in modules]):
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

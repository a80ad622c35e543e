"""An echo server for suites that test WebSocket servers (RFC 6455): the daemon's own, in a scratch repository.

    python3 tests/echo.py [PORT]

Prints its address, and runs until its stdin ends or it is interrupted.
"""

import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main():
    port = sys.argv[1] if len(sys.argv) > 1 else "auto"
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("THRUM_", "GIT_"))}
    environ.update(THRUM_WS_PORT=port, THRUM_WS_ECHO="1")
    with tempfile.TemporaryDirectory() as scratch:
        thrum = [sys.executable, os.path.join(ROOT, "thrum.py"), "--repo", scratch]
        subprocess.run(["git", "init", "-q", scratch], check=True)
        subprocess.run([*thrum, "init"], env=environ, check=True, stdout=subprocess.DEVNULL)
        try:
            with open(os.path.join(scratch, ".thrum/var/ws.port")) as file:
                print(f"ws://127.0.0.1:{int(file.read())}/ws/echo", flush=True)
            sys.stdin.read()
        except KeyboardInterrupt:
            pass
        finally:
            subprocess.run([*thrum, "daemon", "stop"], env=environ, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

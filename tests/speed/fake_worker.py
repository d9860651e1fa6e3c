"""A worker of the speed benchmark that measures nothing and writes its turns to a file."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """``fake_worker.py NAME SECONDS LOSS TURNS``; SECONDS may be ``dies`` or ``fails``."""
    name, seconds, loss, turns = sys.argv[1:]
    print("a library says hello", file=sys.stderr)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            if seconds == "dies":
                raise SystemExit(3)
            if seconds == "fails":
                answer = {"error": "ValueError: no such work"}
            else:
                answer = {"results": {"loss": float(loss)}, "units": 10.0, "base_bytes": 100}
        else:
            with open(turns, "a") as file:
                file.write(name)
            # The times are invented; the first turn is an outlier.
            first = not getattr(main, "ran", False)
            main.ran = True
            took = float(seconds) * (10 if first else 1)
            answer = {"wall": [took], "cpu": [2 * took], "peak_bytes": 1100}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

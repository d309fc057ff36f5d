"""Start-up time of `import granite_switch` and `granite-switch --help`, compared with bare Python.

python benchmarks/startup.py [--runs 15]
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import granite_switch": ["-c", "import granite_switch"],
    "granite-switch --help": ["-m", "granite_switch.cli", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            times[name].append(time.perf_counter() - start)
    bare = statistics.median(times["python -c pass"][1:])
    for name, values in times.items():
        median = statistics.median(values[1:])
        spread = f"[{min(values[1:]):.3f}-{max(values[1:]):.3f}]"
        print(f"{name:24} {median:.3f} s {spread}, {median - bare:+.3f} s to bare Python")


if __name__ == "__main__":
    main()

"""The head line of a start in run.txt: which code, when, on which machine and with which versions.

    python results/machine.py AT_A_TIME
"""
import datetime
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def git(*words):
    """What git says, or "" where there is none."""
    said = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True)
    return said.stdout.strip() if said.returncode == 0 else ""


def files_that_compute():
    """*.py of the root and reproduce.sh, tracked ones where git knows: not results/, docs/, README."""
    tracked = git("ls-files", ":(glob)*.py", "reproduce.sh").split()
    return tracked or sorted(path.name for path in [*ROOT.glob("*.py"), ROOT / "reproduce.sh"])


def code(files):
    """Twelve hex digits of the names and contents of these files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def processor():
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def head_line(at_a_time):
    files = files_that_compute()
    commit = git("rev-parse", "--short=7", "HEAD") or "unknown"
    state = "changed" if git("status", "--porcelain", "--", *files) else "clean"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"# code {code(files)}, commit {commit}, {state}, {processor()}, {os.cpu_count()} cores, {gpu}, "
            f"torch {torch.__version__}, python {platform.python_version()}, {at_a_time} at a time, "
            f"start {datetime.datetime.now():%Y-%m-%d %H:%M}")


if __name__ == "__main__":
    print(head_line(sys.argv[1]))

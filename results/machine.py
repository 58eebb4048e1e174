"""One line for run.txt: when, at which commit, on which machine and with which versions reproduce.sh started.

    python results/machine.py COMMIT AT_A_TIME
"""
import datetime
import os
import platform
import sys
from pathlib import Path

import torch

commit, at_a_time = sys.argv[1:]
processor = platform.processor() or platform.machine()
info = Path("/proc/cpuinfo")
for line in info.read_text().splitlines() if info.exists() else []:
    if line.startswith("model name"):
        processor = line.split(":")[1].strip()
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(f"# {datetime.datetime.now():%Y-%m-%d %H:%M}, commit {commit}, {processor}, {os.cpu_count()} cores, "
      f"{gpu}, torch {torch.__version__}, python {platform.python_version()}, {at_a_time} at a time")

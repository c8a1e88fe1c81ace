"""Facts about this process from the operating system."""

import os
from pathlib import Path


def process_age() -> float:
    """Seconds since the process started; 0.0 on systems without /proc."""
    try:
        uptime, stat = Path("/proc/uptime").read_text(), Path("/proc/self/stat").read_text()
    except OSError:
        return 0.0
    began = int(stat.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22, seconds since boot
    return max(0.0, float(uptime.split()[0]) - began)

"""PyPI's `trainctl` is another project: notice it where both are installed."""

import sys
from pathlib import Path


def foreign_packages() -> list[str]:
    """Installed packages that claim the name `trainctl` and are not this project, each with its place.

    By the names of metadata directories, which costs a look-up where importing importlib.metadata costs 20 ms.
    """
    found = []
    for entry in dict.fromkeys(sys.path):
        if entry.endswith(("site-packages", "dist-packages")):
            found += [str(path) for path in sorted(Path(entry).glob("trainctl-[0-9]*.*-info"))]
    return found

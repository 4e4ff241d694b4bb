"""Run pipeline scripts one after another in one process (imports cost seconds), as a user would.

usage: python tests/stages.py STAGE[,STAGE...] CONFIG [CONFIG ...] [key=value ...]
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    stages, arguments = sys.argv[1].split(","), sys.argv[2:]
    sys.path.insert(0, str(ROOT))
    for stage in stages:
        sys.argv = [f"{stage}.py", *arguments]
        print(f"== {stage}", flush=True)
        runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")

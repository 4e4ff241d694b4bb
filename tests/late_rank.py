"""A script on ranks of which all but the first begin only when files are there.

usage: torchrun --nproc_per_node=2 tests/late_rank.py PATTERN COUNT SCRIPT ARGUMENTS...
"""

import glob
import os
import runpy
import sys
import time

pattern, count, script, *arguments = sys.argv[1:]
if os.environ["RANK"] != "0":
    while len(glob.glob(pattern)) < int(count):
        time.sleep(0.2)
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")

"""Stands in for a worker node where only its life and death matter: writes what it was given, and says ready.

With --fail it ends at once; with --child it first starts a process of its own, in a session of its own.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--queue")
parser.add_argument("--slots")
parser.add_argument("--node-id")
parser.add_argument("--predecessor", default="")
parser.add_argument("--fail", action="store_true")
parser.add_argument("--child", action="store_true")
options = parser.parse_args()
if options.fail:
    sys.exit(3)
if options.child:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(f"child-{child.pid}").touch()
    tempfile.mkdtemp(prefix=f"yadtq-node-{options.node_id}-")
after = options.predecessor or "nobody"
sys.stdout.write(f"{options.queue} {options.slots} {options.node_id} after {after}\n")
sys.stdout.write(f"ready {options.node_id}\n")
sys.stdout.flush()
while True:
    signal.pause()

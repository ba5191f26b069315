"""The stack on this machine: broker, store and worker nodes from wheels, with no Docker and no Java.

stack.py     the user's stack: ensure_up, status, down
cluster.py   LocalCluster, private, for tests and scripts
keeper.py    the process that starts and watches the parts
servers.py   what the parts are
home.py      the directory in which all of this is written down
"""

from yadtq_nb.local.cluster import LocalCluster, LocalWorker
from yadtq_nb.local.stack import PartStatus, StackStatus, down, ensure_up, status

__all__ = ["LocalCluster", "LocalWorker", "PartStatus", "StackStatus", "down", "ensure_up", "status"]

"""A forked worker lets go of the connections to the job's store, also of those that were made anew since attach."""

import json
import subprocess
import sys

SCRIPT = """
import json, os, socket
from torch.distributed import TCPStore
from trainctl.trainer.descriptors import OwnSockets
from trainctl.trainer.meeting import Meeting

host = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port)}


def to_the_store():
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(entry))) as same:
                found |= {int(entry)} if same.getpeername()[1] == host.port else set()
        except (OSError, IndexError):
            pass
    return found


scripts = to_the_store()
own = OwnSockets()
meeting = Meeting(world_size=2, run_id="r", attempt=1, secret=b"secret", sockets=own)
with own.opening():
    connection = meeting.connect()
connection.put("k", b"before")
for number in to_the_store() - scripts:
    with socket.socket(fileno=os.dup(number)) as same:
        same.shutdown(socket.SHUT_RDWR)
connection.put("k", b"after")
anew = to_the_store() - scripts
reader, writer = os.pipe()
worker = os.fork()
if worker == 0:
    own.let_go()
    left = to_the_store()
    os.write(writer, json.dumps({"scripts": bool(scripts) and left >= scripts, "ours": sorted(left & anew)}).encode())
    os._exit(0)
os.waitpid(worker, 0)
told = json.loads(os.read(reader, 1000)) | {"anew": len(anew), "works": connection.get("k") == b"after"}
print(json.dumps(told))
"""


def test_a_connection_that_was_made_anew_is_let_go_of_and_the_scripts_own_is_not() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"scripts": True, "ours": [], "anew": 1, "works": True}

"""Follow a run's metrics with nothing but zmq and msgpack. Usage: consumer.py CARD.json USER_KEY.json"""

import json
import struct
import sys
from pathlib import Path

import msgpack
import zmq

card, keys = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
socket = zmq.Context.instance().socket(zmq.SUB)
socket.curve_publickey, socket.curve_secretkey = keys["public"].encode(), keys["secret"].encode()
socket.curve_serverkey = card["server_key"].encode()
socket.connect(f"{card['addresses'][0].rpartition(':')[0]}:{card['publish_port']}")
socket.subscribe(b"metrics")
while True:
    rows = msgpack.unpackb(socket.recv_multipart()[1])["body"]
    for column in rows["columns"]:
        code = {"f4": "f", "f8": "d"}[column["dtype"]]
        values = struct.unpack(f"<{len(rows['steps'])}{code}", column["data"])
        for step, value in zip(rows["steps"], values, strict=True):
            print(step, column["name"], value, flush=True)

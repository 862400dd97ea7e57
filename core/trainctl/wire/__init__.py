"""What trainctl's processes say to one another, and how.

`messages`, `codec`, `commands`, `expressions`, `rundir` and `paths` are plain data and files: the training
process may import them. `keys`, `sockets`, `server`, `peer` and `follower` own sockets or secrets and reach zmq.
"""

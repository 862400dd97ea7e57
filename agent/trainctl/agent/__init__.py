"""The node's agent: what the machine, its GPUs and its ranks do, published as readings once a second.

python -P -m trainctl.agent [--job JOB] [--interval S] [--bind HOST] [--prometheus PORT] [--while-ranks]

main ── options, lock, signals
 └── service ── server and card; one tick a second puts a reading together from
      ├── node_sampler                 CPU, load and memory, as the cgroup limits it
      ├── rank_watch                   a pidfd for each local rank: a death is published at once
      └── gpu_monitor ── gpu_watch     asks a child process, gpu_poller, which alone calls NVML
                          nvml, gpu_fields
"""

"""The hub of a run: a process of its own that records, publishes and answers for rank 0.

__main__   options, signals, exit
service    the parts put together, the clock, the end
announce   card and ports
link       the AF_UNIX socket to rank 0, and the line to it while there is one
attendance rank 0 comes, speaks, goes, dies, comes back
board      where the run stands, told when it changes
recorder   one funnel: number, journal, apply, publish
keeper     the journal on disk, and what to do while it cannot be written; patient_keeper: while the disk hangs
disk       the one thread that goes to the run's directory, for the loop; log_thread for hub.log
trouble    tells when the run's directory cannot be written
ownership  whether this hub is still the one that may write
life       the state of the run (pure), with `stalled`
detect     shows metrics to the detectors `nonfinite`, `detect_spike` (detect_past: the live branch after a rollback);
           detect_lookout to `detect_disk` (all pure)
alerts     the user's command for events that cannot wait: alerts_rules (pure), alerts_command
aside      work on files that may never answer
rules      why a command is rejected (pure)
desk       commands from request to outcome
agents     following the nodes' agents
requests   answers to clients
"""

"""Copies of a run's history in other tools' forms: each sink in a worker of its own, none in the rank's way.

sink         what a sink is, and what it is told
known        the sinks there are, and which of them are wanted
crew         starts the workers, feeds them, ends them in time
worker       one thread for one sink: feed, refill, flush, back off
feed         the bounded queue between the hub and a worker
access       what a worker may ask of the hub
columns      the values that they write
branching    what a new branch of the history makes void
trouble      when to try again, and when to tell of it
memory       how far a sink got, in the run's directory
tensorboard, wandb, mlflow (and mlflow_names), prometheus   the sinks
"""

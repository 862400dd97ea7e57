"""What a program needs to find a run, follow it and act on it; the cockpit and the command line are built on it."""

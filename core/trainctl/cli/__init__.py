"""The `trainctl` command. Each subcommand is a module of its own that is loaded when it is called."""

"""`python -m trainctl.cli`: the same as `trainctl`."""

from trainctl.cli.main import main

main()

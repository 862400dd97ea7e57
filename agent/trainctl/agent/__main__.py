"""`python -P -m trainctl.agent`."""

import sys

from trainctl.agent.main import main

sys.exit(main())

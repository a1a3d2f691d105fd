"""`python -m dsb_runtime` is the `dsb` command."""

import sys

from dsb_runtime.cli.main import main

sys.exit(main())

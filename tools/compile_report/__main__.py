"""`python -m tools.compile_report` is `tools.compile_report.report`."""

import sys

from tools.compile_report.report import main

sys.exit(main())

"""`python -m tools.compile_report` is `tools.compile_report.report`."""

from tools.compile_report.report import main

main()

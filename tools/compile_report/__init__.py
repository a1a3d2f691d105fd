"""`python -m tools.compile_report`: what every kernel needs on every architecture."""

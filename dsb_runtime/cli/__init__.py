"""The `dsb` command."""

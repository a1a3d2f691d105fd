"""What `dsb bench`, `dsb profile` and `dsb eval` measure, draw and keep."""

"""The measurements of `dsb bench`, `dsb profile` and `dsb eval`, their pictures and files."""

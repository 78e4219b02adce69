"""Arithmetic on samples that several rooms judge by: scores in, a verdict and its uncertainty out. No I/O, no clock."""

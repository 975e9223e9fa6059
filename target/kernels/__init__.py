"""Triton kernels. Importing one needs triton, so whoever uses it imports it lazily."""

"""Triton kernels of what lies between the passes of a round. Importing one needs triton, so it is imported lazily."""

"""Benchmarks: latency, acceptance, and what gRPC costs."""

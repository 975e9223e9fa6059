"""The target model: one forward of the large model, its cache and its attention.

Owns: configs, layers, weights, paged KV, attention backends. Must never know drafting, sessions or graphs.
"""

"""The kit for authors of attention backends: does yours survive being recorded and replayed?

    pytest --pyargs graphs.conformance --backend package.module:Backend [--device cpu|cuda]

Owns: the tests, their oracle, and a broken twin for each rule that its own test must reject. Must never know a
particular backend. What a backend must offer is in `graphs.conformance.backend`, which needs no pytest.
"""

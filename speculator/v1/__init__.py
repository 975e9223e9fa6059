"""The wire contract as Python: modules generated from proto/speculator/v1 by `make proto`.

Owns: nothing by hand. Only server, client and translation code may import it; torch never comes near it.
"""

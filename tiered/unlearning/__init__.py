"""Removing a domain and measuring what is left of it, against a gold retrained without it.

systems: a router and partition models in a folder of their own; deletion: the operations that
make one; protocol: what is scored, the metrics and their words.
"""

"""Removing a domain and measuring what is left of it, against a gold retrained without it.

systems: a router and partition models in a folder of their own; deletion, purge, gradient: the
operations that make one; operations: their names; sets, protocol, attacks: what is scored;
measures: numbers with intervals, or words; controls: random masks; benchmark: the flow.
"""

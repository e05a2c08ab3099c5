"""Processes and devices: the runtime every part asks, and the collectives it computes with."""

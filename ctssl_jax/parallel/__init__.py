"""Devices, hosts and processes of a run."""

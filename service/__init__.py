"""Parley: the system of record for conversations."""

"""Decisions: state and requests in, outcomes out. No database, no protobuf, no clock."""

"""The RPCs, one file a service. Each reads: parse, transact, answer."""

"""Ids as they come in and go out: `uuid.UUID`s, made by what the driver has of its own in C.

Python's own class takes three times as long to read and ten times to write one, and a call reads
three and writes five: a twentieth of what it costs.
"""

from asyncpg.pgproto import pgproto

UUID = pgproto.UUID

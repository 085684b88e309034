"""Messages on a TCP connection.

writer    HELLO(version, flags, block bytes) and the receiver's token
                                                 -> HELLO of the receiver; both close it where they differ, and where
                                                    its magic is ELSEWHERE: the token is another receiver's
writer    BATCH(identity, count) TABLE[count] and then the blocks' bytes, in the order of the table
                                                 -> ACK(status, text) once all are in place, or none counts
"""

from __future__ import annotations

import struct

MAGIC = b"BTKV"
VERSION = 2
HELLO = struct.Struct("<4sHHQ")  # magic, version, flags, block bytes

"""A listening socket that systemd opened and handed over (sd_listen_fds): it is there before the server and after it.

So that the first request starts the server, and requests wait while it restarts. Knows descriptors and the two
variables that announce them; who may ask is `security`'s business.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

from turboserve.errors import StartupError

FIRST_FD = 3  # by systemd's protocol, behind standard input, output and error
VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def inherited_listener(
    environ: MutableMapping[str, str] | None = None, first_fd: int = FIRST_FD
) -> socket.socket | None:
    """The socket meant for this process, or None. Takes the variables away, so that no child believes them.

    Raises StartupError for several sockets, and for one that is not listening on TCP.
    """
    environ = os.environ if environ is None else environ
    pid, count, _ = (environ.pop(name, "") for name in VARIABLES)
    if pid != str(os.getpid()) or not count.isdecimal() or count == "0":
        return None
    if count != "1":
        raise StartupError(f"systemd handed over {count} sockets: name one ListenStream= in turboserve.socket")
    os.set_inheritable(first_fd, False)
    sock = socket.socket(fileno=first_fd)
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not (is_tcp and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
        sock.close()
        raise StartupError("systemd handed over a socket that does not listen on TCP: give ListenStream= ADDRESS:PORT")
    return sock

"""A network between two programs of this machine: it may be slow, and it may be cut."""

import socket
import threading
import time
from contextlib import contextmanager, suppress


class SlowWire:
    """Hands bytes on, each piece some time later.

    Attributes:
        address: Where to connect instead.
    """

    def __init__(self, target, delay_s):
        host, _, port = target.rpartition(":")
        self._target, self._delay_s = (host, int(port)), delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = [self._listener]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(16384):
                time.sleep(self._delay_s)
                sink.sendall(data)

    def cut(self):
        """From now on nothing comes through, and nothing can be opened."""
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def slow_wire(target, delay_s):
    wire = SlowWire(target, delay_s)
    try:
        yield wire
    finally:
        wire.cut()

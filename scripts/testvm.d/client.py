"""client.py PORT SCRIPT: run a bash script in the test VM; its stdout, stderr and status become ours."""
import socket
import struct
import sys

HEADER = struct.Struct(">cI")


def read(sock, size):
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        if not chunk:
            sys.exit("testvm: the machine went away")
        data += chunk
    return data


def run(port, script):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(HEADER.pack(b"s", len(script)) + script)
    while True:
        kind, size = HEADER.unpack(read(sock, HEADER.size))
        if kind == b"x":
            return size
        out = sys.stdout.buffer if kind == b"o" else sys.stderr.buffer
        out.write(read(sock, size))
        out.flush()


try:
    sys.exit(run(int(sys.argv[1]), sys.argv[2].encode()))
except KeyboardInterrupt:
    sys.exit(130)

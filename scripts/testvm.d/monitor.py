"""monitor.py SOCKET save FILE | resume: save a machine's memory and end it; or let one that was restored go on."""
import json
import socket
import sys
import time

TIMEOUT = 60


def connect(path):
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            return sock
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


sock = connect(sys.argv[1])
sock.settimeout(TIMEOUT)
lines = sock.makefile("r")


def call(command, **arguments):
    sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    for line in lines:
        answer = json.loads(line)
        if "error" in answer:
            sys.exit(f"QEMU: {command}: {answer['error']['desc']}")
        if "return" in answer:
            return answer["return"]
    sys.exit(f"QEMU: {command}: it went away")


def wait_for(command, wanted):
    deadline = time.monotonic() + TIMEOUT
    while (status := call(command).get("status")) != wanted:
        if status == "failed" or time.monotonic() > deadline:
            sys.exit(f"QEMU: {command}: {status}, not {wanted}")
        time.sleep(0.05)


lines.readline()  # the greeting
call("qmp_capabilities")
if sys.argv[2] == "save":
    call("stop")
    call("migrate", uri="file:" + sys.argv[3])
    wait_for("query-migrate", "completed")
    call("quit")
else:
    wait_for("query-status", "paused")
    call("cont")

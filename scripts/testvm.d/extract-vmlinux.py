"""extract-vmlinux.py BZIMAGE VMLINUX: take the ELF kernel out of a bzImage, for QEMU's -kernel (PVH entry, no BIOS)."""
import subprocess
import sys

image = open(sys.argv[1], "rb").read()


def field(offset):
    return int.from_bytes(image[offset:offset + 4], "little")


# Linux's Documentation/arch/x86/boot.rst: setup_sects, then payload_offset and payload_length in the setup header
setup_sectors = image[0x1F1] or 4
start = (setup_sectors + 1) * 512 + field(0x248)
payload = image[start:start + field(0x24C)]

if payload.startswith(b"\x28\xb5\x2f\xfd"):  # zstd, and the uncompressed size behind it
    command, payload = ["zstd", "-dc"], payload[:-4]
elif payload.startswith(b"\xfd7zX"):
    command = ["xz", "-dc", "--single-stream"]
else:
    sys.exit(f"unknown compression: {payload[:6].hex()}")

kernel = subprocess.run(command, input=payload, stdout=subprocess.PIPE).stdout
if not kernel.startswith(b"\x7fELF"):
    sys.exit("no ELF file in there")
with open(sys.argv[2], "wb") as out:
    out.write(kernel)

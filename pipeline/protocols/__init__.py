"""What sensors say on the wire, as pure functions of bytes: a node reads a device with them, an import a capture file.

Nothing here opens a device, reads a clock or waits.
"""

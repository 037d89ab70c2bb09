"""The conversation of a worker with `kavanam bench`, over its standard streams.

src/peers/worker/protocol.rs describes the messages, calculations.py what is computed. The worker ends when its input
does.
"""

import gc
import json
import os
import sys
import time
import traceback
import zlib


class Harness:
    """The streams to and from the harness. What a library prints goes to the error stream instead."""

    def __init__(self):
        self.requests = sys.stdin.buffer
        self.answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def receive(self):
        """The name and the content of the next message, None at the end."""
        line = self.requests.readline()
        if not line:
            return None
        ((name, content),) = json.loads(line).items()
        return name, content

    def elements(self, count):
        """The next elements, four bytes each."""
        data = self.requests.read(4 * count)
        if len(data) < 4 * count:
            raise SystemExit("the input ended inside a tensor")
        return data

    def send(self, name, content, arrays=()):
        """Writes a message and the arrays that follow it."""
        self.answers.write(json.dumps({name: content}).encode() + b"\n")
        for array in arrays:
            self.answers.write(array.data.cast("B"))
        self.answers.flush()


# Before any package is imported, because some print.
harness = Harness()


class Session:
    """One case at a time."""

    def __init__(self, calculations):
        self.calculations = calculations
        self.id = None
        self.calculation = None

    def prepare(self, task):
        """Makes a case ready, in the place of the one before."""
        self.calculation = None
        gc.collect()
        tensors, checksum = self.tensors(task["tensors"])
        self.calculation, self.id = self.calculations.make(task, tensors), task["id"]
        harness.send("prepared", {"crc32": checksum, "kernel": self.calculation.kernel})

    def tensors(self, descriptions):
        """Reads the operands; returns them by name, and the checksum of their bytes."""
        tensors, checksum = {}, 0
        for description in descriptions:
            count = 1
            for dim in description["dims"]:
                count *= dim
            data = harness.elements(count)
            checksum = zlib.crc32(data, checksum)
            tensors[description["name"]] = self.calculations.tensor(data, description)
        return tensors, checksum

    def time(self, request):
        """Computes some times, then some times by the clock."""
        calculation = self.ready(request)
        self.calculations.nanoseconds(calculation.call, request["untimed"])
        spent = self.calculations.nanoseconds(calculation.call, request["timed"])
        if self.calculations.threads() > 1:
            settle()
        harness.send("timed", {"ns": spent})

    def outputs(self, request):
        """Gives what the last call wrote."""
        arrays = [self.calculations.elements(tensor) for tensor in self.ready(request).outputs()]
        harness.send("outputs", {"lengths": [array.size for array in arrays]}, arrays)

    def ready(self, request):
        """The case that a request means."""
        if self.calculation is None or request["id"] != self.id:
            raise LookupError("case %s is not the one that is ready" % request["id"])
        return self.calculation


def settle():
    """Waits until the threads of the pools sleep: they spin for about 8 ms after their last work, and would take a
    core from the next peer. The system accounts a running thread's time at its ticks, which are up to 10 ms apart,
    so that a shorter look sees nothing."""
    deadline = time.perf_counter() + 0.2
    while time.perf_counter() < deadline:
        busy = time.process_time()
        time.sleep(0.012)
        if time.process_time() - busy < 0.001:
            return


def main():
    """Answers until the input ends."""
    import calculations

    python = "%d.%d.%d" % sys.version_info[:3]
    packages = calculations.PACKAGES
    harness.send("hello", {"python": python, "packages": packages, "engine": calculations.engine()})
    if any("error" in state for state in packages.values()):
        return
    calculations.initialise()
    # A collection in the middle of a sample would be measured.
    gc.disable()
    session = Session(calculations)
    handlers = {"prepare": session.prepare, "time": session.time, "outputs": session.outputs}
    while True:
        message = harness.receive()
        if message is None:
            return
        name, content = message
        try:
            handlers[name](content)
        except calculations.Declined as reason:
            harness.send("declined", {"reason": str(reason)})
        except Exception as error:
            traceback.print_exc()
            harness.send("failed", {"message": calculations.first_line(error)})


if __name__ == "__main__":
    main()

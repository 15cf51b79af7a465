"""Why a loop's process ended, from what it wrote to standard error: a line out of a hundred."""

import re

COUNT = re.compile(r"\d+ errors:")  # see `errors.print_mistakes`
MISTAKE = re.compile(r"(?:error:|  \d+\.) (.+)")
# torch writes the rank before each line of a traceback, once the processes have found each other.
EXCEPTION = re.compile(r"(?:\[rank(\d+)\]: )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)(?:: .+)?)")
FOOTER = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/.*\] (?:Sending process|failed \()")  # torchrun's


def complaint(text: str, status: int) -> str:
    """The mistakes that the process, or those that torchrun started for it, told; else the exception or signal of the first to fail."""
    lines = [line.rstrip() for line in text.splitlines()]
    numbered = any(COUNT.fullmatch(line) for line in lines)
    found = [match for line in lines if (match := MISTAKE.fullmatch(line))]
    if told := [match[1] for match in found if numbered or match[0].startswith("error:")]:
        return "; ".join(dict.fromkeys(told))  # every process tells them
    end = next((number for number, line in enumerate(lines) if FOOTER.match(line)), len(lines))
    raised = [match for line in lines[:end] if (match := EXCEPTION.fullmatch(line))]
    cause = text.partition("Root Cause (first observed failure)")[2]
    rank, signal = re.search(r"rank +: (\d+)", cause), re.search(r"traceback : (Signal .+)", cause)
    if rank and signal and not any(match[1] in (None, rank[1]) for match in raised):
        return signal[1]
    if raised:  # the others only lost the first one, and say so after it
        return [match[2] for match in raised if match[1] == raised[0][1]][-1]
    return next((line.strip() for line in reversed(lines[:end]) if line.strip(" =-*")), f"exit status {status}")

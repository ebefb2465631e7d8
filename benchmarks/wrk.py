"""wrk as the load's generator: written in C, it takes a fifth of the processor time a request that one in Python does.

A customer runs elsewhere; a generator on the service's own cores takes from it what it uses itself. Debian: apt-get install wrk.
"""

import resource
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SCRIPT = """
wrk.method = "POST"
local file = io.open(%(body)s, "rb")
wrk.body = file:read("*a")
file:close()
%(headers)s
done = function(summary, latency, requests)
  local errors = summary.errors
  local told = {
    requests = summary.requests, refused = errors.status, took_s = summary.duration / 1e6,
    broken = errors.connect + errors.read + errors.write + errors.timeout,
    p50_ms = latency:percentile(50) / 1e3, p99_ms = latency:percentile(99) / 1e3,
  }
  for name, value in pairs(told) do io.write(string.format("\\nFIGURE %%s %%f", name, value)) end
end
"""


@dataclass(frozen=True)
class Request:
    path: str
    body: bytes
    headers: dict[str, str]


class NoWrk(RuntimeError):
    """wrk isn't installed."""


def load(url: str, request: Request, connections: int, seconds: int) -> dict[str, float]:
    """Every connection asks again as soon as it is answered; `cpu_s` is the generator's own processor time.

    Raises NoWrk, and RuntimeError where an answer wasn't a good one.
    """
    if shutil.which("wrk") is None:
        raise NoWrk("wrk makes the load of this benchmark; Debian: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder, "body"), Path(folder, "load.lua")
        body.write_bytes(request.body)
        headers = "\n".join(f"wrk.headers[{key!r}] = {value!r}" for key, value in request.headers.items())
        script.write_text(SCRIPT % {"body": repr(str(body)), "headers": headers})
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--timeout", "10", "-s", str(script)]
        before_s = children_s()
        done = subprocess.run([*command, url + request.path], check=True, capture_output=True, text=True)
    if done.stderr:
        raise RuntimeError(f"wrk: {done.stderr}")
    told = {line.split()[1]: float(line.split()[2]) for line in done.stdout.splitlines() if line.startswith("FIGURE ")}
    if told["refused"] or told["broken"]:
        raise RuntimeError(
            f"{told['refused']:.0f} answers were refusals, {told['broken']:.0f} connections broke:\n{done.stdout}"
        )
    return {**told, "rate": told["requests"] / told["took_s"], "cpu_s": children_s() - before_s}


def children_s() -> float:
    """Processor time of the processes that this one waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

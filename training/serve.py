"""`bit serve`: MLflow's server with its UI, and the inference service, in the foreground until Ctrl-C."""

import signal
import threading

from training.config import Config
from training.demo import servers


def main(config: Config, port: int, mlflow_port: int) -> None:
    """Starts both, prints their addresses, stops both cleanly on Ctrl-C or SIGTERM."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with servers.running(config.tracking_uri, port, mlflow_port) as (service, mlflow):
        print(f"playground  {service}\nMLflow      {mlflow}\nCtrl-C stops both; logs are in .serve/", flush=True)
        stop.wait()
    print("stopped", flush=True)

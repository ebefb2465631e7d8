"""LitServe: JSON in (it hands no raw body to its workers), two workers."""

import base64
import sys

import litserve

from benchmarks.peers.run import Network


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.network = Network(sys.argv[1])

    def decode_request(self, request: dict[str, list[str]]) -> bytes:
        return base64.b64decode(request["inputs"][0])

    def predict(self, picture: bytes) -> list[float]:
        return self.network(picture)

    def encode_response(self, output: list[float]) -> dict[str, list[float]]:
        return {"probabilities": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=2, timeout=False)
    server.run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning", access_log=False
    )

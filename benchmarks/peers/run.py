"""What each peer's model does: an encoded picture → probabilities, by ONNX Runtime on one thread."""

import json

import onnxruntime as ort

from services import preprocess


class Network:
    def __init__(self, path: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.side = json.loads(self.session.get_modelmeta().custom_metadata_map["resolution"])

    def __call__(self, picture: bytes) -> list[float]:
        pixels = preprocess.pixels(picture, self.side)[None]
        return self.session.run(["probabilities"], {"pixels": pixels})[0][0].tolist()

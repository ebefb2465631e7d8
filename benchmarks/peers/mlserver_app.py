"""MLServer: a runtime of its own, two parallel workers."""

import base64

from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.peers.run import Network


class Export(MLModel):
    async def load(self) -> bool:
        self.network = Network(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        [data] = payload.inputs[0].data
        row = self.network(base64.b64decode(data))
        output = ResponseOutput(name="probabilities", shape=[1, len(row)], datatype="FP32", data=row)
        return InferenceResponse(model_name=self.name, outputs=[output])

"""`mlflow models serve`: a pyfunc model, two workers."""

import base64
from typing import Any

import mlflow

from benchmarks.peers.run import Network


class Export(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        self.network = Network(context.artifacts["export"])

    def predict(self, context: Any, model_input: Any, params: Any = None) -> list[list[float]]:
        return [self.network(base64.b64decode(one)) for one in model_input]


def save(export: str, folder: str) -> None:
    mlflow.pyfunc.save_model(folder, python_model=Export(), artifacts={"export": export}, pip_requirements=[])

"""Makes bit-serve's account, which may read every registered model, those to come too; later: gives it the Secret's password."""

import os
import sys

import httpx

server = httpx.Client(
    base_url=os.environ["MLFLOW_TRACKING_URI"],
    auth=(os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]),
    timeout=30,
)
user, password = os.environ["SERVICE_USERNAME"], os.environ["SERVICE_PASSWORD"]


def make(method: str, path: str, **body: str) -> bool:
    """Whether it was made; False where it was there already."""
    answer = server.request(method, path, json=body)
    if answer.status_code != 200 and "RESOURCE_ALREADY_EXISTS" not in answer.text:
        sys.exit(f"{path}: {answer.status_code} {answer.text}")
    return answer.status_code == 200


if not make("POST", "/api/2.0/mlflow/users/create", username=user, password=password):
    make("PATCH", "/api/2.0/mlflow/users/update-password", username=user, password=password)
grant = {"resource_type": "registered_model", "resource_id": "*", "permission": "READ"}
make("POST", "/api/3.0/mlflow/users/permissions/grant", username=user, **grant)
print(f"{user} may read every registered model")

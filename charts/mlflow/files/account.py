"""Makes bit-serve's account and lets it read every registered model; whatever is there already stays."""

import os
import sys

import httpx

API = "api/2.0/mlflow"
server = httpx.Client(
    base_url=os.environ["MLFLOW_TRACKING_URI"].rstrip("/") + "/",
    auth=(os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]),
    timeout=30,
)
user = os.environ["SERVICE_USERNAME"]


def once(path: str, **body: str) -> None:
    """Makes something, or finds it made."""
    answer = server.post(f"{API}/{path}", json=body)
    if answer.status_code != 200 and answer.json().get("error_code") != "RESOURCE_ALREADY_EXISTS":
        sys.exit(f"{path}: {answer.status_code} {answer.text}")


once("users/create", username=user, password=os.environ["SERVICE_PASSWORD"])
token, opened = "", 0
while True:
    query = {"max_results": 1000, "page_token": token}
    page = server.get(f"{API}/registered-models/search", params=query).raise_for_status().json()
    for model in page.get("registered_models", []):
        once("registered-models/permissions/create", name=model["name"], username=user, permission="READ")
        opened += 1
    token = page.get("next_page_token", "")
    if not token:
        break
print(f"{user} may read {opened} registered models")

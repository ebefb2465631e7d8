"""Brings back every deleted run (and experiment) of a version that an alias points to, so that `mlflow gc` passes it by."""

import os

from mlflow import MlflowClient

client = MlflowClient(os.environ["MLFLOW_BACKEND_STORE_URI"])
token = None
while True:
    page = client.search_registered_models(max_results=1000, page_token=token)
    for model in page:
        for alias, number in model.aliases.items():
            run_id = client.get_model_version(model.name, number).run_id
            if not run_id:
                continue
            run = client.get_run(run_id)
            if client.get_experiment(run.info.experiment_id).lifecycle_stage == "deleted":
                client.restore_experiment(run.info.experiment_id)
                print(f"experiment {run.info.experiment_id} restored: {model.name}@{alias} needs it")
            if client.get_run(run_id).info.lifecycle_stage == "deleted":
                client.restore_run(run_id)
                print(f"run {run_id} restored: {model.name}@{alias} needs it")
    token = page.token
    if not token:
        break

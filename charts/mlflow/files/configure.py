"""Prints MLflow's auth.ini, which may hold a Secret (the accounts' database). Accounts may do nothing unless granted."""

import os

print(f"""[mlflow]
default_permission = NO_PERMISSIONS
database_uri = {os.environ["ACCOUNTS_URI"].replace("%", "%%")}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth""")

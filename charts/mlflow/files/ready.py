"""ready.py URL HOST: whether the registry answers, asked by the Service's name and with an account.

Page /health is no measure: it answers 200 whatever becomes of hosts, accounts and the database.
"""

import base64
import os
import sys
from urllib.request import Request, urlopen

url, host = sys.argv[1:]
account = f"{os.environ['MLFLOW_AUTH_ADMIN_USERNAME']}:{os.environ['MLFLOW_AUTH_ADMIN_PASSWORD']}"
headers = {"Host": host, "Authorization": f"Basic {base64.b64encode(account.encode()).decode()}"}
look = Request(f"{url}/api/2.0/mlflow/registered-models/search?max_results=1", headers=headers)  # noqa: S310  # our own server
try:
    urlopen(look, timeout=8).close()  # noqa: S310
except OSError as error:  # HTTPError and a connection that fails are both one
    sys.exit(f"{url} as {host}: {error}")

"""One service over each registry, shared by the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.services.exports import export
from tests.services.running import Folder, MLflow, Service, bit_serve, mlflow_server


@pytest.fixture(scope="module", params=["folder", "mlflow"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serves the tenant `lamps`; runs every test that asks for it over both registries."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "folder":
        store = Folder(folder)
        store.publish("lamps", export())
        with bit_serve(store, folder) as running:
            yield running
        return
    with mlflow_server(folder) as uri:
        registered = MLflow(uri, folder)
        registered.publish("lamps", export())
        with bit_serve(registered, folder) as running:
            yield running


@pytest.fixture(scope="module")
def lamps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Serves the tenants `lamps` and `movers` from a folder, `lamps` with a challenger that answers the other way round."""
    folder = tmp_path_factory.mktemp("lamps")
    store = Folder(folder)
    store.publish("lamps", export())
    store.publish("lamps@challenger", export(sign=-1))
    store.publish("movers", export())
    with bit_serve(store, folder) as running:
        yield running

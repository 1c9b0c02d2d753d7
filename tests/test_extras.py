"""Optional packages that are there or missing."""

import pytest

from tuneserve.errors import SettingsError
from tuneserve.extras import require


def test_a_module_that_is_installed_is_accepted() -> None:
    require("json.decoder", wanted_by="X=1", product="JSON", extra="json")


@pytest.mark.parametrize("module", ["tuneserve_absent", "tuneserve_absent.inner", "json.absent"])
def test_a_missing_module_is_refused_with_how_to_install_it(module: str) -> None:
    with pytest.raises(SettingsError) as caught:
        require(module, wanted_by="X=1", product="The product", extra="some")
    assert str(caught.value) == (
        "X=1 needs The product, which is not installed: "
        "pip install -r production/docker-res/requirements-some.txt, or build.py --build-arg EXTRAS=some."
    )

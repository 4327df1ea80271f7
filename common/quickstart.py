"""The old place of `common.bundled`: `python -m common.quickstart` unpacks the bundled model."""

from common.bundled import bundled_model, main, resolve_model

__all__ = ["bundled_model", "resolve_model"]

if __name__ == "__main__":
    main()

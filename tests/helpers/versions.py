"""Tests that compare with a library which does the same only since some release."""

import diffusers
import pytest
from packaging.version import Version


def since_diffusers(release: str, reason: str):
    """Skips a test where the installed diffusers is older than `release`."""
    return pytest.mark.skipif(
        Version(diffusers.__version__) < Version(release), reason=f"diffusers {release}: {reason}"
    )

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "tessera", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("tessera")


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


@pytest.fixture
def qkv(rng):
    """q, k, v of 300 tokens, 4 query heads on 2 kv heads, float32."""
    make = lambda heads, dim: rng.standard_normal((2, heads, 300, dim)).astype(np.float32)  # noqa: E731
    return make(4, 64), make(2, 64), make(2, 32)

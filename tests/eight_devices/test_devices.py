import jax


def test_there_are_eight_devices():
    assert jax.device_count() == 8

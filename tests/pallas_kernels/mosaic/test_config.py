"""The tunings, and the choice of splits."""

from pathlib import Path

import pytest

from pallas_kernels.mosaic import attention
from pallas_kernels.mosaic.config import Config, EncodeConfig


CONFIGS = Path(__file__).parents[3] / "configs" / "kernels"


@pytest.mark.parametrize(("gpu", "architecture"), [("h100", "hopper"), ("b200", "blackwell")])
def test_tunings_are_those_that_are_used(gpu, architecture):
    path = CONFIGS / f"{gpu}.toml"
    assert EncodeConfig.read(path) == EncodeConfig()
    _, multiprocessors, _ = attention._KERNELS[architecture]
    assert Config.read(path) == Config(blocks=4 * multiprocessors)


@pytest.mark.parametrize(
    ("sequences", "pages"), [(64, 512), (8, 2048), (1, 2048), (512, 512), (400, 512), (132, 64)]
)
def test_splits_fill_the_device(sequences, pages):
    blocks = 528
    splits = Config(blocks=blocks).splits_for(sequences, pages)
    rounds = -(-sequences * splits // blocks)
    assert sequences * splits >= 0.75 * rounds * blocks
    assert splits == 1 or pages // splits >= 4


def test_short_sequences_are_not_split():
    assert Config().splits_for(64, 1) == Config().splits_for(1, 7) == 1


@pytest.mark.parametrize("setting", ["splits", "blocks", "stages"])
def test_settings_are_positive(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        Config(**{setting: 0})


@pytest.mark.parametrize("setting", ["tiles", "warpgroups", "blocks"])
def test_settings_of_encode_are_positive(setting):
    with pytest.raises(ValueError, match=f"{setting}=0"):
        EncodeConfig(**{setting: 0})
